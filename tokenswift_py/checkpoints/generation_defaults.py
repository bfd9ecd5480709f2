"""Honours generation_config.json like transformers, or says in one line why not. Nothing is dropped without a word.

Source: transformers' GenerationConfig and the processors that `generate` makes of it. A field that is missing or null
        has transformers' default. Fields are not looked at if a parameter of our own always decides them
        (max_new_tokens), or if they cannot change a text (use_cache).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenswift_py.errors import UserError, check, shown
from tokenswift_py.sampling.params import described_parameters

NAME = "generation_config.json"
# These are transformers' defaults with do_sample.
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
ANYWAY = ("repetition_penalty", "no_repeat_ngram_size")  # these act without do_sample, too

READ = ("do_sample", "suppress_tokens", "bad_words_ids", "eos_token_id")
# These values leave the text as it is. The values false, null and empty do so for any field.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "repetition_penalty": (1.0,),
    "min_length": (0,), "min_new_tokens": (0,), "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0.0,),
    "guidance_scale": (1.0,), "encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,),
    "num_return_sequences": (1,), **{name: (value,) for name, value in SAMPLING.items()}, "top_k": (0, 50),
}  # fmt: skip
# These are fields that our own parameters decide in any case, those that only beams have, and those that change only
# the speed.
UNREAD = frozenset(
    (
        "max_length", "max_new_tokens", "bos_token_id", "pad_token_id", "decoder_start_token_id", "length_penalty",
        "early_stopping", "renormalize_logits", "transformers_version", "use_cache", "use_mtp", "cache_implementation",
        "cache_config", "max_cache_len", "return_legacy_cache", "output_attentions", "output_hidden_states",
        "output_scores", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
        "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
        "assistant_ensemble_weight", "speculation_type",
    )
)  # fmt: skip


def generation_defaults(folder: Path, config: Any) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Returns the sampling parameters of generation_config.json, under our names, and its EOS ids. If it has none, the
    config's EOS ids are returned."""
    values = read(folder)
    eos = values.get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return sampling_defaults(values, ids, int(getattr(config, "vocab_size", 0))), ids


def sampling_defaults(values: Mapping[str, Any], eos: tuple[int, ...], vocab: int) -> dict[str, Any]:
    """Returns the parameters that differ from plain greedy decoding."""
    defaults: dict[str, Any] = {}
    if values.get("do_sample"):
        asked = {name: values[name] for name in SAMPLING if values.get(name) is not None}
        defaults |= {"temperature": SAMPLING["temperature"], "top_k": SAMPLING["top_k"], **asked}
    defaults |= {name: values[name] for name in ANYWAY if values.get(name) and is_allowed(name, values[name])}
    words = [tuple(word) for word in values.get("bad_words_ids") or () if len(word) > 1 or word[0] not in eos]
    single = [word[0] for word in words if len(word) == 1]
    ban = {token for token in (*(values.get("suppress_tokens") or ()), *single) if 0 <= token < vocab}
    longer = tuple(word for word in words if len(word) > 1 and all(0 <= token < vocab for token in word))
    return defaults | ({"ban": tuple(sorted(ban))} if ban else {}) | ({"ban_words": longer} if longer else {})


def is_allowed(name: str, value: Any) -> bool:
    """Returns whether a value is one that our parameter of this name takes."""
    try:
        described_parameters()[name].kind.check(name, value)
    except UserError:
        return False
    return True


def not_honoured(folder: Path) -> str:
    """Returns the fields that would change the text in transformers and do not here, as `name value, name value`."""
    values = {name: value for name, value in read(folder).items() if value}
    if values.get("do_sample"):
        values = {name: value for name, value in values.items() if name not in SAMPLING}
    known = (*READ, *UNREAD, *(name for name in ANYWAY if name in values and is_allowed(name, values[name])))
    left = {
        name: value
        for name, value in values.items()
        if name not in known and not name.startswith("_") and value not in NEUTRAL.get(name, ())
    }
    return ", ".join(f"{name} {shown(value)}" for name, value in left.items())


def read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check(isinstance(values, dict), NAME, values, "names with their values")
    return dict(values)
