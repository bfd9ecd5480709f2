"""A row of logits becomes a token: argmax(processed logits / T + Gumbel(seed, position, token)) (law 2).

The same rule chooses tokens of plain decoding, verified tokens and a draft's own guesses, so the output depends on
the logits, the parameters and the seed, never on the drafter or the shape of a tree.

This class is the reference. `NativeSampler` and `TritonSampler` choose the same tokens. All three keep these rules:
 1. Every number is a double, each operation rounded once; a logit of fewer bits is converted first, and one below the
    smallest normal number counts as what it is.
 2. A logit of -inf excludes its token. A row with a NaN or +inf in it, or of -inf alone, is a `NumericsError`, whatever
    is banned; so is a row of which bans or processors leave nothing.
 3. A grammar excludes tokens. Repetition penalty, contextual penalty, frequency, presence, DRY, bias, bans (tokens,
    n-grams, words, ends), then processors follow, in this order. -0 is 0: multiplied by a penalty, as what is not
    positive. Repetition penalty, n-grams and words see the whole text, prompt and forced turns too; frequency and
    presence the model's own tokens alone.
 4. A temperature below 1e-5 is greedy (`core.GREEDY_BELOW`, where parameters are made): the largest processed logit.
 5. Otherwise processed logits are divided by the temperature. top-n-sigma, top-k, top-p and min-p, in this order, each
    set a floor, under which tokens are out. A token whose quotient equals the floor stays, so that ties stay or go
    together: top-k keeps more than k where several are equal to the k-th.
 6. Typical-p leaves out more, and then XTC, where the coin of the position says so; each takes what is left for all
    there is. Ties stay or go together here too.
 7. Noise is added to what stays, and the largest sum wins. -0 and 0 are equal; of equals the lowest id wins.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenswift_py.core import Chooser, DraftTree, IntArray, SamplingParams
from tokenswift_py.decoding.history import History
from tokenswift_py.errors import NumericsError as NumericsError
from tokenswift_py.errors import check
from tokenswift_py.sampling import noise
from tokenswift_py.sampling.filters import NEGLIGIBLE, nucleus_floor, sigma_floor, typical_excess, xtc_ceiling
from tokenswift_py.sampling.grammar import Follower
from tokenswift_py.sampling.penalties import (
    contextual_penalty,
    count_penalty,
    dry_penalty,
    dry_powers,
    finished_words,
    repeated_ngrams,
)
from tokenswift_py.sampling.processors import LARGEST, apply_processors, is_pure

Doubles = npt.NDArray[np.float64]


class Sampler:
    """Chooses tokens by one set of parameters.

    eos, first_end: the ids in `eos` are not written before absolute position `first_end` (min_new_tokens).
    chapter_tokens: number of tokens that a chapter must have before these ids are written.
    processors:     Hugging Face `LogitsProcessor`s. They are called with ([1, n] token ids, [1, vocab_size] scores)
                    after the penalties and before the temperature, once for each token of the text, in its order
                    (processors.py).
    grammar:        the grammar of the text; set before the first choice. It follows the history, so drafters share it.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        eos: Sequence[int] = (),
        first_end: int = 0,
        processors: Sequence[Any] = (),
        chapter_tokens: int = 0,
    ):
        for name, ids in (
            ("ban", params.ban),
            ("logit_bias", params.logit_bias),
            ("dry_breakers", params.dry_breakers),
            ("ban_words", [token for word in params.ban_words for token in word]),
        ):
            for token in ids:
                check(0 <= token < vocab_size, name, token, f"token ids are 0 to {vocab_size - 1}")
        self.params = params
        self.vocab_size = vocab_size
        self.first_end = first_end
        self.chapter_tokens = chapter_tokens
        self._chapters: list[int] = []
        self.grammar: Follower | None = None
        self._forced: list[tuple[int, int]] = []  # [start, stop) of forced tokens, the prompt first
        self.processors = tuple(processors)
        self._eos = np.array(sorted(token for token in eos if 0 <= token < vocab_size), np.int64)
        self._ban = np.array(params.ban, np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float64)
        self._powers = dry_powers(params.dry_multiplier, params.dry_base)
        self._breakers = np.array(params.dry_breakers, np.int32)
        self._log_min_p = float(noise.log(params.min_p)) if params.min_p > 0 else -np.inf

    @property
    def stateful(self) -> bool:
        """Returns whether a processor may depend on earlier calls of it."""
        return not all(is_pure(processor) for processor in self.processors)

    def guessing(self) -> Sampler:
        """Returns the sampler that drafters guess with: this one, but for the processors that may only be called for
        the text's own tokens. Chapters that begin here begin there."""
        if not self.stateful:
            return self
        guesser = copy.copy(self)
        guesser.processors = tuple(processor for processor in self.processors if is_pure(processor))
        return guesser

    def begin_chapter(self, position: int, forced: int = 0) -> None:
        """Begins a chapter, whose own text begins at absolute `position`, after those of the chapters before it. The
        `forced` tokens before it were put there: the prompt, or a turn."""
        self._chapters.append(position)
        if self.grammar is not None:
            self.grammar.begin_chapter(position)
        self._forced.append((position - forced, position))

    def written(self, tokens: IntArray) -> IntArray:
        """Returns the tokens of the text that the model chose."""
        starts = [0, *(stop for _, stop in self._forced)]
        stops = [*(start for start, _ in self._forced), len(tokens)]
        parts = [tokens[start:stop] for start, stop in zip(starts, stops, strict=True) if start < stop]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts])

    def may_end_from(self, position: int) -> int:
        """Returns the position from which on the chapter that `position` lies in may end."""
        chapter = bisect_right(self._chapters, position)
        begun = self._chapters[chapter - 1] + self.chapter_tokens if chapter else 0
        return max(self.first_end, begun)

    def forced(self, history: History) -> int | None:
        """Returns the only token that the grammar allows at position len(history), if there is but one. It will be
        chosen, unless nothing can be."""
        return None if self.grammar is None else self.grammar.forced(history)

    def choose(self, logits: torch.Tensor, history: History) -> int:
        """Chooses the token at position len(history). logits: [vocab_size]. Raises NumericsError with the position."""
        return self.rank(logits, history, 1)[0]

    def chooser(self, tree: DraftTree, logits: torch.Tensor, history: History) -> Callable[[int], int]:
        """Returns a function that chooses the token after a node of the tree, once the history holds the tokens on the
        way there.

        logits: [len(tree), vocab_size]. history: its last token is the tree's root. Raises the errors of `choose`.
        """
        return lambda node: self.choose(logits[node], history)

    def ranker(
        self, tree: DraftTree, logits: torch.Tensor, history: History, count: int
    ) -> Callable[[int], list[tuple[int, float]]]:
        """Returns what ranks the tokens after a node of the tree, as `ranked` does, once the history holds the tokens
        on the way there. All nodes are computed at once where that is cheaper. Raises for a node that is asked for."""
        return lambda node: self.ranked(logits[node], history, count)

    def chain(self, history: History, count: int, device: torch.device) -> Chooser | None:
        """Returns what ranks the tokens of a chain after this text where their logits lie, up to MOST_LINKS of them.
        None where the host is needed between one and the next."""
        return None

    def rank(self, logits: torch.Tensor, history: History, count: int) -> list[int]:
        """Returns up to `count` tokens, best perturbed score first; the first is what `choose` returns."""
        return [token for token, _ in self.ranked(logits, history, count)]

    def ranked(self, logits: torch.Tensor, history: History, count: int) -> list[tuple[int, float]]:
        """Returns the tokens of `rank`, each with its perturbed score (greedy: with its processed logit)."""
        return self.ranked_scores(self.process(logits, history), len(history), count)

    def ranked_scores(self, scores: Doubles, position: int, count: int) -> list[tuple[int, float]]:
        """Returns the same for processed logits: [vocab_size]."""
        if self.params.temperature == 0:
            return best(scores, np.arange(len(scores)), min(count, int((scores > -np.inf).sum()) if count > 1 else 1))
        scores = self.divided(scores)
        tokens = self.candidates(scores, count, position)
        perturbed = scores[tokens] + noise.gumbel(self.params.seed, position, tokens, self.params.stream)
        return best(perturbed, tokens, count)

    def process(self, logits: torch.Tensor, history: History) -> Doubles:
        """Returns [vocab_size] logits after penalties, bias, bans and processors, in double."""
        params = self.params
        scores = logits.detach().to("cpu", torch.float64, copy=True).numpy()
        if not -np.inf < scores.max() <= LARGEST:
            raise NumericsError(f"the model's logits for position {len(history)} are not finite")
        if self.grammar is not None:
            scores[self.grammar.outside(history)] = -np.inf
        if params.repetition_penalty != 1:
            contextual_penalty(scores, history.tokens, params.repetition_penalty, len(history) + 1)
        if params.penalty != 1:
            contextual_penalty(scores, history.tokens, params.penalty, params.penalty_window)
        if params.frequency_penalty or params.presence_penalty:
            count_penalty(scores, self.written(history.tokens), params.frequency_penalty, params.presence_penalty)
        if params.dry_multiplier > 0:
            dry_penalty(scores, history.tokens, params.dry_length, self._powers, self._breakers, params.dry_window)
        scores[self._bias_ids] += self._bias
        scores[self._ban] = -np.inf
        if params.no_repeat_ngram_size:
            scores[repeated_ngrams(history.tokens, params.no_repeat_ngram_size)] = -np.inf
        if params.ban_words:
            scores[finished_words(history.tokens, params.ban_words)] = -np.inf
        if len(history) < self.may_end_from(len(history)):
            scores[self._eos] = -np.inf
        if scores.max() == -np.inf:
            beside = " beside what the grammar excludes" if self.grammar is not None else ""
            raise NumericsError(f"no token is left to choose from at position {len(history)}{beside}")
        return apply_processors(self.processors, history.tokens, scores)

    def divided(self, scores: Doubles) -> Doubles:
        """Returns scores / T. A processor's lowest number of all, divided, is -inf."""
        with np.errstate(over="ignore"):
            return np.asarray(scores / self.params.temperature)

    def floor(self, scores: Doubles) -> float:
        """Returns the least score that survives top-n-sigma, top-k, top-p and min-p. scores: [vocab_size], divided by
        the temperature."""
        params, top = self.params, scores.max()
        floor = sigma_floor(scores, params.top_n_sigma) if params.top_n_sigma > 0 else -np.inf
        if 0 < params.top_k < len(scores):
            floor = max(floor, np.partition(scores, -params.top_k)[-params.top_k])
        if params.top_p < 1:
            massive = scores[scores >= max(floor, top + NEGLIGIBLE)]
            floor = max(floor, nucleus_floor(massive, params.top_p))
        return float(max(floor, top + self._log_min_p))

    def excess(self, scores: Doubles, floor: float, position: int) -> Doubles:
        """Returns [vocab_size] how far a score is outside of the range that survives every filter, at most 0 inside.
        floor: the floor of the filters that set one."""
        params, outside, live = self.params, np.full(len(scores), np.inf), scores > -np.inf
        outside[live] = floor - scores[live]
        kept = np.flatnonzero(outside <= 0)
        beyond = np.zeros(len(kept))
        if params.typical_p < 1:
            beyond = typical_excess(scores[kept], params.typical_p)
            outside[kept] = np.maximum(outside[kept], beyond)
            kept = kept[beyond <= 0]
        if noise.coin(params.seed, position, params.stream, noise.XTC_DOMAIN) < params.xtc_probability:
            outside[kept] = np.maximum(outside[kept], scores[kept] - xtc_ceiling(scores[kept], params.xtc_threshold))
        return np.asarray(outside)

    def judge(self, logits: torch.Tensor, history: History, token: int) -> tuple[int, float, float]:
        """Returns the choice, and how far `token` is from it (see `behind`). Processors are called once."""
        if not self.processors:
            choice = self.choose(logits, history)
            return (choice, 0.0, 0.0) if choice == token else (choice, *self.behind(logits, history, token))
        scores = self.process(logits, history)
        return self.ranked_scores(scores, len(history), 1)[0][0], *self.trailing(scores, len(history), token)

    def behind(self, logits: torch.Tensor, history: History, token: int) -> tuple[float, float]:
        """Returns how far `token` is from being the choice: its margin and its slack, both 0 for the choice itself.

        margin: the choice's perturbed score minus the token's (greedy: processed logits).
        slack:  the least error of scores, divided by the temperature, that makes the token the choice. It lifts the
                token over the floor of top-k, top-p and min-p, and every other token of a better perturbed score below
                either that floor or the token. The floor itself is taken as it is, and so are the edges of typical-p
                and XTC, beyond which no other token is taken.
        """
        return self.trailing(self.process(logits, history), len(history), token)

    def trailing(self, scores: Doubles, position: int, token: int) -> tuple[float, float]:
        """Returns the same for processed logits: [vocab_size]."""
        perturbed, floor = scores, -np.inf
        if self.params.temperature > 0:
            scores = self.divided(scores)
            floor = self.floor(scores)
            tokens = np.arange(len(scores))
            perturbed = scores + noise.gumbel(self.params.seed, position, tokens, self.params.stream)
            if self.params.shaped:
                excess = self.excess(scores, floor, position)
                lead = perturbed[excess <= 0] - perturbed[token]
                return float(lead.max()), float(max(lead.max(), excess[token]))
        allowed = scores >= max(floor, np.finfo(np.float64).min)
        lead = perturbed[allowed] - perturbed[token]
        slack = np.minimum(lead, scores[allowed] - floor).max()
        short = floor - scores[token] if floor > -np.inf else 0.0
        return float(lead.max()), float(max(slack, short))

    def candidates(self, scores: Doubles, count: int = 1, position: int = 0) -> npt.NDArray[np.int64]:
        """Returns the tokens that survive the filters, ascending.

        scores: [vocab_size], divided by the temperature. Tokens that the noise cannot lift among the first `count` are
                left out. Tokens of equal score stay or go together, so no order of summation matters.
        """
        floor = self.floor(scores)
        if self.params.shaped:
            scores, floor = np.where(self.excess(scores, floor, position) <= 0, scores, -np.inf), -np.inf
        top = scores.max()
        reach = top if count == 1 else np.partition(scores, -min(count, len(scores)))[-min(count, len(scores))]
        hopeless = reach - (noise.HIGHEST - noise.LOWEST) - 1e-6
        return np.flatnonzero((scores >= floor) & (scores >= hopeless) & (scores > -np.inf))


def best(scores: Doubles, tokens: npt.NDArray[np.int64], count: int) -> list[tuple[int, float]]:
    """Returns the `count` tokens of highest score, with it; of equals the lowest id. tokens: [n] ascending."""
    if count == 1:
        place = scores.argmax()
        return [(int(tokens[place]), float(scores[place]))]
    if count < len(scores):
        edge = np.partition(scores, -count)[-count]
        keep = np.flatnonzero(scores >= edge)
        scores, tokens = scores[keep], tokens[keep]
    order = np.lexsort((tokens, -scores))[:count]
    return [(int(tokens[place]), float(scores[place])) for place in order]


def log_probability(logits: torch.Tensor, token: int) -> float:
    """Returns the natural log of the model's own probability of a token, before penalties and temperature. logits:
    [vocab]."""
    return float(torch.log_softmax(logits.double(), -1)[token])


def likeliest(logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Returns the `count` tokens of highest probability with its natural log, of equals the lowest id first."""
    values = torch.log_softmax(logits.double(), -1).cpu().numpy()
    return tuple(best(values, np.arange(len(values)), min(count, len(values)))) if count else ()
