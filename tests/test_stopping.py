"""The end of a text depends on its tokens alone: EOS, stop strings however they are tokenised, the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.statistics import Loop
from tokenswift_py.decoding.stopping import Stops

EOS = 0
WORDS = ["", "a", "b", "c", "ab", "bc", "aSTOPb", "ST", "OP", "STOP", "S", "TO", "P", "xS"]


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def test_a_loop_ends_the_text_only_if_it_is_to(caplog: pytest.LogCaptureFixture) -> None:
    text = [3, 4, *([1, 2] * 60)]
    assert ending_of(text, Stops(1000, [EOS], on_loop="stop")) == (66, "loop")
    assert caplog.text == ""
    assert ending_of(text, Stops(1000, [EOS], on_loop="ignore")) == (122, None)
    assert caplog.text == ""
    assert ending_of(text, Stops(1000, [EOS], on_loop="warn")) == (122, None)
    assert [record.getMessage() for record in caplog.records] == [
        "the text loops: from new token 2 on it is a block of 2 tokens over and over, 64 tokens so far"
    ]


def test_loops_are_seen_in_the_new_tokens_across_turns_and_not_in_the_prompt() -> None:
    assert ending_of([1] * 40, Stops(1000, on_loop="stop"), prompt=[1] * 400) == (40, None)
    stops, history = Stops(1000, [EOS], on_loop="stop"), History([5])
    answer, endings = [1, 2, 3, 4, 6, 7, 8, EOS], []
    for number in range(9):
        history.extend([9, 10 + number])
        stops.begin_chapter()
        for token in answer:
            history.append(token)
            endings.append(stops(history))
    assert set(endings[:63]) == {None, "eos"} and stops.loops.loops == [Loop(0, 72, 8)]
    assert endings[63:65] == ["eos", "loop"]  # an EOS is the better reason; where a turn follows, the loop waits


def ending_of(tokens: Sequence[int], stops: Stops, prompt: Sequence[int] = ()) -> tuple[int, str | None]:
    """How many tokens were written, and why no more."""
    history = History(prompt)
    stops.begin_chapter()
    for count, token in enumerate(tokens, start=1):
        history.append(token)
        reason = stops(history)
        if reason is not None:
            return count, reason
    return len(tokens), None


def stops_at(*strings: str, limit: int = 1000) -> Stops:
    return Stops(limit, [EOS], strings, decode)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["a", "STOP", "b"], 2),
        (["a", "ST", "OP", "b"], 3),
        (["xS", "TO", "P", "b"], 3),
        (["a", "aSTOPb", "c"], 2),
        (["ST", "a", "OP", "b"], None),
    ],
)
def test_a_stop_string_is_found_however_it_is_cut_into_tokens(words: list[str], count: int | None) -> None:
    tokens = [WORDS.index(word) for word in words]
    assert ending_of(tokens, stops_at("STOP")) == ((count, "stop") if count else (len(tokens), None))


def test_a_stop_string_is_not_found_in_what_was_forced() -> None:
    stop, first, second = WORDS.index("STOP"), WORDS.index("ST"), WORDS.index("OP")
    assert ending_of([1, 2], stops_at("STOP"), prompt=[stop]) == (2, None)
    assert ending_of([second, 1], stops_at("STOP"), prompt=[first]) == (2, None)
    assert ending_of([first, second, 1], stops_at("STOP"), prompt=[stop]) == (2, "stop")


@given(
    st.lists(st.integers(1, len(WORDS) - 1), max_size=40),
    st.lists(st.text("abcSTOP", min_size=1, max_size=6), min_size=1, max_size=3),
    st.lists(st.integers(1, len(WORDS) - 1), max_size=5),
)
def test_text_stops_at_the_first_token_that_completes_a_stop_string(
    tokens: list[int], strings: list[str], prompt: list[int]
) -> None:
    wanted = next(
        (
            (count, "stop")
            for count in range(1, len(tokens) + 1)
            if any(string in decode(tokens[:count]) for string in strings)
        ),
        (len(tokens), None),
    )
    assert ending_of(tokens, stops_at(*strings), prompt) == wanted


def test_every_end_of_sequence_token_ends_the_text_and_none_need_be_known() -> None:
    assert ending_of([1, 2, 3], Stops(9, [3, 2])) == (2, "eos")
    assert ending_of([1, 2, 3], Stops(9)) == (3, None)


def test_the_last_token_that_is_wanted_ends_the_text() -> None:
    stops = Stops(3)
    assert ending_of([1, 1], stops) == (2, None) and stops.tokens_left == 1
    assert ending_of([1, 1], stops, prompt=[1] * 50) == (1, "length")


def test_the_better_reason_is_told_when_several_end_the_text_at_once() -> None:
    stop = WORDS.index("STOP")
    assert ending_of([EOS], stops_at("STOP", limit=1)) == (1, "eos")
    assert ending_of([stop], stops_at("STOP", limit=1)) == (1, "stop")
    assert ending_of([1], stops_at("STOP", limit=1)) == (1, "length")


def test_stop_strings_need_a_decoder() -> None:
    with pytest.raises(ValueError, match="stop strings need a decoder"):
        Stops(5, strings=["STOP"])


def test_tokens_without_a_text_cost_no_more_the_more_there_are() -> None:
    """The history is asked for its latest token alone, and stop strings are found across those that have no text."""

    class Counting(History):
        looks = 0

        def __getitem__(self, index: int) -> int:
            self.looks += 1
            return super().__getitem__(index)

    silent, looks = 0, []
    for count in (100, 200):
        decoded: list[int] = []
        stops = Stops(
            1000, [], ["STOP"], lambda tokens, seen=decoded: seen.append(len(tokens)) or decode(tokens), {silent}
        )
        history = Counting()
        for token in (WORDS.index("ST"), *[silent] * count, WORDS.index("OP")):
            history.append(token)
            ending = stops(history)
        assert ending == "stop" and decoded == [1, 2]
        looks.append(history.looks / count)
    assert looks[1] <= looks[0]


def test_a_stop_token_ends_the_text_as_a_stop_string_does() -> None:
    assert ending_of([1, 2, 3, 4], Stops(9, [EOS], tokens=[3])) == (3, "stop")
    assert ending_of([3, EOS], Stops(9, [EOS], tokens=[3, EOS]), prompt=[3]) == (1, "stop")
    assert ending_of([1, EOS], Stops(9, [EOS], tokens=[3, EOS])) == (2, "eos")


@given(
    st.lists(st.integers(1, len(WORDS) - 1), max_size=30),
    st.lists(st.text("abcSTOP", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
    st.lists(st.integers(1, len(WORDS) - 1), max_size=5),
)
@example([7, 7, 7, 7], ["STST"], 2, [])
def test_a_stop_string_completed_before_the_text_may_end_ends_nothing(
    tokens: list[int], strings: list[str], least: int, prompt: list[int]
) -> None:
    """It is like vLLM's min_tokens: a match counts if it ends in the text of a token after the first `least`."""

    def completes(count: int) -> bool:
        known, text = len(decode(tokens[: count - 1])), decode(tokens[:count])
        return any(text[:end].endswith(string) for string in strings for end in range(known + 1, len(text) + 1))

    wanted = next((count for count in range(least + 1, len(tokens) + 1) if completes(count)), None)
    stops = Stops(1000, [EOS], strings, decode, may_end_from=lambda position: len(prompt) + least)
    assert ending_of(tokens, stops, prompt) == ((wanted, "stop") if wanted else (len(tokens), None))
