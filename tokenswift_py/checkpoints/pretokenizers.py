r"""The rules by which byte-level vocabularies of GGUF files cut a text into words, by `tokenizer.ggml.pre`.

A vocabulary's merges were learned within words, so a text cut otherwise becomes tokens that the model has not seen.
The file has only a name. Its meaning is in llama.cpp (src/llama-vocab.cpp of build b11549, checked against the tokens
that it gives). llama.cpp only comes near some models' training: its regular expressions cannot tell upper from lower
case outside ASCII, and it does not normalise. There the checkpoint's own tokenizer is followed. The original
expressions are those that llama.cpp's source quotes from each tokenizer.json, and the normalisation is that of the
model's tokenizer in transformers. tests/test_gguf_tokenizer.py has both, and names each difference.

Each expression cuts the pieces that the one before left, and parts that it does not match stay pieces. The engine is
Oniguruma's, in which \s and \p{..} are those of Unicode.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s+(?!\S)|\s+"
LINES = r"|\s*[\r\n]+" + SPACES
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + LINES  # neither letters nor digits, and the line's end after them
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + SPACES
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}{OTHERS}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}{OTHERS}"
QWEN35 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + LINES
)  # combining marks belong to words
UFAKZEKA = rf"{WORD}|\p{{N}}{OTHERS}"  # in Turkish an apostrophe comes before suffixes
MINICPM5 = rf"{CONTRACTION}|{WORD}|\p{{N}}+{OTHERS}"
SEED_CODER = rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{LINES}"
BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]{SPACES}"
EXAONE_MOE = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]" + SPACES
)
JOINERS = "\u200c\u200d"
K2_HORIZON = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}{JOINERS}]+|\p{{N}}{{1,3}}{OTHERS}"
JAIS2 = (
    rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s"
)


def cased(upper: str, lower: str, ending: str, digits: str, rest: str) -> str:
    """Returns an expression for words that end where capitals begin again: capitals, then small letters or none."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{rest}" + LINES


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NOT_HAN = r"&&[^\p{Han}]]"
O200K = cased(UPPER, LOWER, f"{CONTRACTION}?", r"\p{N}{1,3}", r"[\r\n/]*")
YOUTU = cased(UPPER, LOWER, f"{CONTRACTION}?", r"\p{N}", r"[\r\n/]*")
TEKKEN = cased(UPPER, LOWER, "", r"\p{N}", r"[\r\n/]*")
# Source: tokenization_kimi.py of moonshotai/Kimi-K2.
KIMI = r"[\p{Han}]+|" + cased(UPPER[:-1] + NOT_HAN, LOWER[:-1] + NOT_HAN, f"{CONTRACTION}?", r"\p{N}{1,3}", r"[\r\n]*")

CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
KOREAN_AND_CHINESE = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + CJK
)
ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
MARKED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
DEEPSEEK3 = MARKED + r"[\r\n]*" + LINES
SPARK = MARKED + r"|[\r\n]" + SPACES
# The letters that have a case, as deepseek-llm's tokenizer.json lists them.
CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    DEEPSEEK_CJK,
    r"\p{N}+",
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
)
THREES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
NEWLINES = r"[^\n]+|[\n]+"


@dataclass(frozen=True)
class PreTokenizer:
    """The rule that a name in `tokenizer.ggml.pre` stands for.

    splits:        expressions that are applied one after another.
    ignore_merges: whether a word that is a token becomes that token, whatever the merges make of it.
    add_bos:       whether a text begins with BOS where the file does not say. None is always, whatever it says.
    nfc:           whether texts are normalised to Unicode's NFC first, like transformers' tokenizers of these models.
    raw:           whether the vocabulary is not byte-level but of characters, with "\u2581" for spaces and a token for
                   each byte.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool | None = False
    nfc: bool = False
    raw: bool = False


def named(names: str, *splits: str, **flags: bool | None) -> dict[str, PreTokenizer]:
    """Gives one rule to several names, which are separated by spaces."""
    return dict.fromkeys(names.split(), PreTokenizer(splits, **flags))  # type: ignore[arg-type]


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **named("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", LLAMA3,
            ignore_merges=True, add_bos=True),
    **named("dbrx smaug-bpe chatglm-bpe", LLAMA3),
    **named("glm4 glm5", LLAMA3, ignore_merges=True),
    **named("jais-2", JAIS2),
    **named("minicpm5", r"\p{N}{1,3}", MINICPM5, ignore_merges=True),
    **named("deepseek-llm", *DEEPSEEK_LLM),
    **named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"),
    **named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", r"\p{N}{1,3}", CJK, DEEPSEEK3),
    **named("spark2_5", r"\p{N}{1,3}", CJK, SPARK, r"\p{N}"),
    **named("youtu", KOREAN_AND_CHINESE, YOUTU, ignore_merges=True),
    **named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **named("starcoder refact smollm codeshell exaone minerva-7b mellum2", r"\p{N}", GPT2),
    **named("command-r", r"\p{N}", GPT2, nfc=True),
    **named("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe a.x-4.0 "
            "mellum modern-bert jais trillion granite-docling exaone4", GPT2),
    **named("mpt olmo", GPT2, nfc=True),  # both have GPT-NeoX's tokenizer
    **named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez", QWEN2, nfc=True),
    **named("stablelm2 hunyuan solar-open grok-2", QWEN2),
    **named("qwen35", QWEN35, nfc=True),
    **named("ufakzeka", UFAKZEKA),
    **named("poro-chat bloom gpt3-finnish", BLOOM),
    **named("viking", BLOOM, r"\p{N}"),
    **named("tekken", TEKKEN, ignore_merges=True, add_bos=True),
    **named("chameleon", *CHAMELEON, add_bos=True),
    **named("gpt-4o llama4 kanana2 talkie minimax-m2", O200K),
    **named("granite-embed-multi-97m", O200K, ignore_merges=True),
    **named("tiny_aya cohere2moe", r"\d{1,3}(?=(?:\d{3})*\b)", O200K),
    **named("kimi-k2", KIMI),
    **named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **named("bailingmoe bailingmoe2 llada-moe", BAILING),
    **named("seed-coder", SEED_CODER),
    **named("afmoe", THREES_FROM_THE_RIGHT, ASIAN, DEEPSEEK3),
    **named("laguna", NEWLINES, QWEN2),
    **named("exaone-moe", EXAONE_MOE),
    **named("k2-horizon", K2_HORIZON),
    **named("gemma4 granite-embed-multi-311m", NEWLINES, add_bos=None, raw=True),
    **named("sarvam-moe", NEWLINES, raw=True),
}  # fmt: skip
