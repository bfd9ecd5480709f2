"""Whatever values the options of a run have: a text, or one line that names what is wrong."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenswift_py import Result, TokenSwift, UserError
from tokenswift_py.options import Options

NUMBERS: list[Any] = [
    0, 1, -1, 2, 64, 255, 256, 511, 512, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, 10**5000, True, False,
    0.0, -0.0, 0.5, 1.0, 1.5, 100.0, 5e-324, 1e-320, 1e-308, 1e-6, 1e-5, 3.4e38, 1e39, 1e308, -1e308, math.nan,
    math.inf, -math.inf, "1", "1.5", 1j,
]  # fmt: skip
WORDS: list[Any] = [
    "", " ", "x", "the", "auto", "none", "ngram", "partial", "heads", "cascade", "draft_model", "recent", "quest",
    "h2o", "snapkv", "importance", "mass", "own", "int8", "bf16", "warn", "stop", "ignore", "\x00", "\ud800", "\ufffd",
    "é", "\n", "<|im_end|>", "<|im_start|>", "a<|im_end|>", "<|", "/dev/null", "no/such", "~", "x" * 5000, b"x", None,
    Path("x"),
]  # fmt: skip
ANY = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers(-2, 320), st.floats())
LISTS = st.one_of(
    st.lists(ANY, max_size=4), st.lists(ANY, max_size=3).map(tuple), st.lists(st.text(max_size=3), max_size=4)
)
PAIRS = st.dictionaries(st.one_of(st.integers(-2, 320), st.sampled_from(["5", "x", None, 1.5])), ANY, max_size=3)
BARE: list[Any] = [object(), set(), len, int]
VALUES = st.one_of(ANY, LISTS, PAIRS, st.sampled_from(BARE))
# Values are bounded, so that a run takes no time: few tokens, or more than any memory holds.
BOUNDED = st.one_of(st.integers(-2, 40), st.sampled_from([2**45, 2**63, 10**400, True, 1.0, "9", None, math.nan]))
OWN: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("max_new_tokens", "context", "min_new_tokens", "min_chapter_tokens"), BOUNDED),
    "logits_processors": st.one_of(ANY, st.lists(st.sampled_from([object(), set(), int, None, "x"]), max_size=2)),
}
TOKENS = st.lists(st.one_of(st.integers(0, 288), st.sampled_from(["<|im_end|>", "a", "!"])), max_size=3)
TEXTS = st.lists(st.sampled_from(["a", "the", "<|im_end|>", "<|im_start|>", "\n\n", "é"]), max_size=3)
FINE: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(9, 40), "context": st.integers(60, 200), "min_new_tokens": st.integers(0, 8),
    "min_chapter_tokens": st.integers(0, 8), "temperature": st.floats(0, 100), "top_k": st.integers(0, 400),
    "top_p": st.floats(0, 1, exclude_min=True), "min_p": st.floats(0, 1), "penalty": st.floats(1, 100),
    "penalty_window": st.integers(1, 2**70), "dry_multiplier": st.floats(0, 1000), "dry_base": st.floats(1, 16),
    "dry_length": st.integers(1, 64), "dry_window": st.integers(0, 2**40), "dry_breakers": TEXTS,
    "seed": st.integers(0, 2**64 - 1), "stream": st.integers(0, 2**32 - 1), "stop": TEXTS, "stop_tokens": TOKENS,
    "ban": TOKENS, "chapters": TEXTS,
    "logit_bias": st.dictionaries(st.integers(0, 288), st.floats(-3e38, 3e38), max_size=3),
    "drafter": st.sampled_from(["auto", "none", "ngram", "partial", "cascade"]), "draft_tokens": st.integers(1, 511),
    "draft_policy": st.sampled_from(["recent", "quest", "h2o", "mass"]), "draft_budget": st.integers(64, 2000),
    "kv_budget": st.integers(256, 2000), "on_loop": st.sampled_from(["warn", "stop", "ignore"]),
    "repetition_penalty": st.floats(0, 100, exclude_min=True), "no_repeat_ngram_size": st.integers(0, 2**63),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), st.floats(-2, 2)),
    "ban_words": st.lists(st.one_of(TEXTS.map("".join), st.lists(st.integers(0, 288), max_size=3)), max_size=3),
    "top_n_sigma": st.floats(0, 100), "typical_p": st.floats(0, 1, exclude_min=True),
    "xtc_threshold": st.floats(0, 0.5), "xtc_probability": st.floats(0, 1), "prompt_logprobs": st.integers(0, 1000),
    "system": st.sampled_from(["a", "<|im_end|>"]), "chat_template": st.sampled_from(["{{ messages }}", "{%"]),
    "template_args": st.dictionaries(st.sampled_from(["a", "messages", "tokenize"]), ANY, max_size=2),
    **dict.fromkeys(("raw", "ignore_eos", "logprobs", "keep_stop", "no_bos", "special"), st.booleans()),
}  # fmt: skip


def mostly(fine: st.SearchStrategy[Any], wild: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda number: fine if number else wild)


NAMES = [field.name for field in fields(Options)]
ASKED = st.lists(st.sampled_from(NAMES), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: mostly(FINE.get(name, VALUES), OWN.get(name, VALUES)) for name in names})
)
PROMPTS = mostly(
    st.just("the cat"),
    st.one_of(st.text(max_size=20), st.lists(st.integers(-1, 300), max_size=5), ANY, LISTS, st.sampled_from(BARE)),
)


@pytest.mark.parametrize("rounds", [150, pytest.param(10_000, marks=pytest.mark.soak)])
def test_every_outcome_is_a_text_or_one_line(
    rounds: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")
    outcomes = {True: 0, False: 0}

    @settings(max_examples=rounds, database=None, suppress_health_check=list(HealthCheck))
    @given(asked=ASKED, prompt=PROMPTS)
    def check(asked: dict[str, Any], prompt: Any) -> None:
        try:
            result = swift.generate(prompt, **{"max_new_tokens": 8, **asked})
        except UserError as error:
            outcomes[False] += 1
            line = str(error)
            assert "\n" not in line and 10 < len(line) < 1500 and ":" in line
        else:
            outcomes[True] += 1
            assert isinstance(result, Result) and isinstance(result.text, str)
            assert 1 <= len(result.chosen) <= asked.get("max_new_tokens", 8)

    check()
    assert min(outcomes.values()) > rounds // 20
