"""Text comes out whole: joined exactly, never half a character, never a piece of a stop string; turns go in exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenswift_py.decoding.history import History
from tokenswift_py.decoding.stopping import Stops
from tokenswift_py.errors import UserError
from tokenswift_py.text import Chat, TextJoiner, prompt_tokens, turn_tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Once upon a time the story went on, and on, and on. STOP here.",
    "日本語のテキストと中文文本",
    "family 👨‍👩‍👧‍👦 flag 🏳️‍🌈 wave 👋🏽",
    "cafe\u0301 n\u0303 Z\u0351\u036b\u0343 आप कैसे हैं",
]


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A vocabulary like Llama 2's and Mistral's: it strips a leading space, and has bytes for what it lacks."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "日"]
    merges = [("\u2581", "a"), ("a", "b")]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_level()
IM_END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def decode(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


def chunked(tokens: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(edges)]


def pieces(tokens: Sequence[int], cuts: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    joiner = TextJoiner(TOKENIZER, stops)
    return [*(joiner.push(chunk) for chunk in chunked(tokens, cuts)), joiner.finish()]


anything = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)
written = st.lists(st.sampled_from([*TEXTS, " and", "語", "👋", "\u0301", "S", "\n"]), max_size=4).map(
    lambda parts: encode("".join(parts))
)
cut_points = st.lists(st.integers(0, 60), max_size=40)


@given(st.one_of(anything, written), cut_points)
@example(encode("👨‍👩‍👧‍👦"), list(range(60)))
@example(encode("👋🏽")[:-1], list(range(60)))
@example(encode("a") + encode("日")[:1] + [IM_END] + encode("日")[1:], list(range(60)))
def test_the_pieces_join_to_exactly_the_decoded_text(tokens: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(tokens, cuts)) == decode(tokens)


@given(written)
def test_a_character_is_told_as_soon_as_it_is_whole_and_not_before(tokens: list[int]) -> None:
    joiner, told = TextJoiner(TOKENIZER), ""
    for count, token in enumerate(tokens, start=1):
        told += joiner.push([token])
        so_far = decode(tokens[:count])
        assert "\ufffd" not in told and told == (so_far if not so_far.endswith("\ufffd") else told)


FALLBACK = byte_fallback()


@pytest.mark.parametrize("stop", ["é", "本", "👋", "é👋"])
@pytest.mark.parametrize("before", ["", "é", "本", "👋", "語語", "👋👋👋", "語é👋語"])
def test_byte_fallback_vocabularies_find_stop_strings_behind_any_characters(before: str, stop: str) -> None:
    """The tokens looked at may begin within a character, and then all bytes after it decode as bad ones."""
    tokens = [2 + byte for byte in (before * 3).replace(stop, "").replace(stop[0], "").encode() + stop.encode()]
    stops, history, endings = Stops(1000, strings=[stop], decode=FALLBACK.backend_tokenizer.decode), History([0]), []
    for token in tokens:
        history.append(token)
        endings.append(stops(history))
    assert endings == [None] * (len(tokens) - 1) + ["stop"]


@given(st.text(" ab日本語👋é", max_size=20))
def test_byte_fallback_vocabularies_join_exactly_too(text: str) -> None:
    joiner, tokens = TextJoiner(FALLBACK), FALLBACK(text, add_special_tokens=False).input_ids
    assert "".join([*(joiner.push([token]) for token in tokens), joiner.finish()]) == text


@given(st.text(" ab日本語👋é", min_size=1, max_size=12), st.text(" ab日本語👋é", max_size=12))
@example("Once upon a", " time")
@example("日本語", "b")
def test_a_text_that_goes_on_from_its_prompt_keeps_its_first_space(prompt: str, text: str) -> None:
    """Prompt and text join to what decoding both gives. Decoded alone, the text would lose the space."""
    before, tokens = ids_of(prompt), ids_of(text)
    joiner = TextJoiner(FALLBACK, before=[1, *before])
    told = "".join([*(joiner.push([token]) for token in tokens), joiner.finish()])
    assert FALLBACK.decode(before) + told == FALLBACK.decode(before + tokens)


def test_a_character_that_the_prompt_began_is_told_whole() -> None:
    first, *rest = [2 + byte for byte in "日".encode()]
    joiner = TextJoiner(FALLBACK, before=[first])
    assert [joiner.push([token]) for token in rest] == ["", "日"]


def ids_of(text: str) -> list[int]:
    return list(FALLBACK(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_stop_string_is_found_at_the_very_start_of_a_text_as_it_is_told(goes_on: bool) -> None:
    """ " a" begins with a space where the text goes on from another one, and without it where it stands alone."""
    word, prompt = ids_of("a"), [1, *ids_of("b")]
    stops = Stops(9, strings=[" a"], decode=FALLBACK.backend_tokenizer.decode, special=[0, 1], goes_on=goes_on)
    joiner = TextJoiner(FALLBACK, [" a"], prompt if goes_on else ())
    stops.begin_chapter()
    history = History([*prompt, *word])
    assert stops(history) == ("stop" if goes_on else None)
    assert joiner.push(word) + joiner.finish() == ("" if goes_on else "a")


def test_no_stop_string_begins_in_the_prompt_that_a_text_goes_on_from() -> None:
    stops = Stops(9, strings=["ba", "b a"], decode=FALLBACK.backend_tokenizer.decode, goes_on=True)
    stops.begin_chapter()
    assert stops(History([*ids_of("b"), *ids_of("a")])) is None


@given(st.lists(st.integers(0, len(FALLBACK) - 1), max_size=30))
@example([2 + 0xE8, 260, 72, 223, 260, 257, 259, 262, 262])
def test_invalid_bytes_never_break_off_a_run(tokens: list[int]) -> None:
    joiner = TextJoiner(FALLBACK)
    told = "".join([*(joiner.push([token]) for token in tokens), joiner.finish()])
    plain = [token for token in tokens if token > 257]
    assert told.count("a") >= FALLBACK.decode(plain).count("a")


def cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cut_points,
)
@example("ab", ["b", "ab"], [1])
@example("xaab", ["aab"], [1, 2, 3])
def test_text_ends_before_the_first_stop_string_and_no_part_of_it_leaks(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """What is told early is also told in the end: at no time more than the final text."""
    final, told = cut(text, stops), ""
    for piece in pieces(encode(text), cuts, stops):
        told += piece
        assert final.startswith(told)
    assert told == final


def test_text_that_only_looked_like_a_stop_string_is_told_when_it_no_longer_does() -> None:
    joiner = TextJoiner(TOKENIZER, ["STOP", "OPEN"])
    told = [joiner.push(encode(letter)) for letter in "aSTOaOPb"]
    assert told == ["a", "", "", "", "STOa", "", "", "OPb"] and joiner.finish() == ""
    assert "".join(pieces(encode("a STO"), [1, 2, 3], ["STOP"])) == "a STO"


def test_a_stop_string_of_many_bytes_a_character() -> None:
    tokens = encode("家族は👨‍👩‍👧‍👦です")
    assert "".join(pieces(tokens, list(range(60)), ["👧"])) == "家族は👨‍👩‍"
    assert "".join(pieces(tokens, list(range(60)), ["👨‍👩‍👧‍👦で"])) == "家族は"


def chatml(*messages: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def test_a_text_is_one_user_message_and_messages_are_what_the_template_makes_of_them() -> None:
    wanted = encode(chatml(("user", "the story")) + "<|im_start|>assistant\n")
    assert prompt_tokens(TOKENIZER, "the story", Chat()) == wanted
    assert prompt_tokens(TOKENIZER, [{"role": "user", "content": "the story"}], Chat()) == wanted
    longer = [("system", "on"), ("user", "the"), ("assistant", "story"), ("user", "went")]
    assert prompt_tokens(TOKENIZER, [{"role": r, "content": c} for r, c in longer], Chat()) == encode(
        chatml(*longer) + "<|im_start|>assistant\n"
    )
    assert wanted.count(IM_END) == 1


def test_raw_text_and_ids_go_in_as_they_are() -> None:
    assert prompt_tokens(TOKENIZER, "the story", Chat(raw=True)) == encode("the story")
    assert prompt_tokens(byte_level(None), "the story", Chat()) == encode("the story")
    for raw in (True, False):
        assert prompt_tokens(TOKENIZER, [5, 6, 5], Chat(raw)) == [5, 6, 5]
        assert prompt_tokens(TOKENIZER, (7,), Chat(raw)) == [7]


def test_prompts_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"^prompt: -1 is not allowed; token ids are not negative"):
        prompt_tokens(TOKENIZER, [3, -1], Chat())
    with pytest.raises(UserError, match=r"^prompt: 'messages' is not allowed; this tokenizer has no chat template"):
        prompt_tokens(byte_level(None), [{"role": "user", "content": "hi"}], Chat())


@pytest.mark.parametrize("answer", ["the story went on.", "", "日本語", "on, and\n"])
def test_a_turn_is_exactly_what_the_template_puts_between_two_answers(answer: str) -> None:
    """Prompt, answer, the EOS that ended it and the turn are together what the template makes of the conversation."""
    start = prompt_tokens(TOKENIZER, "the", Chat())
    turn = turn_tokens(TOKENIZER, "and on?", [IM_END], Chat())
    conversation = chatml(("user", "the"), ("assistant", answer), ("user", "and on?")) + "<|im_start|>assistant\n"
    assert [*start, *encode(answer), IM_END, *turn] == encode(conversation)


def test_only_a_token_that_ended_the_chapter_is_left_out_of_a_turn() -> None:
    turn = turn_tokens(TOKENIZER, "and on?", [IM_END], Chat())
    assert turn_tokens(TOKENIZER, "and on?", [0], Chat()) == [IM_END, *turn]


def test_raw_turns_are_paragraphs_and_a_template_without_answers_is_refused() -> None:
    wanted = encode("\n\nand on?\n\n")
    assert turn_tokens(TOKENIZER, "and on?", [IM_END], Chat(raw=True)) == wanted
    assert turn_tokens(byte_level(None), "and on?", [IM_END], Chat()) == wanted
    with pytest.raises(UserError, match=r"^chapters: 'and on[?]' is not allowed; .* drops earlier answers$"):
        turn_tokens(byte_level(FORGETFUL), "and on?", [IM_END], Chat())


SURROUNDED = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(codec="utf-8", categories=["Mn", "Cf", "So", "Lo", "Cc", "Cn", "Zs"]), max_size=30),
    st.lists(
        st.sampled_from([*TEXTS, "\ufeff", "\0", "\u202eשלום", "🏴\U000e0067\U000e007f", "\U0010ffff", "\r\n"])
    ).map("".join),
).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@given(SURROUNDED, cut_points)
def test_any_unicode_text_comes_back_whole_from_its_tokens(text: str, cuts: list[int]) -> None:
    """Combining marks, joiners, right-to-left marks, NUL, BOM and whatever else has a UTF-8 form."""
    tokens = encode(text)
    assert "".join(pieces(tokens, cuts)) == decode(tokens) == text
    joiner, ids = TextJoiner(FALLBACK), FALLBACK(text, add_special_tokens=False).input_ids
    told = "".join([*(joiner.push([token]) for token in ids), joiner.finish()])
    assert told == FALLBACK.decode(ids, skip_special_tokens=True)


BYTE = {byte: TOKENIZER.convert_tokens_to_ids(char) for byte, char in bytes_to_unicode().items()}
BYTES = {
    part: [BYTE[byte] for byte in part]
    for part in (b"\xe6", b"\x97", b"\xa5", b"\xf0\x9f", b"\xff", b"a", b"\xe6\x97\xa5")
}


@given(st.lists(st.sampled_from(list(BYTES)), max_size=150))
@example([b"\xe6", b"\x97"] * 80 + [b"a"])
@example([b"\xff"] * 80 + [b"\xe6\x97\xa5"])
def test_long_runs_of_invalid_bytes_join_to_the_decoded_text(parts: list[bytes]) -> None:
    tokens = [token for part in parts for token in BYTES[part]]
    assert "".join(pieces(tokens, range(len(tokens)))) == decode(tokens)


def test_endless_invalid_bytes_take_as_long_as_others() -> None:
    """Each token is decoded with few others, however long the run; ids without a token bring nothing at all."""
    for tokenizer, token in ((TOKENIZER, BYTE[0xE6]), (FALLBACK, 2 + 0xE6), (TOKENIZER, 10_000)):
        joiner, longest = TextJoiner(tokenizer), 0
        told = ""
        for _ in range(500):
            told += joiner.push([token])
            longest = max(longest, len(joiner._window))
        assert longest <= 40 and told + joiner.finish() == ("\ufffd" * 500 if token < 10_000 else "")
