"""The sampler of the verify walk in C++: the rules of `sampling.Sampler`, token for token, without a pass over the
vocabulary in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenswift_py.core import SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.reference import Sampler


class NativeSampler(Sampler):
    """For fp32 logits on the CPU; others, and Hugging Face's processors, go the way of the reference."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        eos: Sequence[int] = (),
        first_end: int = 0,
        processors: Sequence[Any] = (),
        chapter_tokens: int = 0,
    ):
        super().__init__(params, vocab_size, eos, first_end, processors, chapter_tokens)
        self._vocab_size = vocab_size
        self._first_end = first_end
        self._native: Any = self._built(first_end)

    def _built(self, first_end: int) -> Any:
        """The sampler in C++. It keeps no state from row to row, and is made anew where chapters may end later."""
        from tokenswift_py.kernels.cpu import _native

        params = self.params
        return _native.Sampler(
            vocab=self._vocab_size,
            temperature=float(params.temperature),
            top_k=min(params.top_k, self._vocab_size),
            top_p=float(params.top_p),
            log_min_p=self._log_min_p if params.min_p > 0 else None,
            penalty=float(params.penalty),
            penalty_window=min(params.penalty_window, 2**31 - 1),
            dry_length=params.dry_length,
            dry_powers=self._powers if params.dry_multiplier > 0 else [],
            dry_breakers=list(params.dry_breakers),
            ban=list(params.ban),
            eos=self._eos.tolist(),
            first_end=min(first_end, 2**31 - 1),
            bias_tokens=list(params.logit_bias),
            bias=[float(bias) for bias in params.logit_bias.values()],
            seed=params.seed,
            stream=params.stream,
            highest=noise.HIGHEST,
            lowest=noise.LOWEST,
        )

    def ranked(self, logits: torch.Tensor, history: History, count: int) -> list[tuple[int, float]]:
        usable = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous()
        if usable and not self.processors:
            row = logits.detach()
            if self.grammar is not None and torch.isfinite(row.max()):  # else the reference says what is wrong
                row = row.masked_fill(torch.from_numpy(self.grammar.outside(history)), -torch.inf)
            first_end = self.may_end_from(len(history)) if self.chapter_tokens else self._first_end
            if first_end != self._first_end:
                self._first_end, self._native = first_end, self._built(first_end)
            found: list[tuple[int, float]] = self._native.rank(row.numpy(), history.tokens, count)
            if found:
                return found
        return super().ranked(
            logits, history, count
        )  # which also says what is wrong with logits nobody can choose from
