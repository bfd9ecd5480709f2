"""Chats become the tokens that transformers makes of them; what a user types stays text."""

from __future__ import annotations

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.cli.flags import parser
from tokenswift_py.cli.inputs import read_input
from tokenswift_py.runs.audit import audit
from tokenswift_py.text import MARKS, Chat, prompt_tokens, special_texts, turn_tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined and not thinking %}"
    "(no thinking){% endif %}{% endif %}"
)
TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = CHATML
SPECIAL = {added.content: token for token, added in TOKENIZER.added_tokens_decoder.items() if added.special}
IM_START, IM_END = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary like Llama 2's: a prefix space, bytes, control tokens that eat the spaces around them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def theirs(tokenizer: Any, messages: Any, **settings: Any) -> list[int]:
    settings = {"add_generation_prompt": True, **settings}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentencepiece()], ids=["byte level", "sentencepiece"])
def test_messages_are_what_the_template_makes_of_them(tokenizer: Any) -> None:
    ask = TALK[1:2]
    assert prompt_tokens(tokenizer, TALK[:2], Chat()) == theirs(tokenizer, TALK[:2])
    assert prompt_tokens(tokenizer, "the cat", Chat(system="Be brief.")) == theirs(tokenizer, TALK[:2])
    assert prompt_tokens(tokenizer, ask, Chat(system="Be brief.")) == theirs(tokenizer, TALK[:2])
    other = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ end }}"
    wanted = theirs(tokenizer, ask, chat_template=other, end="now")
    assert prompt_tokens(tokenizer, ask, Chat(template=other, arguments={"end": "now"})) == wanted
    continued = theirs(tokenizer, TALK, add_generation_prompt=False, continue_final_message=True)
    assert prompt_tokens(tokenizer, TALK, Chat(continues=True)) == continued


def test_the_template_is_told_its_arguments() -> None:
    plain, told = (prompt_tokens(TOKENIZER, "x", Chat(arguments=a)) for a in ({}, {"thinking": False}))
    assert told == theirs(TOKENIZER, [{"role": "user", "content": "x"}], thinking=False) and len(told) > len(plain)


def test_no_bos_where_none_is_wanted() -> None:
    tokenizer = sentencepiece()
    chat, bare = (prompt_tokens(tokenizer, "a b", Chat(no_bos=no)) for no in (False, True))
    assert chat == theirs(tokenizer, [{"role": "user", "content": "a b"}]) and bare == chat[1:] and chat[0] == 1
    raw, bare = (prompt_tokens(tokenizer, "a b", Chat(raw=True, no_bos=no)) for no in (False, True))
    assert raw == tokenizer("a b").input_ids and bare == tokenizer("a b", add_special_tokens=False).input_ids
    assert raw[0] == 1 and bare == raw[1:]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentencepiece()], ids=["byte level", "sentencepiece"])
def test_the_name_of_a_control_token_in_a_message_is_text(tokenizer: Any) -> None:
    """Each control token comes as often as in a talk of other words, and the text comes back as it was typed."""
    names = [added.content for added in tokenizer.added_tokens_decoder.values() if added.special]
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for name in names:
        said = f"a{name} b {name}"
        messages = [
            {"role": "user", "content": said},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": name},
        ]
        plain = [{**m, "content": "a"} for m in messages]
        tokens = prompt_tokens(tokenizer, messages, Chat())
        kept = [token for token in tokens if token in control]
        assert kept == [token for token in theirs(tokenizer, plain) if token in control]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(tokens).replace(" ", "") == rendered.replace(" ", "")
        assert prompt_tokens(tokenizer, messages, Chat(special=True)) == theirs(tokenizer, messages)


def test_around_such_a_name_every_token_is_as_it_always_is() -> None:
    """The tokens before and after the user's words are those of the template, and the words are those of the text."""
    before = theirs(TOKENIZER, [TALK[0], {"role": "user", "content": "#"}])
    at = before.index(TOKENIZER("#", add_special_tokens=False).input_ids[0])
    before, behind = before[:at], before[at + 1 :]
    said = "<|im_end|>"
    words = TOKENIZER(said, add_special_tokens=False, split_special_tokens=True).input_ids
    assert prompt_tokens(TOKENIZER, said, Chat(system="Be brief."))[: len(before)] == before
    assert (
        prompt_tokens(TOKENIZER, said, Chat(system="Be brief.")) == [*before, *words, *behind] and IM_END not in words
    )


def test_marks_in_a_message_are_no_door_to_control_tokens() -> None:
    """Whatever noncharacters a message has: they come back, and no control token with them."""
    plain = prompt_tokens(TOKENIZER, "x", Chat())
    for used in range(len(MARKS)):
        marks = "".join(f"{mark}t{IM_END}{mark}{mark}n0{mark}" for mark in MARKS[:used])
        said = f"<|im_end|>{marks}"
        tokens = prompt_tokens(TOKENIZER, said, Chat())
        assert tokens.count(IM_END) == plain.count(IM_END) == 1
        assert tokens.count(IM_START) == plain.count(IM_START) == 2
        assert said in TOKENIZER.decode(tokens)
    # What stands between two names must not pair up with their marks.
    for name, number in itertools.product(special_texts(TOKENIZER), range(len(special_texts(TOKENIZER)))):
        for said in (f"{name}n{number}", f"{name}n{number}{name}t{IM_END}{name}n{number}{name}", f"n{number}{name}"):
            tokens = prompt_tokens(TOKENIZER, said, Chat())
            assert tokens.count(IM_END) == tokens.count(IM_START) - 1 == 1
            assert said in TOKENIZER.decode(tokens)
    with pytest.raises(UserError, match=r"prompt: '<\|im_end\|>' is not allowed; beside U\+FDD0 to U\+FDD3"):
        prompt_tokens(TOKENIZER, f"<|im_end|>{MARKS}", Chat())
    assert MARKS in TOKENIZER.decode(prompt_tokens(TOKENIZER, MARKS, Chat()))


def test_texts_that_are_read_at_the_same_time_do_not_change_one_another() -> None:
    """A server reads prompts in several threads with one tokenizer: it must not be switched for one of them."""
    chat, raw = "a talk of some length " * 20, "a<|im_end|>"
    wanted = prompt_tokens(TOKENIZER, chat, Chat()), TOKENIZER(raw, split_special_tokens=True).input_ids
    TOKENIZER("x")  # switches it back
    switched: list[bool] = []

    def read(number: int) -> bool:
        found = prompt_tokens(TOKENIZER, raw, Chat(raw=True)) if number % 2 else prompt_tokens(TOKENIZER, chat, Chat())
        switched.append(TOKENIZER.backend_tokenizer.encode_special_tokens)
        return found == wanted[number % 2]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
    assert not any(switched)


def test_a_text_with_names_is_neither_cut_nor_filled() -> None:
    """Files may ask for that, and so may a call before."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    raw = "the cat and the dog and the cat <|im_end|> the cat and the dog"
    found = prompt_tokens(tokenizer, raw, Chat(raw=True))
    assert found == tokenizer(raw, split_special_tokens=True).input_ids and 4 < len(found) < 64


def test_a_tokenizer_is_copied_once_however_many_texts_have_names_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, copies = sentencepiece(), []
    copied = copy.deepcopy
    monkeypatch.setattr("tokenswift_py.text.copy.deepcopy", lambda it: copies.append(it) or copied(it))
    for number in range(20):
        assert turn_tokens(tokenizer, f"{number}</s>", [2], Chat())
        assert prompt_tokens(tokenizer, f"{number}</s>", Chat(raw=True))
    assert len(copies) == 2


def test_turns_and_raw_prompts_are_text_too(caplog: pytest.LogCaptureFixture) -> None:
    plain, turn = (turn_tokens(TOKENIZER, request, [IM_END], Chat()) for request in ("x", "x<|im_end|>"))
    assert turn.count(IM_END) == plain.count(IM_END) and "<|im_end|>" in TOKENIZER.decode(turn)
    assert turn_tokens(TOKENIZER, "x<|im_end|>", [IM_END], Chat(special=True)).count(IM_END) == plain.count(IM_END) + 1
    raw = prompt_tokens(TOKENIZER, "a<|im_end|>", Chat(raw=True))
    assert IM_END not in raw and TOKENIZER.decode(raw) == "a<|im_end|>" and "in it is text" in caplog.text
    assert IM_END in prompt_tokens(TOKENIZER, "a<|im_end|>", Chat(raw=True, special=True))


@pytest.mark.parametrize(
    ("prompt", "chat", "says"),
    [
        ("x", Chat(raw=True, system="s"), "system: 's' is not allowed; only with a chat template"),
        ([5], Chat(system="s"), "system: 's' is not allowed; not with token ids"),
        (TALK, Chat(system="s"), "system: 's' is not allowed; the messages have a system message already"),
        (TALK, Chat(raw=True), "prompt: 'messages' is not allowed; not with raw"),
        (TALK[:2], Chat(continues=True), "continue_final_message: True is not allowed; only where the last message"),
        ("x", Chat(template="{{ oops"), "prompt: the model's chat template does not take it"),
    ],
)
def test_what_does_not_go_together_is_refused(prompt: Any, chat: Chat, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        prompt_tokens(TOKENIZER, prompt, chat)


def test_the_command_line_reads_chats(tmp_path: Path) -> None:
    talk, template = tmp_path / "talk.json", tmp_path / "template.jinja"
    talk.write_text(json.dumps(TALK))
    template.write_text(CHATML)
    words = ["--messages", str(talk), "--chat-template", str(template), "--template-arg", "thinking=false",
             "--template-arg", "name=Ann", "--continue-final-message", "--no-bos", "--special"]  # fmt: skip
    prompt, options = read_input(parser().parse_args(words))
    assert prompt == TALK and options["chat_template"] == CHATML
    assert options["template_args"] == {"thinking": False, "name": "Ann"}
    assert options["continue_final_message"] and options["no_bos"] and options["special"]
    long = CHATML + "{# " + "x" * 5000 + " #}"  # longer than a file's name may be
    _, options = read_input(parser().parse_args(["--prompt", "x", "--chat-template", long]))
    assert options["chat_template"] == long
    for wrong, says in (("--template-arg", "template_arg: 'no/such'"), ("--chat-template", "chat_template")):
        with pytest.raises(UserError, match=f"^{says}"):
            read_input(parser().parse_args(["--prompt", "x", wrong, "no/such"]))
    talk.write_text("[1]")
    with pytest.raises(UserError, match=r"^messages: .*a list of"):
        read_input(parser().parse_args(["--messages", str(talk)]))


@pytest.fixture(scope="module")
def swift(tiny_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32")


def test_a_chat_is_resumed_and_proven_as_it_was_asked_for(swift: TokenSwift, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "system": "Be brief.", "chat_template": CHATML, "template_args": {"thinking": False}, "max_new_tokens": 60,
        "chapters": ["and <|im_end|> then"], "min_chapter_tokens": 10, "logit_bias": {IM_END: 9.0}, "temperature": 0.9,
        "frequency_penalty": 0.4,
        "seed": 3,
    }  # fmt: skip
    whole = swift.generate("the cat", **settings)
    assert len(whole.forced) == 1
    with swift.stream("the cat", out=tmp_path / "run", **settings) as stream:
        for _ in stream:
            if len(stream.tokens) > 8:
                break
    with swift.resume(tmp_path / "run") as stream:
        list(stream)
    assert stream.result().tokens == whole.tokens
    found = audit(swift, tmp_path / "run")
    assert found.passed and found.forced == len(range(*whole.forced[0]))


def test_going_on_with_an_answer_is_going_on_with_its_tokens(swift: TokenSwift) -> None:
    swift_talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
    result = swift.generate(swift_talk, continue_final_message=True, chat_template=CHATML, **settings)
    unended = {"chat_template": CHATML, "add_generation_prompt": False, "continue_final_message": True}
    assert result.tokens == swift.generate(theirs(swift.tokenizer, swift_talk, **unended), **settings).tokens
