"""The sampler of the verify walk on the GPU: the rules of `sampling.Sampler`, token for token, and one number to fetch
instead of a row of logits."""

from __future__ import annotations

import numpy as np
import torch

from tokenswift_py.history import History
from tokenswift_py.sampling import NumericsError, Sampler


class TritonSampler(Sampler):
    """For everything that is exact in double on any device. top-p, whose sums are of the reference's own exponential,
    DRY and Hugging Face's processors go the way of the reference."""

    def choose(self, logits: torch.Tensor, history: History) -> int:
        params = self.params
        if params.top_p < 1 or params.dry_multiplier > 0 or self.processors:
            return super().choose(logits, history)
        from tokenswift_py.kernels.triton.sampling import choose

        scores = logits.detach().to(torch.float64, copy=True)
        highest = scores.max()
        self._change(scores, history)
        floor, temperature = self._floor(scores), params.temperature
        position = torch.full((1,), len(history), dtype=torch.int32, device=scores.device)
        token, top = choose(scores[None], position, temperature, params.seed, params.stream, floor)
        finite, chosen, score = torch.stack([highest, token[0].double(), top[0]]).tolist()  # the one transfer
        if not np.isfinite(finite):
            raise NumericsError(f"the model's logits for position {len(history)} are not finite")
        if not np.isfinite(score):
            raise NumericsError(f"no token is left to choose from at position {len(history)}")
        return int(chosen)

    def _change(self, scores: torch.Tensor, history: History) -> None:
        """Penalty, bias and bans, in place."""

        def there(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(scores.device)

        params = self.params
        if params.penalty != 1:
            recent = there(np.unique(history.tokens[-params.penalty_window :]).astype(np.int64))
            values = scores[recent]
            scores[recent] = torch.where(values > 0, divided(values, params.penalty), values * params.penalty)
        if len(self._bias_ids):
            scores[there(self._bias_ids)] += there(self._bias)
        if len(self._ban):
            scores[there(self._ban)] = -torch.inf
        if len(history) < self.first_end and len(self._eos):
            scores[there(self._eos)] = -torch.inf

    def _floor(self, scores: torch.Tensor) -> torch.Tensor:
        """[1] what scores / T must reach by top-k and min-p."""
        params = self.params
        floor = scores.new_full((1,), -torch.inf)
        if params.temperature == 0:
            return floor
        if 0 < params.top_k < len(scores):
            floor = torch.maximum(floor, divided(torch.topk(scores, params.top_k).values[-1:], params.temperature))
        if params.min_p > 0:
            floor = torch.maximum(floor, divided(scores.max()[None], params.temperature) + self._log_min_p)
        return floor


def divided(values: torch.Tensor, by: float) -> torch.Tensor:
    """values / by, rounded once: on a GPU torch multiplies by the reciprocal of a plain number."""
    return values / values.new_full((1,), by)
