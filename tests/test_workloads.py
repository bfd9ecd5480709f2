"""The workloads of the experiments: prompts of our own, and real prefixes."""

from __future__ import annotations

import hashlib
import re
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_tokenizer
from tokenswift_py.decoding.history import History
from tokenswift_py.options import Options
from tokenswift_py.sampling.grammar import Follower, Grammar, Vocabulary

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
workloads = runpy.run_path(str(EXPERIMENTS / "workloads" / "__init__.py"))


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> Any:
        return Encoded([ord(c) for c in text], [(i, i + 1) for i in range(len(text))])


class Encoded:
    def __init__(self, input_ids: list[int], offset_mapping: list[tuple[int, int]]):
        self.input_ids, self.offset_mapping = input_ids, offset_mapping


@pytest.mark.parametrize("name", workloads["WORKLOADS"])
def test_a_free_run_is_one_that_generate_takes(name: str) -> None:
    run = workloads["free_run"](name)
    options = Options.of(chapters=run.chapters, max_new_tokens=100_000, **run.settings)
    assert run.prompt and all(request.strip() == request != "" for request in run.chapters)
    assert len(set(run.chapters)) == len(run.chapters) >= 300
    least = options.min_chapter_tokens * len(run.chapters)
    assert least >= (50_000 if name == "records" else 100_000), "the requests end before a long run does"


def test_records_can_be_held_to_a_grammar() -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'tokenswift-py[grammar]'")
    options = Options.of(**workloads["held_to_grammar"](workloads["free_run"]("records")))
    tokenizer = tiny_tokenizer()
    follower = Follower(Grammar(*options.language, Vocabulary(tokenizer, len(tokenizer), [2])))
    text = ", ".join(
        f'"k_{number}": {value}' for number, value in enumerate(('"a"', "-1.5", "[]", "true", "null", "0"))
    )
    assert follower.holds(History([*tokenizer.encode(f"{{{text}}}"), 2]))
    assert not follower.holds(History([*tokenizer.encode(f"{{{text}"), 2]))
    for value, allowed in (("2026-11-28", True), ("a-b-c-d", False)):
        dated = text.replace('"a"', f'"{value}"')
        assert follower.holds(History([*tokenizer.encode(f"{{{dated}}}"), 2])) is allowed
    with pytest.raises(ValueError, match="grammar: 'story' is not allowed"):
        workloads["held_to_grammar"](workloads["free_run"]("story"))


def test_each_record_is_of_a_new_subject_with_keys_that_the_grammar_takes() -> None:
    run = workloads["free_run"]("records")
    requests = [run.prompt, *run.chapters]
    for request in requests:
        keys = re.findall(r'"([a-z][a-z0-9_]{0,23})"', request)
        assert 6 <= len(set(keys)) == len(keys) == request.count('"') // 2 <= 12
    subjects = [re.search(r"(?:the|The) (\w[\w ]*? [A-Z][a-z]+ [A-Z][a-z]+)\b", request) for request in requests]
    assert len({found[1] for found in subjects if found}) == len(requests)


def test_manual_has_eleven_sections_about_each_assembly_and_never_two_in_a_row() -> None:
    named = [
        re.split(r", which| every day\. It| works and| for the first time", request)[0].rsplit(" the ", 1)[1]
        for request in workloads["free_run"]("manual").chapters
    ]
    assert len(set(named)) == 38 and set(Counter(named).values()) == {11}
    assert all(this != after for this, after in pairwise(named))


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
