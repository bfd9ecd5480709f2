"""Turns logits into scores on the GPU: penalties, repeats, biases and bans, then the temperature, for all nodes of a
tree.

A row's text is the committed one followed by the row's own path. The tokens of the committed text lie on the device,
and so does, for each token of the vocabulary, where it came last and how often the model wrote it. A path is short, so
a program looks through it for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import triton
import triton.language as tl
from tokenswift_py.kernels.triton.runtime import Variant, launch_options
from tokenswift_py.kernels.triton.sampling import BLOCK

LONGEST = tl.constexpr(64)  # tokens of a repeat that count
OUT = tl.constexpr(1 << 20)  # the mark of a token that is excluded


@dataclass(frozen=True)
class Rows:
    """The texts of R rows on the device.

    tokens:  [at least base] int32, the committed text.
    last:    [vocab] int32, a token's last position in it, -1 for none.
    written: [vocab] int32, how often the model wrote a token in it.
    base:    [1] int32, how many tokens the committed text has.
    longest: tokens of a row's text at most.
    lengths: [R] int32, tokens of each row's text, which is the position of the token to be chosen.
    paths:   [R, P] int32, the tokens of a row's text after the committed one; -1 after its end.
    """

    tokens: torch.Tensor
    last: torch.Tensor
    written: torch.Tensor
    base: torch.Tensor
    longest: int
    lengths: torch.Tensor
    paths: torch.Tensor


@dataclass(frozen=True)
class Rules:
    """The rules by which logits become scores. All of it lies on the device.

    numbers: [5] fp64: temperature, repetition penalty, contextual penalty, frequency, presence.
    window:  of the contextual penalty.
    seen, counted: whether there is a penalty of the first two, and of the last two.
    powers:  [LONGEST + 1] fp64, subtracted from a token that would make a repeat of `shortest` tokens longer. The index
             says by how much it would be longer.
    bias:    [vocab] fp64, added; -inf excludes a token. None is none.
    greedy:  scores are not divided by the temperature.
    """

    numbers: torch.Tensor
    window: int
    seen: bool
    counted: bool
    powers: torch.Tensor
    shortest: int
    bias: torch.Tensor | None
    greedy: bool


@triton.jit(do_not_specialize=["vocab", "blocks", "depth", "window", "shortest"])
def scores_kernel(
    logits: tl.tensor,  # [R, vocab] fp32 or fp64
    numbers: tl.tensor,
    committed: tl.tensor,  # [1] int32, how many tokens the committed text has
    lengths: tl.tensor,
    paths: tl.tensor,  # [R, depth]
    last: tl.tensor,
    written: tl.tensor,
    marks: tl.tensor,  # [R, vocab] int32
    powers: tl.tensor,
    bias: tl.tensor,
    scores: tl.tensor,  # [R, vocab] fp64
    highest: tl.tensor,  # [R, blocks] fp64
    tops: tl.tensor,  # [R, blocks] fp64
    vocab: tl.tensor,
    blocks: tl.tensor,
    depth: tl.tensor,
    window: tl.tensor,
    shortest: tl.tensor,
    SEEN: tl.constexpr,
    COUNTED: tl.constexpr,
    MARKED: tl.constexpr,
    BIASED: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Computes the scores of BLOCK tokens of a row, the best of them, and the highest logit, inf for a NaN."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < vocab
    place = row.to(tl.int64) * vocab + at
    value = tl.load(logits + place, mask=there, other=float("-inf")).to(tl.float64)
    tl.store(highest + row * blocks + tl.program_id(1), tl.max(tl.where(value == value, value, float("inf")), 0))
    if SEEN or COUNTED:
        base = tl.load(committed)
        latest = tl.load(last + at, mask=there, other=-1)
        count = tl.load(written + at, mask=there, other=0)
        for step in range(depth):
            same = tl.load(paths + row * depth + step) == at
            latest = tl.where(same, base + step, latest)
            count += same.to(tl.int32)
        if SEEN:
            repetition = tl.load(numbers + 1)
            changed = tl.where(value > 0, value / repetition, value * repetition)
            value = tl.where(latest >= 0, changed, value)
            contextual = tl.load(numbers + 2)
            changed = tl.where(value > 0, value / contextual, value * contextual)
            value = tl.where(latest >= tl.maximum(tl.load(lengths + row) - window, 0), changed, value)
        if COUNTED:
            value = value - tl.load(numbers + 3) * count.to(tl.float64)
            value = tl.where(count > 0, value - tl.load(numbers + 4), value)
    if MARKED:
        mark = tl.load(marks + place, mask=there, other=0)
        repeated = (mark > 0) & (mark <= LONGEST)
        value = value - tl.load(powers + (mark - shortest), mask=repeated, other=0.0)
        value = tl.where(mark > LONGEST, float("-inf"), value)
    if BIASED:
        value = value + tl.load(bias + at, mask=there, other=0.0)
    if not GREEDY:
        value = value / tl.load(numbers)
    value = tl.where(there, value, float("-inf"))
    tl.store(scores + place, value, mask=there)
    tl.store(tops + row * blocks + tl.program_id(1), tl.max(value, 0))


@triton.jit(do_not_specialize=["vocab", "depth", "width", "shortest", "window"])
def repeats_kernel(
    tokens: tl.tensor,
    committed: tl.tensor,  # [1] int32
    lengths: tl.tensor,
    paths: tl.tensor,  # [R, depth]
    suffixes: tl.tensor,  # [R, width] int32, the row's text from its end; a number that is no token ends it
    marks: tl.tensor,  # [R, vocab] int32
    vocab: tl.tensor,
    depth: tl.tensor,
    width: tl.tensor,
    shortest: tl.tensor,
    window: tl.tensor,  # latest tokens of the text that count
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Marks the tokens of BLOCK places of a row's text before which it reads as it does at its end, by the number of
    equal tokens if that is at least `shortest`, or as excluded."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    there = at < length
    base = tl.load(committed)
    path = paths + row * depth - base
    matched = tl.full([BLOCK], 0, tl.int32)
    going = there
    step = 0
    alive = 1
    while (step < width) & (alive > 0):
        before = at - 1 - step
        token = tl.load(tokens + before, mask=going & (before >= first) & (before < base), other=-1)
        own = tl.load(path + before, mask=going & (before >= tl.maximum(first, base)), other=-1)
        token = tl.where(before >= base, own, token)
        going = going & (before >= first) & (token == tl.load(suffixes + row * width + step))
        matched += going.to(tl.int32)
        alive = tl.max(going.to(tl.int32), 0)
        step += 1
    token = tl.load(tokens + at, mask=there & (at < base), other=-1)
    token = tl.where(at >= base, tl.load(path + at, mask=there & (at >= base), other=-1), token)
    found = there & (matched >= shortest)
    mark = tl.full([BLOCK], OUT, tl.int32) if EXCLUDE else matched
    tl.atomic_max(marks + row.to(tl.int64) * vocab + token, mark, mask=found, sem="relaxed")


def mark_repeats(
    marks: torch.Tensor, rows: Rows, suffixes: torch.Tensor, shortest: int, window: int, exclude: bool
) -> None:
    """Marks, in place, each token that came after at least `shortest` tokens with which the row's text ends: by the
    largest number of such tokens, or as excluded. Only the `window` latest tokens of the text count.

    marks:    [R, vocab] int32. suffixes: [R, width] int32, the row's text from its end, the last token first, as far as
              repeats count; -2 after that.
    """
    repeats_kernel[(len(marks), max(1, triton.cdiv(rows.longest, BLOCK)))](
        rows.tokens, rows.base, rows.lengths, rows.paths, suffixes, marks, marks.shape[1], rows.paths.shape[1],
        suffixes.shape[1], shortest, window, EXCLUDE=exclude, BLOCK=BLOCK, **launch_options(4, 1),
    )  # fmt: skip


def scores_of(
    logits: torch.Tensor, rules: Rules, rows: Rows, marks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the scores [R, vocab] fp64, and for each block of tokens the best [R, blocks] fp64 and the highest logit
    [R, blocks] fp64, which is inf where a logit is NaN.

    logits: [R, vocab] fp32 or fp64. marks: [R, vocab] int32, see `mark_repeats`.
    """
    count, vocab = logits.shape
    blocks, device = triton.cdiv(vocab, BLOCK), logits.device
    scores = torch.empty(logits.shape, dtype=torch.float64, device=device)
    highest, tops = (torch.empty((count, blocks), dtype=torch.float64, device=device) for _ in range(2))
    bias = scores if rules.bias is None else rules.bias
    scores_kernel[(count, blocks)](
        logits.contiguous(), rules.numbers, rows.base, rows.lengths, rows.paths, rows.last, rows.written,
        rows.lengths if marks is None else marks, rules.powers, bias, scores, highest, tops,
        vocab, blocks, rows.paths.shape[1], rules.window, rules.shortest,
        SEEN=rules.seen, COUNTED=rules.counted, MARKED=marks is not None, BIASED=rules.bias is not None,
        GREEDY=rules.greedy, BLOCK=BLOCK, **launch_options(4, 1),
    )  # fmt: skip
    return scores, tops, highest


def variants(target: str) -> Iterator[Variant]:
    doubles = dict.fromkeys(("numbers", "powers", "bias", "scores", "highest", "tops"), "*fp64")
    ints = dict.fromkeys(("committed", "lengths", "paths", "last", "written", "marks", "tokens", "suffixes"), "*i32")
    flags = ("SEEN", "COUNTED", "MARKED", "BIASED")
    for dtype, pointer in ((torch.float32, "*fp32"), (torch.float64, "*fp64")):
        for name, on, greedy in (
            ("scores", False, False),
            ("greedy scores", False, True),
            ("changed scores", True, False),
        ):
            constants = {**dict.fromkeys(flags, on), "GREEDY": greedy, "BLOCK": BLOCK}
            yield Variant(name, scores_kernel, dtype, None, {**doubles, **ints, "logits": pointer}, constants, 4, 1)
    for exclude in (False, True):
        name = "repeats out" if exclude else "repeats"
        yield Variant(name, repeats_kernel, torch.int32, None, ints, {"EXCLUDE": exclude, "BLOCK": BLOCK}, 4, 1)
