"""The sampler of the verify walk on the GPU: the rules of `sampling.Sampler`, token for token, and three numbers to
fetch instead of a row of logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tokenswift_py.core import DraftTree, IntArray
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import on_device
from tokenswift_py.sampling.reference import Doubles, NumericsError, Sampler

Penalties = list[tuple[float, list[IntArray]]]  # theta, and for each row the tokens that it changes


class TritonSampler(Sampler):
    """For everything that is exact in double on any device. Filters with sums, whose exponential or order is the
    reference's own (top-p, top-n-sigma, typical-p, XTC), what searches or counts in the text (DRY, n-grams, words,
    frequency, presence) and Hugging Face's processors go the way of the reference."""

    @property
    def exact(self) -> bool:
        params = self.params
        filters = params.top_p >= 1 and params.top_n_sigma == 0 and not params.shaped
        searches = params.dry_multiplier > 0 or params.no_repeat_ngram_size or params.ban_words
        counts = params.frequency_penalty or params.presence_penalty
        return filters and not searches and not counts and not self.processors

    def choose(self, logits: torch.Tensor, history: History) -> int:
        return self.chooser(PENDING, logits[None], history)(0)

    def chooser(self, tree: DraftTree, logits: torch.Tensor, history: History) -> Callable[[int], int]:
        """All nodes' tokens at once: the walk waits for the device once, not for every token."""
        if not self.exact:
            return lambda node: super(TritonSampler, self).choose(logits[node], history)
        positions = len(history) + tree.depth
        outside = None if self.grammar is None else self._outside(tree, history, logits)
        found = self._chosen(logits.detach(), positions, self._penalties(tree, history), outside)
        return lambda node: checked(found[node], int(positions[node]))

    def _penalties(self, tree: DraftTree, history: History) -> Penalties:
        """Each penalty that there is, and for each node the tokens, each once, that it looks at."""
        params, whole = self.params, len(history) + len(tree)
        wanted = ((params.repetition_penalty, whole), (params.penalty, params.penalty_window))
        return [(theta, self._recent(tree, history, window)) for theta, window in wanted if theta != 1]

    def _recent(self, tree: DraftTree, history: History, window: int) -> list[IntArray]:
        committed = history.tokens[-window:]
        if window >= len(history) + len(tree):  # no token leaves it on the way
            committed = np.unique(committed)
        paths = [tree.tokens[tree.path(node)[1:]] for node in range(len(tree))]
        return [np.unique(np.concatenate([committed, path])[-window:]) for path in paths]

    def _outside(self, tree: DraftTree, history: History, logits: torch.Tensor) -> torch.Tensor:
        """[len(tree), vocab] whether the grammar excludes a token behind a node, on the device of the logits."""
        assert self.grammar is not None
        masks = []
        for node in range(len(tree)):
            with history.guesses():
                history.extend(tree.tokens[tree.path(node)[1:]].tolist())
                masks.append(self.grammar.mask(history).view(np.uint8))
        bits = on_device(np.stack(masks), logits.device)[:, :, None] >> torch.arange(8, device=logits.device)
        return (bits & 1).flatten(1)[:, : logits.shape[1]] == 0

    def _chosen(
        self, logits: torch.Tensor, positions: IntArray, penalties: Penalties, outside: torch.Tensor | None
    ) -> Doubles:
        """[R, 3] highest logit, token, and the token's perturbed score, of rows [R, vocab]."""
        from tokenswift_py.kernels.triton.sampling import choose

        params, device = self.params, logits.device
        with torch.cuda.device_of(logits):  # where Triton launches
            allowed = logits if outside is None else logits.masked_fill(outside, -torch.inf)
            scores = self._changed(allowed, positions, penalties)
            at, floors = on_device(positions, device), self._floors(scores)
            tokens, tops = choose(scores, at, params.temperature, params.seed, params.stream, floors)
            rows = torch.stack([logits.amax(1).double(), tokens.double(), tops], 1)
            found: Doubles = rows.cpu().numpy()  # one transfer
        return found

    def _changed(self, logits: torch.Tensor, positions: IntArray, penalties: Penalties) -> torch.Tensor:
        """The logits after penalties, bias and bans: a copy in double, or themselves where there are none."""
        early = np.flatnonzero([position < self.may_end_from(position) for position in positions.tolist()])
        ends = len(early) and len(self._eos)
        if not penalties and not len(self._bias_ids) and not len(self._ban) and not ends:
            return logits
        scores = logits.to(torch.float64, copy=True)

        def there(values: np.ndarray) -> torch.Tensor:
            return on_device(values, scores.device)

        for theta, recent in penalties:
            rows = np.repeat(np.arange(len(recent)), [len(tokens) for tokens in recent])
            at = tuple(there(np.stack([rows, np.concatenate(recent)]).astype(np.int64)).unbind())
            values = scores[at]
            scores[at] = torch.where(values > 0, divided(values, theta), values * theta)
        if len(self._bias_ids):
            scores[:, there(self._bias_ids)] += there(self._bias)
        if len(self._ban):
            scores[:, there(self._ban)] = -torch.inf
        if ends:
            scores[there(early)[:, None], there(self._eos)] = -torch.inf
        return scores

    def _floors(self, scores: torch.Tensor) -> torch.Tensor:
        """[R] what scores / T must reach by top-k and min-p."""
        params = self.params
        floors = torch.full((len(scores),), -torch.inf, dtype=torch.float64, device=scores.device)
        if params.temperature == 0:
            return floors
        if 0 < params.top_k < scores.shape[1]:
            last = torch.topk(scores, params.top_k).values[:, -1].double()
            floors = torch.maximum(floors, divided(last, params.temperature))
        if params.min_p > 0:
            floors = torch.maximum(floors, divided(scores.amax(1).double(), params.temperature) + self._log_min_p)
        return floors


def checked(found: Doubles, position: int) -> int:
    """The token of a row, or NumericsError."""
    highest, token, score = found
    if not np.isfinite(highest):
        raise NumericsError(f"the model's logits for position {position} are not finite")
    if not np.isfinite(score):
        raise NumericsError(f"no token is left to choose from at position {position}")
    return int(token)


PENDING = DraftTree.chain([0])  # a single row, whose token does not matter


def divided(values: torch.Tensor, by: float) -> torch.Tensor:
    """values / by, rounded once: on a GPU torch multiplies by the reciprocal of a plain number."""
    return values / values.new_full((1,), by)
