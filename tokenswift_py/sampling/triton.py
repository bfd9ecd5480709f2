"""The sampler on the GPU: the rules of `sampling.Sampler`, token for token.

For each row of logits the host gets the highest one, and the best tokens with their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.core import DraftTree, IntArray, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import on_device
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.device_text import DeviceText, ends_of, paths_of, uploaded
from tokenswift_py.sampling.penalties import DRY_LONGEST, finished_words
from tokenswift_py.sampling.processors import LARGEST
from tokenswift_py.sampling.reference import Doubles, NumericsError, Sampler

if TYPE_CHECKING:
    from tokenswift_py.kernels.triton.scores import Rows, Rules

Ranked = list[tuple[int, float]]
Masks = npt.NDArray[np.uint8]
MOST_RANKED = 64  # the reference makes longer rankings


@dataclass
class Placed:
    """Values that stay on a device.

    key: the noise's key. top_p: [1] fp64. shape: [3] fp64, top_n_sigma, typical_p and xtc_threshold. breakers: [n]
    int64, of DRY.
    """

    params: SamplingParams
    rules: Rules
    key: torch.Tensor | None
    top_p: torch.Tensor
    shape: torch.Tensor
    breakers: torch.Tensor
    text: DeviceText = field(repr=False)


class TritonSampler(Sampler):
    """All rows of a tree at once, which the host waits for once. Hugging Face's processors go the way of the
    reference."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._placed: dict[torch.device, Placed] = {}

    @property
    def exact(self) -> bool:
        """Says whether the device knows all of the rules that are asked for."""
        return not self.processors

    def ranked(self, logits: torch.Tensor, history: History, count: int) -> Ranked:
        if not self.exact or count > MOST_RANKED:
            return super().ranked(logits, history, count)
        return self._ranker(PENDING, logits[None], history, count, False)(0)

    def ranker(self, tree: DraftTree, logits: torch.Tensor, history: History, count: int) -> Callable[[int], Ranked]:
        if not self.exact or count > MOST_RANKED:
            return super().ranker(tree, logits, history, count)
        return self._ranker(tree, logits, history, count, False)

    def chooser(self, tree: DraftTree, logits: torch.Tensor, history: History) -> Callable[[int], int]:
        if not self.exact:
            return super().chooser(tree, logits, history)
        ranker = self._ranker(tree, logits, history, 1, True)
        return lambda node: ranker(node)[0][0]

    def _ranker(
        self, tree: DraftTree, logits: torch.Tensor, history: History, count: int, settled: bool
    ) -> Callable[[int], Ranked]:
        """Makes a ranker. settled: whether the history is committed up to the tree's root."""
        positions = len(history) + tree.depth
        masks, refused = self._masks(tree, history)
        with torch.cuda.device_of(logits):  # Triton launches there
            found = self._found(tree, logits.detach(), history, positions, masks, count, settled)
            read: Doubles = found.cpu().numpy()  # this is the only wait for the device
        return lambda node: self._read(read[node], int(positions[node]), refused.get(node))

    def _read(self, found: Doubles, position: int, refused: NumericsError | None) -> Ranked:
        """Returns the ranking of a row, or raises NumericsError. found: [1 + 2 count], as the kernels leave it."""
        count = len(found) // 2
        highest, tokens, scores = found[0], found[1 : 1 + count], found[1 + count :]
        if not -np.inf < highest <= LARGEST:
            raise NumericsError(f"the model's logits for position {position} are not finite")
        if refused is not None:
            raise refused
        if not scores[0] > -np.inf:
            beside = " beside what the grammar excludes" if self.grammar is not None else ""
            raise NumericsError(f"no token is left to choose from at position {position}{beside}")
        left = int((scores > -np.inf).sum())
        return list(zip(tokens[:left].astype(int).tolist(), scores[:left].tolist(), strict=True))

    def _found(
        self,
        tree: DraftTree,
        logits: torch.Tensor,
        history: History,
        positions: IntArray,
        masks: Masks | None,
        count: int,
        settled: bool,
    ) -> torch.Tensor:
        """Returns [rows, 1 + 2 count] fp64 on the device: the highest logit, the best tokens, and their scores."""
        from tokenswift_py.kernels.triton.sampling import best
        from tokenswift_py.kernels.triton.scores import scores_of

        placed = self._on(logits.device)
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        rows, marks, acting = self._texts(placed, tree, history, positions, masks, logits, settled)
        scores, tops, highest = scores_of(logits, placed.rules, rows, marks)
        top = tops.amax(1)
        floors = None if placed.key is None else self._floors(scores, top, placed)
        if self.params.shaped:
            scores, floors = self._shaped(scores, top, floors, acting > 0, placed), None
        return best(scores, rows.lengths, placed.key, floors, count, highest)

    def _floors(self, scores: torch.Tensor, tops: torch.Tensor, placed: Placed) -> torch.Tensor | None:
        """Returns [rows] the floors that top-n-sigma, top-k, top-p and min-p set."""
        from tokenswift_py.kernels.triton.nucleus import nucleus_floors
        from tokenswift_py.kernels.triton.shapes import sigma_floors

        params, floors = self.params, None
        if params.top_n_sigma > 0:
            floors = sigma_floors(scores, tops, placed.shape[0])
        if 0 < params.top_k < scores.shape[1]:
            least = torch.topk(scores, params.top_k, sorted=False).values.amin(1)
            floors = least if floors is None else torch.maximum(floors, least)
        if params.top_p < 1:
            floors = nucleus_floors(scores, tops, placed.top_p, floors)
        if params.min_p > 0:
            least = tops + self._log_min_p
            floors = least if floors is None else torch.maximum(floors, least)
        return floors

    def _shaped(
        self,
        scores: torch.Tensor,
        tops: torch.Tensor,
        floors: torch.Tensor | None,
        acting: torch.Tensor,
        placed: Placed,
    ) -> torch.Tensor:
        """Returns the scores of the tokens that floors, typical-p and XTC leave, -inf for the others. acting: [rows]
        whether XTC acts."""
        from tokenswift_py.kernels.triton.shapes import ceilings, typical

        floors = torch.full_like(tops, -torch.inf) if floors is None else floors
        kept = scores >= floors[:, None]
        if self.params.typical_p < 1:
            kept &= typical(scores, tops, floors, placed.shape[1])
        scores = torch.where(kept, scores, -torch.inf)
        if self.params.xtc_probability > 0:
            most = torch.where(acting, ceilings(scores, placed.shape[2]), torch.inf)
            scores = torch.where(scores <= most[:, None], scores, -torch.inf)
        return scores

    def _on(self, device: torch.device) -> Placed:
        """Returns the values that stay on the device for all rounds."""
        placed = self._placed.get(device)
        if placed is None or placed.params is not self.params:
            placed = self._placed[device] = self._place(device)
        return placed

    def _place(self, device: torch.device) -> Placed:
        from tokenswift_py.kernels.triton.sampling import noise_key
        from tokenswift_py.kernels.triton.scores import Rules

        def there(*values: float) -> torch.Tensor:
            return on_device(np.array(values, np.float64), device)

        params, bias = self.params, None
        if len(self._bias_ids) or len(self._ban):
            row = np.zeros(self.vocab_size)
            row[self._bias_ids] = self._bias
            row[self._ban] = -np.inf
            bias = on_device(row, device)
        greedy = params.temperature == 0
        rules = Rules(
            there(
                params.temperature, params.repetition_penalty, params.penalty, params.frequency_penalty,
                params.presence_penalty,
            ),
            window=min(params.penalty_window, 2**31 - 1),
            seen=params.repetition_penalty != 1 or params.penalty != 1,
            counted=bool(params.frequency_penalty or params.presence_penalty),
            powers=on_device(self._powers, device),
            shortest=params.dry_length,
            bias=bias,
            greedy=greedy,
        )  # fmt: skip
        key = None if greedy else noise_key(params.seed, params.stream, device)
        breakers = on_device(self._breakers.astype(np.int64), device)
        shape = there(params.top_n_sigma, params.typical_p, params.xtc_threshold)
        text = DeviceText(self.vocab_size, device)
        return Placed(params, rules, key, there(params.top_p), shape, breakers, text)

    def _texts(
        self,
        placed: Placed,
        tree: DraftTree,
        history: History,
        positions: IntArray,
        masks: Masks | None,
        logits: torch.Tensor,
        settled: bool,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor]:
        """Returns the rows' texts on the device, and marks of repeats and of what is excluded, None where there are
        none of them; and [rows] 1 where XTC acts."""
        from tokenswift_py.kernels.triton.scores import OUT, Rows, mark_repeats

        params, text, base, before = self.params, placed.text, 0, history.tokens[:0]
        dry, ngram = params.dry_multiplier > 0, min(params.no_repeat_ngram_size, len(history) + len(tree) + 1)
        looked_at = dry or ngram or placed.rules.seen or placed.rules.counted
        if looked_at:
            base = text.follow(history.tokens, self._forced, settled)
            before = history.tokens[base:]
        words = max((len(word) for word in params.ban_words), default=0)
        ends = ends_of(history.tokens, tree, max(DRY_LONGEST * dry, ngram, words))
        unbroken = ends[:, : DRY_LONGEST * dry]
        unbroken = np.where(np.isin(unbroken, self._breakers).cumsum(1) > 0, -2, unbroken)
        out = self._excluded(ends, positions)
        paths = paths_of(tree, before) if looked_at else np.zeros((len(tree), 0), np.int32)
        lengths, paths_there, unbroken_there, ends_there, out_there, acting = uploaded(
            [positions, paths, unbroken.astype(np.int32), ends[:, : max(ngram - 1, 0)], out, self._acting(positions)],
            logits.device,
        )
        rows = Rows(text.tokens, text.last, text.written, base, lengths, paths_there)
        if not (dry or ngram or out.size or masks is not None):
            return rows, None, acting
        marks = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        if dry:
            mark_repeats(marks, rows, unbroken_there, params.dry_length, exclude=False)
            marks.index_fill_(1, placed.breakers, 0)
        if ngram:
            mark_repeats(marks, rows, ends_there, ngram - 1, exclude=True)
        if out.size:
            marks.index_put_(tuple(out_there.long().unbind()), marks.new_full((), OUT.value))
        if masks is not None:
            marks.masked_fill_(outside(masks, logits), OUT.value)
        return rows, marks, acting

    def _acting(self, positions: IntArray) -> IntArray:
        """Returns [rows] 1 where XTC acts on the choice at a position."""
        params, probability = self.params, self.params.xtc_probability
        coins = [
            noise.coin(params.seed, at, params.stream, noise.XTC_DOMAIN) for at in positions.tolist() if probability
        ]
        return np.array([coin < probability for coin in coins], np.int32)

    def _excluded(self, ends: IntArray, positions: IntArray) -> IntArray:
        """Returns [2, n] rows and the tokens that they may not choose: the last ones of words, and ends of the text
        before their time. ends: see `ends_of`."""
        found = []
        for row, position in enumerate(positions.tolist()):
            tokens = self._eos.tolist() if position < self.may_end_from(position) else []
            if self.params.ban_words:
                tokens = tokens + finished_words(ends[row][ends[row] >= 0][::-1], self.params.ban_words)
            found += [(row, token) for token in tokens]
        pairs: IntArray = np.array(found, np.int32).reshape(-1, 2).T
        return pairs

    def _masks(self, tree: DraftTree, history: History) -> tuple[Masks | None, dict[int, NumericsError]]:
        """Returns [rows, bytes] bits of the tokens that the grammar allows after each node, None without a grammar;
        and why some nodes cannot be followed to."""
        if self.grammar is None:
            return None, {}
        masks: list[Masks] = []
        refused: dict[int, NumericsError] = {}
        for node in range(len(tree)):
            with history.guesses():
                history.extend(tree.tokens[tree.path(node)[1:]].tolist())
                try:
                    masks.append(self.grammar.mask(history).view(np.uint8))
                except NumericsError as error:
                    refused[node] = error
                    masks.append(np.zeros_like(self.grammar.grammar.vocabulary.ends).view(np.uint8))
        return np.stack(masks), refused


def outside(masks: Masks, logits: torch.Tensor) -> torch.Tensor:
    """Returns [rows, vocab] whether a token is excluded, on the device of the logits. masks: bits of those allowed."""
    bits = on_device(masks, logits.device)[:, :, None] >> torch.arange(8, device=logits.device)
    return (bits & 1).flatten(1)[:, : logits.shape[1]] == 0


PENDING = DraftTree.chain([0])  # a single row, whose token does not matter
