"""The sampler on the GPU: the rules of `sampling.Sampler`, token for token.

For each row of logits the host gets the highest one, and the best tokens with their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.core import DraftTree, IntArray
from tokenswift_py.decoding.history import History
from tokenswift_py.kernels.base import on_device
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.device_chain import DeviceChain
from tokenswift_py.sampling.device_text import LONGEST_PATH, DeviceText, Placed, Texts, ends_of, paths_of, uploaded
from tokenswift_py.sampling.penalties import DRY_LONGEST, LONGEST_TEXT, finished_words
from tokenswift_py.sampling.processors import LARGEST
from tokenswift_py.sampling.reference import Doubles, NumericsError, Sampler

Ranked = list[tuple[int, float]]
Masks = npt.NDArray[np.uint8]
MOST_RANKED = 64  # the reference makes longer rankings
PENDING = DraftTree.chain([0])  # a single row, whose token does not matter


class TritonSampler(Sampler):
    """All rows of a tree at once, which the host waits for once. Hugging Face's processors go the way of the
    reference."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._placed: dict[torch.device, Placed] = {}
        self._chain: DeviceChain | None = None

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

    def chain(self, history: History, count: int, device: torch.device) -> DeviceChain | None:
        """Returns what ranks the tokens of a chain on the device. The host is needed for processors, a grammar, banned
        words, ends of the text before their time, and rankings or n-grams that are too long."""
        params, at = self.params, len(history)
        asks = not self.exact or self.grammar is not None or len(params.ban_words) > 0
        early = len(self._eos) > 0 and at < self.may_end_from(at)
        if asks or early or count > MOST_RANKED or params.no_repeat_ngram_size > LONGEST_PATH:
            return None
        placed = self._on(device)
        base = placed.text.follow(history.tokens, self._forced, False) if placed.looks else 0
        if self._chain is None or not self._chain.serves(placed, count):
            self._chain = DeviceChain(self, placed, count)
        self._chain.begin(history, base)
        return self._chain

    def _ranker(
        self, tree: DraftTree, logits: torch.Tensor, history: History, count: int, settled: bool
    ) -> Callable[[int], Ranked]:
        """Makes a ranker. settled: whether the history is committed up to the tree's root."""
        positions = len(history) + tree.depth
        masks, refused = self._masks(tree, history)
        with torch.cuda.device_of(logits):  # Triton launches there
            placed = self._on(logits.device)
            texts = self._texts(placed, tree, history, positions, masks, logits, settled)
            found = self.found(placed, logits.detach(), texts, count)
            read: Doubles = found.cpu().numpy()  # this is the only wait for the device
        return lambda node: self.read(read[node], int(positions[node]), refused.get(node))

    def read(self, found: Doubles, position: int, refused: NumericsError | None = None) -> Ranked:
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

    def found(self, placed: Placed, logits: torch.Tensor, texts: Texts, count: int) -> torch.Tensor:
        """Returns [rows, 1 + 2 count] fp64 on the device: the highest logit, the best tokens, and their scores."""
        from tokenswift_py.kernels.triton.sampling import best
        from tokenswift_py.kernels.triton.scores import scores_of

        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        scores, tops, highest = scores_of(logits, placed.rules, texts.rows, self._marks(placed, logits, texts))
        top = tops.amax(1)
        floors = None if placed.key is None else self._floors(scores, top, placed)
        if self.params.shaped:
            scores, floors = self._shaped(scores, top, floors, texts.acting > 0, placed), None
        return best(scores, texts.rows.lengths, placed.key, floors, count, highest)

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
            window=min(params.penalty_window, LONGEST_TEXT),
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
    ) -> Texts:
        """Brings the texts of a tree's rows to the device."""
        from tokenswift_py.kernels.triton.scores import Rows

        text, base, before = placed.text, 0, history.tokens[:0]
        if placed.looks:
            base = text.follow(history.tokens, self._forced, settled)
            before = history.tokens[base:]
        unbroken, ends = self.ends(history, tree)
        out = self._excluded(history, tree, positions)
        paths = paths_of(tree, before) if placed.looks else np.zeros((len(tree), 0), np.int32)
        lengths, base_there, paths_there, unbroken_there, ends_there, acting, out_there = uploaded(
            [positions, np.array([base], np.int32), paths, unbroken, ends, self.acting(positions), out], logits.device
        )
        rows = Rows(text.tokens, text.last, text.written, base_there, base + paths.shape[1], lengths, paths_there)
        return Texts(
            rows, unbroken_there, ends_there, acting, out_there if out.size else None,
            None if masks is None else outside(masks, logits),
        )  # fmt: skip

    def ends(self, history: History, tree: DraftTree = PENDING) -> tuple[IntArray, IntArray]:
        """Returns the ends of the texts of a tree's rows, as `Texts` has them."""
        dry, ngram = DRY_LONGEST * (self.params.dry_multiplier > 0), self.params.no_repeat_ngram_size
        ngram = min(ngram, max(LONGEST_PATH, len(history) + len(tree) + 1))  # no text repeats more than itself
        ends = ends_of(history.tokens, tree, max(dry, ngram))
        broken = np.isin(ends[:, :dry], self._breakers).cumsum(1) > 0
        return np.where(broken, -2, ends[:, :dry]).astype(np.int32), ends[:, : max(ngram - 1, 0)]

    def _marks(self, placed: Placed, logits: torch.Tensor, texts: Texts) -> torch.Tensor | None:
        """Returns [rows, vocab] int32 marks of repeats and of what is excluded; None where no rule makes any."""
        from tokenswift_py.kernels.triton.scores import OUT, mark_repeats

        params, dry, out = self.params, self.params.dry_multiplier > 0, texts.out
        if not (dry or params.no_repeat_ngram_size or out is not None or texts.outside is not None):
            return None
        marks = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        if dry:
            window = min(params.dry_window or LONGEST_TEXT, LONGEST_TEXT)
            mark_repeats(marks, texts.rows, texts.unbroken, params.dry_length, window, exclude=False)
            marks.index_fill_(1, placed.breakers, 0)
        if params.no_repeat_ngram_size:
            mark_repeats(marks, texts.rows, texts.ends, texts.ends.shape[1], LONGEST_TEXT, exclude=True)
        if out is not None:
            marks.index_put_(tuple(out.long().unbind()), marks.new_full((), OUT.value))
        if texts.outside is not None:
            marks.masked_fill_(texts.outside, OUT.value)
        return marks

    def acting(self, positions: IntArray) -> IntArray:
        """Returns [rows] 1 where XTC acts on the choice at a position."""
        params, probability = self.params, self.params.xtc_probability
        coins = [
            noise.coin(params.seed, at, params.stream, noise.XTC_DOMAIN) for at in positions.tolist() if probability
        ]
        return np.array([coin < probability for coin in coins], np.int32)

    def _excluded(self, history: History, tree: DraftTree, positions: IntArray) -> IntArray:
        """Returns [2, n] rows and the tokens that they may not choose: the last ones of words, and ends of the text
        before their time."""
        found, words = [], self.params.ban_words
        ends = ends_of(history.tokens, tree, max((len(word) for word in words), default=0))
        for row, position in enumerate(positions.tolist()):
            tokens = self._eos.tolist() if position < self.may_end_from(position) else []
            if words:
                tokens = tokens + finished_words(ends[row][ends[row] >= 0][::-1], words)
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
