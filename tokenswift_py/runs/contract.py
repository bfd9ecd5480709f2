"""Everything that a run's text is a function of, recorded in its journal and compared when the run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenswift_py.checkpoints.cache import sha256
from tokenswift_py.checkpoints.checkpoint import Checkpoint, model_fingerprint
from tokenswift_py.errors import check
from tokenswift_py.options import LANGUAGES, described_options
from tokenswift_py.version import __version__

if TYPE_CHECKING:
    from tokenswift_py.loaded import LoadedModel

# These options change how fast a text is written, never the text.
SPEED_ONLY = [name for name, described in described_options().items() if not described.changes_text]
SPEED_ONLY.append("kv_gates")  # which says where a file lies; the numerics name what is in it
# A run that is extended has more of these. `numerics` says whether positions are met as before.
GROWING = ("max_new_tokens", "context")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def header(
    loaded: LoadedModel, prompt: list[int], parameters: dict[str, Any], numerics: str, guarantee: str,
    eos: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Returns the header of a run's journal: everything that is needed to write its text again."""
    return {
        "program": f"tokenswift-py {__version__}",
        "origin": dict(loaded.origin),
        "model": model_fingerprint(loaded.checkpoint),
        "tokenizer": tokenizer_fingerprint(loaded.checkpoint),
        "eos": list(eos),
        "numerics": numerics,
        "guarantee": guarantee,
        **({"grammar": loaded.vocabulary.version} if any(parameters[name] for name in LANGUAGES) else {}),
        "parameters": parameters,
        "prompt": prompt,
    }


def check_same(recorded: Mapping[str, Any], now: Mapping[str, Any], numerics: bool = True) -> None:
    """Raises UserError with the first difference between two headers that can change the text.

    numerics: whether the arithmetic must be the same, too.
    """
    theirs, ours = recorded["model"], now["model"]
    for name in (*theirs, *(name for name in ours if name not in theirs)):
        then = theirs.get(name)
        check(ours.get(name) == then, f"model: {name}", ours.get(name), f"the run was written with {then!r} (SHA-256)")
    for name in ("tokenizer", "eos", *(("numerics", "grammar") if numerics else ())):
        then = recorded.get(name)
        check(now.get(name) == then, name, now.get(name), f"the run was written with {then!r}")
    for name, value in recorded["parameters"].items():
        if name not in (*SPEED_ONLY, *GROWING):
            check_parameter(name, now["parameters"].get(name), value)


def check_parameter(name: str, value: Any, recorded: Any) -> None:
    plain = json.loads(json.dumps(value, default=list))
    check(plain == recorded, name, value, f"the run was written with {recorded!r}")


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str:
    """Returns the SHA-256 of the tokenizer's files, names included."""
    digest = hashlib.sha256()
    for path in (checkpoint.folder / name for name in TOKENIZER_FILES):
        if path.is_file():
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
