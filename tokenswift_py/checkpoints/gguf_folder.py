"""Makes a folder of config and tokenizer from a GGUF file's metadata, once, and keeps it in the cache."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c

from tokenswift_py.checkpoints.cache import WRITABLE, cache_folder, cache_name
from tokenswift_py.checkpoints.generation_defaults import NAME
from tokenswift_py.checkpoints.gguf_config import config_of, generation_of
from tokenswift_py.checkpoints.gguf_file import GgufFile
from tokenswift_py.checkpoints.gguf_tensors import GgufIndex
from tokenswift_py.checkpoints.gguf_tokenizer import write_tokenizer
from tokenswift_py.errors import files, one_line
from tokenswift_py.models.spec import ModelSpec

logger = logging.getLogger("tokenswift")

SUMS = "checksums.json"  # the CRC32C of each file that was made from a GGUF file
CONVERSION = 4  # part of the folder's name; raise it when the conversion changes


def describe_gguf(file: GgufFile) -> Path:
    """Returns the folder with config and tokenizer of a GGUF file, written once into the cache folder.

    Raises UserError for a model of another family than ours, and where the tensors do not fit the metadata.
    """
    from transformers import AutoConfig

    folder = cache_folder() / f"{cache_name(*file.parts)}-{CONVERSION}-config"
    with files("model", folder, "what was made of it must be readable; TOKENSWIFT_CACHE names another folder"):
        if usable(folder):
            return folder
    with one_line(f"model: {file.name} is not a readable GGUF file"):
        config = config_of(file)
        GgufIndex(file, ModelSpec.from_config(AutoConfig.for_model(**config)))
        with files("model", folder.parent, WRITABLE):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.parent):
            if not usable(folder):  # another process may have made it while this one waited
                make(file, config, folder)
    return folder


def make(file: GgufFile, config: Mapping[str, Any], folder: Path) -> None:
    """Makes the folder beside its place and moves it there whole, so that an interrupted run leaves no half of one."""
    with files("model", folder.parent, WRITABLE):
        beside = tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True)
    with beside as scratch:
        made = Path(scratch) / folder.name  # with the permissions of a new folder; the scratch is its owner's alone
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if generation := generation_of(file):
            (made / NAME).write_text(json.dumps(generation, indent=1), encoding="utf-8")
        write_tokenizer(file, made)
        (made / SUMS).write_text(json.dumps(checksums(path for path in made.iterdir()), indent=1))
        if folder.is_dir():
            logger.warning("%s is damaged: made again", folder)
            folder.rename(Path(scratch) / "damaged")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def usable(folder: Path) -> bool:
    """Returns whether a folder made from a GGUF file exists and is as it was written.

    A folder without checksums, from an earlier version, counts as usable.
    """
    if not (folder / SUMS).is_file():
        return folder.is_dir()
    try:
        recorded = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return bool(recorded == checksums(folder / name for name in recorded))
    except (OSError, ValueError, TypeError):
        return False


def checksums(files: Iterable[Path]) -> dict[str, int]:
    """Returns the CRC32C of each file, by its name."""
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
    """Lets one process at a time in. Some network folders have no locks: then all enter, which only costs work."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
