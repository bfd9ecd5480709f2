"""The sampler of the verify walk in C++. It keeps the rules of `sampling.Sampler`, token for token, without a pass over
the vocabulary in Python."""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py.decoding.history import History
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.penalties import LONGEST_TEXT
from tokenswift_py.sampling.reference import Sampler


class NativeSampler(Sampler):
    """A sampler for fp32 logits on the CPU. Other logits, Hugging Face's processors, and top-n-sigma, typical-p and
    XTC, whose sums are the reference's own, take the way of the reference."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        params = self.params
        self._exact = not params.shaped and not (params.top_n_sigma > 0 and params.temperature > 0)
        self._state = self._depends_on(0)
        self._native: Any = self._built()

    def _depends_on(self, position: int) -> tuple[int, int]:
        """Returns the values for which the sampler in C++ is made anew: where the text may end, and how many chapters
        have begun."""
        counts = self.params.frequency_penalty or self.params.presence_penalty
        first_end = self.may_end_from(position) if self.chapter_tokens else self.first_end
        return first_end, len(self._forced) if counts else 0

    def _built(self) -> Any:
        """Returns the sampler in C++. It keeps no state from row to row."""
        from tokenswift_py.kernels.cpu import _native

        params, (first_end, chapters) = self.params, self._state
        return _native.Sampler(
            vocab=self.vocab_size,
            temperature=float(params.temperature),
            top_k=min(params.top_k, self.vocab_size),
            top_p=float(params.top_p),
            log_min_p=self._log_min_p if params.min_p > 0 else None,
            repetition_penalty=float(params.repetition_penalty),
            penalty=float(params.penalty),
            penalty_window=min(params.penalty_window, LONGEST_TEXT),
            frequency_penalty=float(params.frequency_penalty),
            presence_penalty=float(params.presence_penalty),
            forced=[place for span in self._forced[:chapters] for place in span],
            dry_length=params.dry_length,
            dry_window=min(params.dry_window, LONGEST_TEXT),
            dry_powers=self._powers if params.dry_multiplier > 0 else [],
            dry_breakers=list(params.dry_breakers),
            ban=list(params.ban),
            ngram=min(params.no_repeat_ngram_size, LONGEST_TEXT),
            ban_words=[list(word) for word in params.ban_words],
            eos=self._eos.tolist(),
            first_end=min(first_end, LONGEST_TEXT),
            bias_tokens=list(params.logit_bias),
            bias=[float(bias) for bias in params.logit_bias.values()],
            seed=params.seed,
            stream=params.stream,
            highest=noise.HIGHEST,
            lowest=noise.LOWEST,
        )

    def ranked(self, logits: torch.Tensor, history: History, count: int) -> list[tuple[int, float]]:
        usable = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()
        if usable and self._exact and not self.processors:
            row = logits.detach()
            if self.grammar is not None and torch.isfinite(row.max()):  # else the reference says what is wrong
                row = row.masked_fill(torch.from_numpy(self.grammar.outside(history)), -torch.inf)
            if (state := self._depends_on(len(history))) != self._state:
                self._state = state
                self._native = self._built()
            found: list[tuple[int, float]] = self._native.rank(row.numpy(), history.tokens, count)
            if found:
                return found
        return super().ranked(
            logits, history, count
        )  # the reference also says what is wrong with logits that nobody can choose from
