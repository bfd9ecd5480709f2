"""Models small enough to know everything about, for tests and experiments.

They are tiny random checkpoints of every family, and a table of transitions whose text has a known distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tokenswift_py.core import Output, SamplingParams, Segment
from tokenswift_py.decoding.loop import DecodeLoop
from tokenswift_py.decoding.step import Step
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.drafters.base import Drafter
from tokenswift_py.drafters.none import NoDraft
from tokenswift_py.extending.transformers_model import hugging_face as hugging_face
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import TorchPagePool, pages_for
from tokenswift_py.models.clock import Clock, HostClock
from tokenswift_py.models.rows import lay_out
from tokenswift_py.models.spec import FAMILIES as FAMILIES
from tokenswift_py.models.spec import ModelSpec, family_named
from tokenswift_py.sampling.reference import Sampler

Doubles = npt.NDArray[np.float64]

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


ENDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 2}  # not those of a large vocabulary
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}

# These are further fields of a tiny model of a family, so that the family's own parts show.
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], **ENDS},
    "phi3": ENDS,
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 40,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **ENDS,
    },
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 40,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        **ENDS,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "qwen2_moe": {"shared_expert_intermediate_size": 40, **EXPERTS},
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SMALL, **OWN.get(family, {}), **changes})


def tiny_model(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Makes Hugging Face's own model with random weights, biases and norms. The last two start as constants there."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor) if "norm" in name else torch.randn_like(tensor))
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights of transformers' own model under our names."""
    spec, state = ModelSpec.from_config(model.config), model.state_dict()
    family, found = family_named(spec.family), {}
    for name, shape in spec.shapes().items():
        place = family.stored(name, shape, spec)[-1]
        whole = state[place.name].detach()
        found[name] = (whole if place.index is None else whole[place.index])[place.first : place.first + shape[0]]
    return found


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird sat on the mat, and then the rain began"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML, clean_up_tokenization_spaces=False
    )


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> None:
    """Saves a whole checkpoint on disk: config, sharded safetensors, tokenizer, generation defaults."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, **changes}
    config = tiny_config(family, **sizes, eos_token_id=2, bos_token_id=0)
    model = tiny_model(config, torch.float32)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 0])
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)


def write(
    model: Any,
    prompt: Sequence[int],
    count: int,
    params: SamplingParams | None = None,
    drafter: Drafter | None = None,
    vocab: int = 61,
    eos: Sequence[int] = (),
    **settings: Any,
) -> tuple[list[int], DecodeLoop, list[Step]]:
    """Writes a text. Returns all new tokens (forced ones included), the loop and its steps."""
    first_end = settings.pop("first_end", 0)
    sampler = Sampler(
        params or SamplingParams(), vocab, eos, first_end, chapter_tokens=settings.pop("chapter_tokens", 0)
    )
    sampler.grammar = settings.pop("grammar", None)
    loop = DecodeLoop(model, drafter or NoDraft(), sampler, settings.pop("stops", Stops(count, eos)), **settings)
    steps = list(loop.run(prompt))
    tokens = [token for step in steps for token in (*step.forced, *step.tokens)]
    return tokens[len(prompt) :], loop, steps


class MarkovModel:
    """A model whose logits depend on the row's own token only. So every transition of a text is an independent sample.

    table: [vocab, vocab] logits of the column's token after the row's.
    """

    numerics, guarantee, row_shapes = "table", "bitwise", ()

    def __init__(self, vocab: int = 7, context: int = 21_100) -> None:
        self.table = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, (vocab, vocab)))
        self.context = context
        self.clock: Clock = HostClock()

    def new_cache(self) -> KVCache:
        pool = TorchPagePool(1, 1, 1, pages_for(self.context), torch.float32, torch.device("cpu"))
        return KVCache(pool, self.context)

    def forward(
        self,
        segments: Sequence[Segment],
        logit_rows: Sequence[int] | None = None,
        want_mass: bool = False,
        want_queries: bool = False,
        taps: Sequence[int] = (),
    ) -> Output:
        logits = self.table[torch.from_numpy(lay_out(segments).tokens.astype(np.int64))]
        return Output(logits, logits if logit_rows is None else logits[list(logit_rows)])


def transitions(params: SamplingParams, table: Doubles) -> Doubles:
    """Computes transition probabilities [vocab, vocab] by definition: top-k, then top-p, then min-p."""
    p = np.exp(table / params.temperature)
    for row in p:
        if params.top_k:
            row[row < np.sort(row)[-params.top_k]] = 0
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= params.top_p * row.sum()]] = 0
        row[row < params.min_p * row.max()] = 0
    return np.asarray(p / p.sum(1, keepdims=True))


def pairs(text: Sequence[int], vocab: int) -> Doubles:
    """Counts how often each token follows each, [vocab, vocab]."""
    seen = np.zeros((vocab, vocab))
    np.add.at(seen, (text[:-1], text[1:]), 1)
    return seen


def chi_square(seen: Doubles, p: Doubles) -> float:
    """Returns the chance of transitions at least as far from the distribution as these.

    It is 0 where an impossible one was seen. seen, p: counts and probabilities, [vocab, vocab].
    """
    from scipy import stats

    if seen[p == 0].any():
        return 0.0
    wanted, possible = p * seen.sum(1, keepdims=True), p > 0
    statistic = ((seen - wanted)[possible] ** 2 / wanted[possible]).sum()
    return float(stats.chi2.sf(statistic, int((possible.sum(1) - 1).sum())))
