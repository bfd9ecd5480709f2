"""Hugging Face's logits processors, those that keep state above all: called as transformers' generate calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from tokenswift_py import TokenSwift, UserError
from tokenswift_py.runs.audit import audit
from tokenswift_py.sampling.processors import PURE, is_pure
from tokenswift_py.sampling.reference import NumericsError

PROMPT = [5, 9, 40, 9, 40, 9, 40]
DRAFTERS = [
    {"drafter": "none"},
    {"drafter": "ngram"},
    {"drafter": "partial", "draft_tokens": 3},
    {"drafter": "cascade"},
]


class Counting(LogitsProcessor):
    """Lifts another token at every call, by what it saw so far: a call too many, or out of order, changes the text."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.seen = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids.shape[1], int(ids[0, -1])))
        self.seen = (3 * self.seen + int(scores[0].argmax()) + len(self.calls)) % 1000
        lifted = scores.clone()
        lifted[0, 40 + self.seen % 5] += 3.0
        return lifted


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")


SETTINGS: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "seed": 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_one_that_keeps_state_writes_the_same_text_under_every_drafter(swift: TokenSwift, temperature: float) -> None:
    texts, calls, drafted = [], [], 0
    for drafter in DRAFTERS:
        processor = Counting()
        result = swift.generate(
            PROMPT, logits_processors=[processor], temperature=temperature, on_loop="ignore", **SETTINGS, **drafter
        )
        texts.append(result.tokens)
        calls.append(processor.calls)
        drafted += result.stats.num_draft_tokens
    assert texts[1:] == texts[:-1] and calls[1:] == calls[:-1] and drafted > 20
    text = PROMPT + texts[0]
    assert calls[0] == [(length, text[length - 1]) for length in range(len(PROMPT), len(text))]


def test_the_order_of_calls_is_that_of_generate(swift: TokenSwift, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs, ours = Counting(), Counting()
    wanted = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, min_new_tokens=40, pad_token_id=0,
        logits_processor=LogitsProcessorList([theirs]),
    )  # fmt: skip
    result = swift.generate(
        PROMPT, temperature=0, max_new_tokens=40, min_new_tokens=40, logits_processors=[ours], on_loop="ignore"
    )
    assert PROMPT + result.tokens == wanted[0].tolist()
    assert ours.calls == theirs.calls and ours.seen == theirs.seen


@pytest.mark.parametrize("chapters", [[], ["and then", "the rain"]])
@pytest.mark.parametrize("kept", [False, True], ids=["", "snapshot"])
def test_a_run_that_was_left_goes_on_with_the_state_it_had(
    swift: TokenSwift, tmp_path: Path, chapters: list[str], kept: bool
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 150, "seed": 3, "temperature": 0.8, "chapters": chapters}
    settings |= {"min_chapter_tokens": 40, "logit_bias": {2: 9.0}} if chapters else {"min_new_tokens": 150}
    first = Counting()
    whole = swift.generate("the cat", logits_processors=[first], **settings)
    assert len(whole.tokens) > 100 and (len(whole.forced) == 2) == bool(chapters)
    with swift.stream(
        "the cat", out=tmp_path / "run", kv_snapshot=kept, logits_processors=[Counting()], **settings
    ) as s:
        for _ in s:
            if len(s.tokens) >= 75:
                break
    again = Counting()
    with swift.resume(tmp_path / "run", logits_processors=[again]) as stream:
        for _ in stream:
            pass
    assert stream.result().tokens == whole.tokens
    assert again.calls == first.calls and again.seen == first.seen
    found = audit(swift, tmp_path / "run", sample=1, logits_processors=[Counting()])
    assert found.passed and found.proof and found.checked == len(whole.chosen)


def test_an_audit_finds_what_another_state_would_have_written(swift: TokenSwift, tmp_path: Path) -> None:
    with swift.stream(
        PROMPT, out=tmp_path / "run", logits_processors=[Counting()], temperature=0, **SETTINGS
    ) as stream:
        list(stream)
    other = Counting()
    other.seen = 1
    found = audit(swift, tmp_path / "run", logits_processors=[other])
    assert not found.passed and found.mismatch is not None and found.mismatch.margin > 0
    assert len(other.calls) == found.checked


def test_pure_ones_guess_too_and_no_others(swift: TokenSwift) -> None:
    class Declared(Counting):
        pure = True

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls.append((ids.shape[1], int(ids[0, -1])))
            return scores

    declared = Declared()
    result = swift.generate(PROMPT, logits_processors=[declared], drafter="partial", draft_tokens=3, **SETTINGS)
    assert len(declared.calls) > len(result.tokens)

    class Derived(logits_process.TopKLogitsWarper):
        pass

    assert is_pure(logits_process.TopKLogitsWarper(3)) and not is_pure(Derived(3)) and not is_pure(Counting())
    assert all(hasattr(logits_process, name) for name in PURE)


def test_a_baseline_needs_the_state_of_the_beginning(swift: TokenSwift) -> None:
    with swift.stream(PROMPT, logits_processors=[Counting()], **SETTINGS) as stream:
        list(stream)
    with pytest.raises(
        UserError, match=r"baseline: \['Counting'\] is not allowed; not with processors that keep state"
    ):
        swift.baseline(stream)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Counting(), "a Counting is not allowed; a list of"),
        ([Counting], "the class Counting is not allowed"),
        ([5], "a int is not allowed"),
        (None, "a NoneType is not allowed"),
        ("top_k", "a str is not allowed"),
    ],
)
def test_what_is_no_list_of_functions_is_refused_before_any_work(swift: TokenSwift, given: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"logits_processors: {says}"):
        swift.generate("x", logits_processors=given)


def gives(values: Any) -> Any:
    def processor(ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return values(scores)

    return processor


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (lambda scores: scores * torch.nan, "gave scores that are not finite"),
        (lambda scores: scores.index_fill(1, torch.tensor([3]), torch.nan), "gave scores that are not finite"),
        (lambda scores: scores.index_fill(1, torch.tensor([3]), torch.inf), "gave scores that are not finite"),
        (lambda scores: torch.full_like(scores, -torch.inf), "left no token to choose from"),
        (lambda scores: None, "gave NoneType, not scores of shape"),
        (lambda scores: scores[0], r"gave \[289\], not scores of shape \[1, 289\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_one_that_gives_what_nobody_can_choose_from_is_named(
    swift: TokenSwift, values: Any, says: str, temperature: float
) -> None:
    place = len(PROMPT)
    with pytest.raises(NumericsError, match=f"^logits processor processor at position {place} {says}"):
        swift.generate(PROMPT, logits_processors=[gives(values)], temperature=temperature, max_new_tokens=4)


def test_the_lowest_number_of_all_excludes_a_token(swift: TokenSwift) -> None:
    lowest = gives(
        lambda scores: scores.clone().index_fill_(1, torch.arange(1, scores.shape[1]), torch.finfo(scores.dtype).min)
    )
    for temperature in (0.0, 1e-5, 0.5, 2.0):
        result = swift.generate(
            PROMPT, logits_processors=[lowest], temperature=temperature, max_new_tokens=3, ignore_eos=True
        )
        assert result.tokens == [0, 0, 0]
