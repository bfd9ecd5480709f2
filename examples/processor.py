"""A logits processor of Hugging Face's kind: called once for every token of the text, in order.

python examples/processor.py [MODEL]
"""

import sys

import torch
from transformers import LogitsProcessor

from tokenswift_py import TokenSwift


class NoRepeat(LogitsProcessor):
    """Never the same token twice in a row."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


swift = TokenSwift.from_pretrained(*sys.argv[1:])
result = swift.generate("Write a poem about rain.", max_new_tokens=100, logits_processors=[NoRepeat()], seed=1)
print(result.text)
