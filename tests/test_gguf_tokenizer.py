"""A GGUF file's tokenizer gives llama.cpp's and SentencePiece's tokens, and the checkpoint's own where they differ.

data/llama_cpp_tokens.json is made by llama_cpp_tokens.py.
"""

from __future__ import annotations

import io
import json
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conftest import tiny_config, tiny_model
from tokenswift_py import TokenSwift
from tokenswift_py.checkpoints import loading
from tokenswift_py.checkpoints.gguf_file import open_gguf
from tokenswift_py.checkpoints.gguf_tokenizer import write_tokenizer
from tokenswift_py.checkpoints.pretokenizers import PRE_TOKENIZERS
from tokenswift_py.errors import UserError
from vocabularies import write_vocabulary

FOUND = json.loads((Path(__file__).parent / "data" / "llama_cpp_tokens.json").read_text(encoding="utf-8"))
TEXTS: dict[str, str] = FOUND["texts"]
BYTE_LEVEL, CHARACTERS, SENTENCEPIECE = (FOUND[kind] for kind in ("byte level", "characters", "sentencepiece"))
NAMES = FOUND["by name"] | FOUND["by name of characters"]
SAID = {"None": None, "True": True, "False": False}

# Where llama.cpp only comes near the checkpoint's own expression, which its source quotes, the own one is followed.
# llama.cpp tells upper from lower case in ASCII only, if at all, and has marks for no letters: Tekken, GPT-4o, Kimi.
O200K = ("capitals", "scripts", "decomposed", "composed", "folded")
DIFFERENT = {
    **dict.fromkeys(("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), O200K),
    "granite-embed-multi-97m": ("capitals", "folded"),
    "youtu": ("capitals",),
    "kimi-k2": O200K[:-1],
    # and digits before a letter are not cut from the right, as \b has it
    **dict.fromkeys(("tiny_aya", "cohere2moe"), ("digits", "capitals")),
    # llama.cpp reads a vertical tab for U+2009, which the expression for Asian letters has by its range
    "deepseek-llm": ("blanks",),
    "deepseek-coder": ("blanks",),
}


def tokenizer_of(folder: Path, fields: dict[str, Any], name: str = "tiny") -> Any:
    write_tokenizer(open_gguf(write_vocabulary(folder / "tiny.gguf", fields, name)), folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_gives_llama_cpps_tokens(tmp_path: Path, name: str) -> None:
    """Where the checkpoint's tokenizer normalises to NFC, which llama.cpp does not, those of the normalised text."""
    pre, theirs = PRE_TOKENIZERS[name], dict(zip(TEXTS, FOUND["groups"][NAMES[name]], strict=True))
    tokenizer = tokenizer_of(tmp_path, {**(CHARACTERS if pre.raw else BYTE_LEVEL), "pre": name})
    if pre.nfc:
        by_text = {text: theirs[label] for label, text in TEXTS.items()}
        theirs = {label: by_text[unicodedata.normalize("NFC", text)] for label, text in TEXTS.items()}
    different = {label for label, text in TEXTS.items() if ids_of(tokenizer, text) != theirs[label]}
    assert different == set(DIFFERENT.get(name, ()))


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_llama_cpp_only_comes_near_the_words_are_those_of_the_expression(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(tmp_path, {**BYTE_LEVEL, "pre": name})
    for label in DIFFERENT[name]:
        assert ids_of(tokenizer, TEXTS[label]) == reference(TEXTS[label], name), label


def reference(text: str, name: str) -> list[int]:
    """Words by another regex engine, and merges in the plainest way there is."""
    words, byte = [text], bytes_to_unicode()
    for split in PRE_TOKENIZERS[name].splits:
        cut = regex.compile(f"({split})", regex.V1)
        found = [(word, [m.span() for m in cut.finditer(word)]) for word in words]
        edges = [(word, sorted({0, len(word), *(edge for span in spans for edge in span)})) for word, spans in found]
        words = [word[a:b] for word, at in edges for a, b in pairwise(at)]
    ranks, ids = ranks_and_ids()
    tokens: list[int] = []
    for word in words:
        parts = [byte[value] for value in word.encode()]
        if PRE_TOKENIZERS[name].ignore_merges and "".join(parts) in ids:
            parts = ["".join(parts)]
        while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        tokens += [ids[part] for part in parts]
    return tokens


@cache
def ranks_and_ids() -> tuple[dict[tuple[str, ...], int], dict[str, int]]:
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(BYTE_LEVEL["merges"])}
    return ranks, {text: token for token, text in enumerate(BYTE_LEVEL["tokens"])}


@pytest.mark.parametrize("asked", FOUND["around"])
def test_bos_and_eos_are_where_the_file_or_else_the_name_puts_them(tmp_path: Path, asked: str) -> None:
    name, bos, eos = asked.split()
    fields = {**BYTE_LEVEL, "pre": name, "add_bos_token": SAID[bos], "add_eos_token": SAID[eos]}
    assert tokenizer_of(tmp_path, fields)("x y").input_ids == FOUND["around"][asked]


@pytest.mark.parametrize("asked", FOUND["around sentencepiece"])
def test_bos_and_eos_of_sentencepiece_files(tmp_path: Path, asked: str) -> None:
    bos, eos = asked.split()
    fields = {**SENTENCEPIECE, "add_bos_token": SAID[bos], "add_eos_token": SAID[eos]}
    assert tokenizer_of(tmp_path, fields)("x y").input_ids == FOUND["around sentencepiece"][asked]


@pytest.mark.parametrize("prefix", FOUND["space prefix"])
def test_sentencepiece_files_give_llama_cpps_tokens_with_or_without_a_space(tmp_path: Path, prefix: str) -> None:
    tokenizer = tokenizer_of(tmp_path, {**SENTENCEPIECE, "add_space_prefix": SAID[prefix]})
    theirs = FOUND["groups"][FOUND["space prefix"][prefix]]
    assert [ids_of(tokenizer, text) for text in TEXTS.values()] == theirs
    for text in TEXTS.values():
        if "<" not in text:  # markup is left out
            assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True) == text


@pytest.mark.model
def test_the_default_model_has_the_tokens_it_was_trained_on() -> None:
    """smollm cuts digits one by one; " 100" is four tokens."""
    tokenizer = loading.open_checkpoint().tokenizer()
    assert [ids_of(tokenizer, text) for text in TEXTS.values()] == FOUND["default model"]
    assert [tokenizer.decode([token]) for token in ids_of(tokenizer, "a 100")] == ["a", " ", "1", "0", "0"]


def trained(**settings: Any) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join([*TEXTS.values()] * 3).splitlines()), model_writer=model, vocab_size=700,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", character_coverage=0.98,
        minloglevel=2, **settings,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fields_of(model: Any) -> dict[str, Any]:
    size = model.vocab_size()
    asked = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte}
    kinds = [next((kind for kind, has in asked.items() if has(token)), 1) for token in range(size)]
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(token) for token in range(size)],
        "scores": [float(model.get_score(token)) for token in range(size)],
        "token_type": kinds,
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """SentencePiece's own model and ours of its fields, of each kind."""
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}, {}),
        ({"remove_extra_whitespaces": False, "add_dummy_prefix": False}, {"add_space_prefix": False}),
        ({"remove_extra_whitespaces": True}, {"remove_extra_whitespaces": True}),
    ]
    found = []
    for settings, fields in kinds:
        model = trained(**settings)
        found.append((model, tokenizer_of(tmp_path_factory.mktemp("spm"), {**fields_of(model), **fields})))
    return found


@given(st.text(" ab\n\taeinrst.,'0123é日本語👋\u0301", max_size=40))
@example("  two  spaces   three    four     five        eight ")
@example(TEXTS["code"])
@example(TEXTS["scripts"])
def test_sentencepieces_own_tokens_of_any_text(pairs: list[tuple[Any, Any]], text: str) -> None:
    for model, tokenizer in pairs:
        ids = model.encode(text)
        assert ids_of(tokenizer, text) == ids
        assert tokenizer.decode(ids) == model.decode(ids)


def test_a_raw_text_goes_on_from_its_prompt(tmp_path: Path) -> None:
    """Prompt and text join as their tokens do, a space between them included, and a stop string may begin with it."""
    tokenizer = tokenizer_of(tmp_path, SENTENCEPIECE)
    kinds = SENTENCEPIECE["token_type"]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "eos_token_id": 2, "bos_token_id": 1}
    tiny_model(tiny_config("llama", **sizes), torch.float32).save_pretrained(tmp_path)
    (tmp_path / "tiny.gguf").unlink()
    swift = TokenSwift.from_pretrained(str(tmp_path), dtype="fp32", engine="torch")
    ban = [token for token, kind in enumerate(kinds) if kind != 1]  # bytes that are no characters decode to anything
    settings: dict[str, Any] = {"raw": True, "max_new_tokens": 4, "temperature": 1.0, "ban": ban}
    prompt, first = tokenizer("in 2024").input_ids, set()
    for seed in range(12):
        result = swift.generate("in 2024", seed=seed, **settings)
        assert "in 2024" + result.text == tokenizer.decode([*prompt, *result.tokens], skip_special_tokens=True)
        first.add(result.text[:1] == " ")
        if result.text[:1] == " ":
            stopped = swift.generate("in 2024", seed=seed, stop=[result.text[:2]], **settings)
            assert (stopped.text, stopped.ending) == ("", "stop")
    assert first == {True, False}


def test_tokens_keep_their_ids_whatever_they_are_spelt_like(tmp_path: Path) -> None:
    """DeepSeek's markup has bars and spaces that no byte is written as."""
    tokenizer = tokenizer_of(tmp_path, {**BYTE_LEVEL, "pre": "deepseek-v3"})
    assert len(tokenizer) == len(BYTE_LEVEL["tokens"])
    assert tokenizer.get_vocab() == {text: token for token, text in enumerate(BYTE_LEVEL["tokens"])}
    ids = ids_of(tokenizer, "<｜begin▁of▁sentence｜>x<｜User｜><tool>")
    assert ids[0] == 2 and ids[2:] == [3, BYTE_LEVEL["tokens"].index("<tool>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<tool>"
    assert set(tokenizer.all_special_tokens) >= {"<｜begin▁of▁sentence｜>", "<|endoftext|>"}
    assert tokenizer.bos_token_id == 2 and tokenizer.eos_token_id == 0


def test_the_chat_template_and_its_tokens_are_the_files(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, {**BYTE_LEVEL, "pre": "qwen2", "chat_template": template})
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<｜begin▁of▁sentence｜><|im_start|>hi<|endoftext|>"


def test_phi_3_drops_the_spaces_behind_its_markup(tmp_path: Path) -> None:
    """Its tokenizer.json and llama.cpp do so."""
    plain, phi = (tokenizer_of(tmp_path, SENTENCEPIECE, name) for name in ("tiny", "Phi-3 mini"))
    assert ids_of(phi, "</s> \n x") == ids_of(plain, "</s>x") != ids_of(plain, "</s> \n x")
    assert ids_of(phi, "<s> x") == ids_of(plain, "<s> x")


def refused(folder: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as error:
        tokenizer_of(folder, {**BYTE_LEVEL, "pre": "qwen2", **fields})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    said = refused(tmp_path, pre="sophia")
    assert "model: tokenizer.ggml.pre: 'sophia' is not allowed; known are a.x-4.0, afmoe" in said
    for model in ("bert", "t5", "rwkv", "plamo2", "none", "whitespace"):
        assert f"model: tokenizer.ggml.model: '{model}' is not allowed" in refused(tmp_path, model=model)


def test_fields_that_do_not_fit_one_another_are_refused(tmp_path: Path) -> None:
    tokens, kinds = BYTE_LEVEL["tokens"], BYTE_LEVEL["token_type"]
    assert "length of tokenizer.ggml.token_type" in refused(tmp_path, token_type=kinds[:-1])
    assert "ids 0 and 1 both have it" in refused(tmp_path, tokens=[tokens[1], *tokens[1:]])
    assert "both pieces and what they make must be tokens" in refused(tmp_path, merges=["a zyxzyx"])
    assert "two pieces with a space between" in refused(tmp_path, merges=["ab"])
    assert "bos_token_id: None is not allowed" in refused(tmp_path, pre="llama-bpe", bos_token_id=None)
    assert "length of tokenizer.ggml.scores: 0" in refused(tmp_path, model="llama")


def test_a_file_that_does_not_say_how_words_are_cut_is_read_as_llama_cpp_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(tmp_path, BYTE_LEVEL)
    assert [ids_of(tokenizer, text) for text in TEXTS.values()] == FOUND["groups"][NAMES["default"]]
    assert "does not say how its tokenizer cuts words" in caplog.text
