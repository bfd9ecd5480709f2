"""What the experiments write and how they judge it: prompts of our own, real prefixes, quality by windows."""

from __future__ import annotations

import hashlib
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenswift_py.options import Options

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
workloads = runpy.run_path(str(EXPERIMENTS / "workloads" / "__init__.py"))
quality = runpy.run_path(str(EXPERIMENTS / "quality.py"))
window_quality = quality["window_quality"]


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> Any:
        return Encoded([ord(c) for c in text], [(i, i + 1) for i in range(len(text))])


class Encoded:
    def __init__(self, input_ids: list[int], offset_mapping: list[tuple[int, int]]):
        self.input_ids, self.offset_mapping = input_ids, offset_mapping


def letters(tokens: Any) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


def test_a_repeating_window_is_the_worst_and_the_looping_one() -> None:
    rng = np.random.default_rng(0)
    varied, looping = rng.integers(0, 26, 200).tolist(), [1, 2, 3, 4, 5] * 40
    found = window_quality(varied + looping + varied[::-1] + [7] * 199, letters, window=200)
    assert found.looping == (1,) and len(found.distinct_4) == 3  # the rest, shorter than a window, is left out
    assert found.distinct_4[1] == pytest.approx(5 / 197) and min(found.distinct_4[::2]) > 0.99
    assert found.compression[1] > 8 > 2 > max(found.compression[::2])
    told = found.summary()
    assert told["distinct_4_worst"] == found.distinct_4[1] and told["compression_worst"] == found.compression[1]
    assert told["distinct_4_median"] > 0.99 and told["compression_median"] < 2


def test_a_text_that_varies_each_round_is_no_loop_but_compresses() -> None:
    sentence = list(range(24))
    text = [token for n in range(20) for token in (*sentence[: n % 24], 25, *sentence[n % 24 :])]
    found = window_quality(text, letters, window=500)
    assert found.looping == () and found.compression[0] > 4


def test_a_short_text_is_one_window_and_a_tiny_one_is_refused() -> None:
    assert len(window_quality([1, 2, 3, 4, 5], letters).distinct_4) == 1
    with pytest.raises(ValueError, match="tokens: 3 is not allowed"):
        window_quality([1, 2, 3], letters)


@pytest.mark.parametrize("name", workloads["FREE"])
def test_a_free_run_is_one_that_generate_takes(name: str) -> None:
    run = workloads["free_run"](name)
    options = Options.of(chapters=run.chapters, max_new_tokens=100_000, **run.settings)
    assert run.prompt and all(request.strip() == request != "" for request in run.chapters)
    assert len(set(run.chapters)) == len(run.chapters) >= 300
    least = options.min_chapter_tokens * len(run.chapters)
    assert least >= (100_000 if name == "story" else 30_000), "the requests end before a long run does"


def test_story_requests_have_nothing_in_common_with_their_neighbours() -> None:
    """A small model loops where requests resemble each other: no name comes twice, no clause in neighbours."""
    requests = workloads["free_run"]("story").chapters
    names = [[word for word in request.split() if word[0].isupper()] for request in requests]
    assert all(not set(this[1:]) & set(after[1:]) for this, after in pairwise(names))
    grams = [{tuple(request.split()[i : i + 5]) for i in range(2, len(request.split()) - 4)} for request in requests]
    assert all(not this & after for this, after in pairwise(grams))


@pytest.mark.parametrize("name", workloads["CONTINUATIONS"])
def test_a_prefix_is_the_beginning_of_longer_ones_and_hashes_its_text(name: str) -> None:
    make = workloads["continuation"]
    short, long = make(name, Letters(), 3_000), make(name, Letters(), 30_000)
    assert long.tokens[:3_000] == short.tokens and len(long.tokens) == 30_000
    assert short.sha256 == hashlib.sha256("".join(map(chr, short.tokens)).encode()).hexdigest() != long.sha256
    assert make(name, Letters(), 3_000, start=5).tokens[:200] != short.tokens[:200]


def test_what_a_workload_has_not_is_refused() -> None:
    make = workloads["continuation"]
    with pytest.raises(ValueError, match="docs has"):
        make("docs", Letters(), 10**8)
    with pytest.raises(ValueError, match=r"start: 16 is not allowed; 0 to 15"):
        make("docs", Letters(), 10, start=16)
    for wrong in (make, lambda name, *_: workloads["free_run"](name)):
        with pytest.raises(ValueError, match="workload: 'poem' is not allowed"):
            wrong("poem", Letters(), 10)
