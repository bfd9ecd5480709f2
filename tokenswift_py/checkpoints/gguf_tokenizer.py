"""Builds the tokenizer of a GGUF file from the file's own fields. It gives the same tokens as llama.cpp.

transformers reads only the tokens and merges of these fields. A byte-level vocabulary (`tokenizer.ggml.model` gpt2) is
cut into words by the rule that `tokenizer.ggml.pre` names (pretokenizers.py). A SentencePiece one (llama) has scores in
place of merges. Source of the fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Source of the defaults
and of the effects of token types: load and tokenizer_st_partition in llama.cpp's src/llama-vocab.cpp.

Unlike llama.cpp and transformers, decoding does not clean up spaces before punctuation, so that a text's tokens give
back the text.
"""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenswift_py.checkpoints.gguf_file import GgufFile
from tokenswift_py.checkpoints.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from tokenswift_py.errors import check

logger = logging.getLogger("tokenswift")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
BYTE_LEVEL, SENTENCEPIECE = ("gpt2", "gemma4"), "llama"
SPACE = "\u2581"
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names and the file's
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # for a file that does not name them
# Tokens with these texts end a text in llama.cpp, whether or not a file says so.
ENDING_TEXTS = (
    "</s> <EOT> <end_of_turn> <end_of_utterance> <eos> <turn|> <|calls|> <|call|> <|end_of_text|> <|endoftext|> "
    "<|end|> <|eom_id|> <|eot_id|> <|flush|> <|ifm|im_end|> <|im_end|> <|return|> <|tool_response> [EOS] [EOT] "
    "[e~[ _<EOT> <\uff5cend\u2581of\u2581sentence\uff5c>"
)
# These are the marks of code that is to be filled in.
FILLING_TEXTS = (
    "<MID> <PAD> <PRE> <REPO> <SUF> <fim-middle> <fim-pad> <fim-prefix> <fim-repo> <fim-suffix> <fim_middle> "
    "<fim_pad> <fim_prefix> <fim_suffix> <reponame> <|code_middle|> <|code_prefix|> <|code_suffix|> <|file_sep|> "
    "<|fim_middle|> <|fim_pad|> <|fim_prefix|> <|fim_repo|> <|fim_suffix|> <|middle|> <|prefix|> <|repo_name|> "
    "<|suffix|> [PAD] \u2581<MID> \u2581<PRE> \u2581<SUF> <\uff5cfim\u2581begin\uff5c> "
    "<\uff5cfim\u2581end\uff5c> <\uff5cfim\u2581hole\uff5c>"
)
ENDINGS = frozenset(ENDING_TEXTS.split())
MARKUP = ENDINGS.union(FILLING_TEXTS.split())  # even where a file calls these tokens normal
PHI3_KEEPS_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # spaces after its other markup tokens are dropped


@dataclass(frozen=True)
class Vocabulary:
    """The fields of one file that are about its tokenizer.

    tokens, types: text and type of each id.
    scores:        score of each id, for SentencePiece only.
    merges:        pairs of pieces, in the order in which they are merged.
    named:         ids by transformers' names: bos, eos, unk, pad.
    charsmap:      SentencePiece's compiled table of replaced characters.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    named: dict[str, int]
    add_bos: bool | None
    add_eos: bool
    space_prefix: bool
    one_space: bool
    charsmap: bytes
    chat_template: str | None
    strips: bool

    @classmethod
    def read(cls, file: GgufFile) -> Vocabulary:
        """Reads the fields of a file. Raises UserError for a field that is missing or does not fit the others."""
        metadata = file.metadata

        def field(name: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{name}", default)

        model = field("model")
        allowed = f"read are {', '.join(BYTE_LEVEL)} and {SENTENCEPIECE}; a folder of the same model has tokenizer.json"
        check(model in (*BYTE_LEVEL, SENTENCEPIECE), "model: tokenizer.ggml.model", model, allowed)
        tokens = tuple(text or f"[EMPTY_{token}]" for token, text in enumerate(field("tokens", [])))
        check(bool(tokens), "model: tokenizer.ggml.tokens", None, "the file must have them")
        types, scores = field("token_type", [NORMAL] * len(tokens)), field("scores", [])
        for name, values in {"token_type": types, "scores": scores}.items():
            fits = len(values) == len(tokens) or (name == "scores" and not len(values) and model in BYTE_LEVEL)
            check(fits, f"model: length of tokenizer.ggml.{name}", len(values), f"one for each of {len(tokens)} tokens")
        chat_template = metadata.get("tokenizer.chat_template")
        phi3 = str(metadata.get("general.name", "")).lower()
        return cls(
            model,
            "gemma4" if model == "gemma4" else field("pre", ""),
            tokens,
            tuple(map(int, types)),
            tuple(map(float, scores)),
            tuple(pair_of(merge) for merge in field("merges", [])),
            named_ids(model, field, len(tokens)),
            field("add_bos_token"),
            bool(field("add_eos_token", False)),
            bool(field("add_space_prefix", True)),
            bool(field("remove_extra_whitespaces", False)),
            bytes(value & 255 for value in field("precompiled_charsmap", [])),
            None if chat_template is None else str(chat_template),
            "phi-3" in phi3 or "phi3" in phi3,
        )

    def __post_init__(self) -> None:
        seen = self.ids
        if len(seen) < len(self.tokens):
            token = next(token for token, text in enumerate(self.tokens) if seen[text] != token)
            self.refuse("tokens", self.tokens[token], f"ids {token} and {seen[self.tokens[token]]} both have it")

    def refuse(self, name: str, value: object, allowed: str) -> None:
        check(False, f"model: tokenizer.ggml.{name}", value, allowed)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.tokens)}

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that are no text: control tokens, unknown tokens, and tokens that are markup by their text."""
        ends = {self.named[name] for name in ("bos", "eos") if name in self.named}
        return frozenset(
            token
            for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, UNKNOWN) or text in MARKUP or (token in ends and is_markup(text))
        )

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before it is cut into words, in tokenizer.json's form."""
        special = self.special
        return [
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": self.strips and text not in PHI3_KEEPS_SPACES,
                "normalized": False,
                "special": token in special,
            }
            for token, text in enumerate(self.tokens)
            if token in special or self.types[token] == USER_DEFINED
        ]


def pair_of(merge: str) -> tuple[str, str]:
    """Returns the two pieces of a merge. They part at the first space that does not begin the first piece."""
    at = merge.find(" ", 1)
    check(at > 0, "model: tokenizer.ggml.merges", merge, "two pieces with a space between")
    return merge[:at], merge[at + 1 :]


def is_markup(text: str) -> bool:
    return len(text) > 2 and text[0] in "<[" and text[-1] in ">]"


def named_ids(model: str, field: Any, size: int) -> dict[str, int]:
    """Returns the ids of bos, eos, unk and pad. Ids that no token has are left out, like in llama.cpp."""
    defaults = SENTENCEPIECE_IDS if model == SENTENCEPIECE else {}
    ids = {name: field(f"{theirs}_token_id", defaults.get(name)) for name, theirs in NAMED.items()}
    return {name: int(token) for name, token in ids.items() if token is not None and 0 <= token < size}


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template of a GGUF file, for `Checkpoint.tokenizer`.

    Raises UserError for a tokenizer that is not known, or whose fields do not fit one another.
    """
    vocabulary = Vocabulary.read(file)
    backend = sentencepiece(vocabulary) if vocabulary.model == SENTENCEPIECE else byte_level(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    special, named = vocabulary.special, vocabulary.named
    tokens = {f"{name}_token": vocabulary.tokens[token] for name, token in named.items() if token in special}
    config = {
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    if vocabulary.chat_template:
        (folder / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")


def byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the tokenizer.json of a vocabulary with merges, most often one of bytes."""
    pre = pre_tokenizer(vocabulary)
    merges = [list(pair) for pair in dict.fromkeys(vocabulary.merges)]
    ids = vocabulary.ids
    for left, right in merges:
        if not {left, right, left + right} <= ids.keys():
            vocabulary.refuse("merges", f"{left} {right}", "both pieces and what they make must be tokens")
    add_bos = pre.add_bos if vocabulary.add_bos is None else vocabulary.add_bos
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in pre.splits
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return tokenizer_json(
        vocabulary,
        model={**bpe(ids, merges, vocabulary, pre.raw), "ignore_merges": pre.ignore_merges},
        normalizer=[replace(" ", SPACE)] if pre.raw else [{"type": "NFC"}] if pre.nfc else [],
        pre_tokenizer={"type": "Sequence", "pretokenizers": splits if pre.raw else [*splits, bytes_]},
        decoder=characters() if pre.raw else bytes_,
        add_bos=pre.add_bos is None or bool(add_bos),
    )


def pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.pre
    if not name:
        logger.warning("model: the file does not say how its tokenizer cuts words; taken is llama.cpp's default")
    known = f"known are {', '.join(sorted(PRE_TOKENIZERS))}; a folder of the same model has tokenizer.json"
    check((name or "default") in PRE_TOKENIZERS, "model: tokenizer.ggml.pre", name, known)
    return PRE_TOKENIZERS[name or "default"]


def sentencepiece(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the tokenizer.json of a SentencePiece vocabulary of type BPE, whose scores order the merges."""
    prefix = vocabulary.space_prefix
    steps: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": b64encode(vocabulary.charsmap).decode()})
    if vocabulary.one_space:
        steps += [replace({"Regex": r"\A +| +\z"}, ""), replace({"Regex": " +"}, " ")]
    if prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return tokenizer_json(
        vocabulary,
        model=bpe(vocabulary.ids, merges_by_score(vocabulary), vocabulary, True),
        normalizer=[*steps, replace(" ", SPACE)],
        pre_tokenizer=None,
        decoder=characters({"type": "Strip", "content": " ", "start": 1, "stop": 0} if prefix else None),
        add_bos=vocabulary.add_bos is not False,
    )


def merges_by_score(vocabulary: Vocabulary) -> list[list[str]]:
    """Returns every way to make a token of two others, ordered from the highest score to the lowest.

    SentencePiece merges the pair that makes the token of the highest score, the leftmost of equals first.
    """
    ids, kept = vocabulary.ids, (NORMAL, UNUSED)
    pieces = {text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in kept}
    found = [
        (-vocabulary.scores[ids[piece]], ids[piece], ids[piece[:at]], ids[piece[at:]])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, _, left, right in sorted(found)]


def bpe(ids: dict[str, int], merges: Sequence[Any], vocabulary: Vocabulary, fallback: bool) -> dict[str, Any]:
    """Returns a BPE model. fallback: whether characters that are no token become the tokens of their bytes."""
    unknown = vocabulary.named.get("unk")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.tokens[unknown] if fallback and unknown is not None else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fallback,
        "byte_fallback": fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def replace(pattern: str | dict[str, str], content: str) -> dict[str, Any]:
    return {
        "type": "Replace",
        "pattern": {"String": pattern} if isinstance(pattern, str) else pattern,
        "content": content,
    }


def characters(last: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the decoder of a vocabulary of characters that has a token for each byte, too."""
    steps = [replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *([last] if last else [])]
    return {"type": "Sequence", "decoders": steps}


def tokenizer_json(
    vocabulary: Vocabulary,
    model: dict[str, Any],
    normalizer: Sequence[dict[str, Any]],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    add_bos: bool,
) -> dict[str, Any]:
    around = {"bos": add_bos, "eos": vocabulary.add_eos}
    for name, wanted in around.items():
        if wanted and name not in vocabulary.named:
            vocabulary.refuse(f"{name}_token_id", None, f"the file's texts have {name.upper()} around them: which?")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added,
        "normalizer": {"type": "Sequence", "normalizers": list(normalizer)} if normalizer else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": surrounded(vocabulary, [name for name, wanted in around.items() if wanted]),
        "decoder": decoder,
        "model": model,
    }


def surrounded(vocabulary: Vocabulary, names: Iterable[str]) -> dict[str, Any]:
    """Returns the post-processor that puts BOS before a text and EOS after it, as far as they are in `names`."""
    ids = {vocabulary.tokens[vocabulary.named[name]]: vocabulary.named[name] for name in names}

    def template(sequence: str, kind: int) -> list[dict[str, Any]]:
        parts = {name: special(vocabulary.tokens[vocabulary.named[name]], kind) for name in names}
        text = {"Sequence": {"id": sequence, "type_id": kind}}
        return [part for part in (parts.get("bos"), text, parts.get("eos")) if part]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in ids.items()},
    }


def special(text: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": kind}}
