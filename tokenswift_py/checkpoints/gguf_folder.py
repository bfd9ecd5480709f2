"""The folder of config and tokenizer that is made of a GGUF file's metadata once, and kept in the cache."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c

from tokenswift_py.checkpoints.cache import cache_folder, cache_name
from tokenswift_py.checkpoints.gguf_config import config_of
from tokenswift_py.checkpoints.gguf_file import GgufFile
from tokenswift_py.checkpoints.gguf_tensors import GgufPlaces
from tokenswift_py.checkpoints.gguf_tokenizer import write_tokenizer
from tokenswift_py.errors import one_line
from tokenswift_py.models.spec import ModelSpec

logger = logging.getLogger("tokenswift")

SUMS = "checksums.json"  # beside what was made from a GGUF file: CRC32C of each file
CONVERSION = 3  # part of the name of converted checkpoints; raised when conversion changes


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
