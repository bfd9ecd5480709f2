"""Keeps full pages of a run's KV cache beside its journal, so that a resumed run need not compute them again.

A committed page never changes, so shards of SHARD pages are written once, and a later session adds further shards.
Each is a safetensors file with a CRC32C for every page. Its metadata name everything that its bits depend on: the
numerics, and the hash of all tokens up to its end. Where several ranks hold a model, each rank keeps files of its own
KV heads, and they are used as far as all ranks have theirs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokenswift_py.core import IntArray
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.parallel.ranks import ALONE, Ranks

logger = logging.getLogger("tokenswift")

FOLDER = "kv"
SHARD = 16  # the pages of a file
ROWS = SHARD * PAGE_SIZE


def save(run: Path, cache: KVCache, tokens: IntArray, numerics: str, ranks: Ranks = ALONE) -> None:
    """Writes the shards that a run's folder lacks. A shard that cannot be written ends them, with a line to the log."""
    folder = run / FOLDER
    for shard in range(cache.length // ROWS):
        path = shard_path(folder, shard, ranks)
        fresh = path.with_suffix(".new")
        if path.exists():
            continue
        pages = np.stack([cache.pool.dump(int(page)) for page in cache.pages[shard * SHARD : (shard + 1) * SHARD]])
        try:
            folder.mkdir(parents=True, exist_ok=True)  # a rank on another machine than rank 0 has no run's folder
            metadata = identity(tokens, shard, numerics, ranks)
            save_file({"pages": pages, "crc32c": checksums(pages)}, fresh, metadata)
            fresh.replace(path)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
            with suppress(OSError):
                fresh.unlink()
            logger.warning("the KV snapshot ends at token %d: %s", shard * ROWS, " ".join(str(error).split()))
            return


def load(
    run: Path,
    cache: KVCache,
    tokens: IntArray,
    numerics: str,
    stop: int,
    progress: Callable[[int], None],
    ranks: Ranks = ALONE,
) -> None:
    """Fills an empty cache with the rows before position `stop`, as far as there are whole shards of these tokens.

    A shard that is damaged, or of other tokens or numerics, is removed with all after it, with a line to the log.
    Raises ValueError for a cache that is not empty.
    """
    if cache.length:
        raise ValueError(f"a snapshot begins at position 0, and the cache holds {cache.length} rows")
    for shard in range(stop // ROWS):
        path = shard_path(run / FOLDER, shard, ranks)
        there = path.exists()
        pages = read(path, identity(tokens, shard, numerics, ranks), cache.pool.page_bytes) if there else None
        if there and pages is None:
            logger.warning("%s is not of this run, or damaged: computing the KV from token %d on", path, shard * ROWS)
            for later in sorted((run / FOLDER).glob(f"{'[0-9]' * 6}{suffix(ranks)}"))[shard:]:
                later.unlink()
        if not ranks.all(np.array([pages is not None])).all():
            return
        assert pages is not None
        cache.adopt(pages)
        progress(ROWS)


def read(path: Path, identity: dict[str, str], page_bytes: int) -> np.ndarray | None:
    """Reads the pages of a file, [SHARD, page_bytes]. Returns None unless all of it is as it was written."""
    try:
        with safe_open(path, "np") as file:
            if file.metadata() != identity:
                return None
            pages, sums = file.get_tensor("pages"), file.get_tensor("crc32c")
    except Exception:  # safetensors and numpy raise every kind at a damaged file
        return None
    whole = pages.shape == (SHARD, page_bytes) and pages.dtype == np.uint8
    return pages if whole and np.array_equal(sums, checksums(pages)) else None


def checksums(pages: np.ndarray) -> np.ndarray:
    """Returns the CRC32C of each page, [n]."""
    return np.array([google_crc32c.value(page.tobytes()) for page in pages], np.int64)


def identity(tokens: IntArray, shard: int, numerics: str, ranks: Ranks = ALONE) -> dict[str, str]:
    prefix = np.ascontiguousarray(tokens[: (shard + 1) * ROWS], "<i4").tobytes()
    own = {"rank": f"{ranks.rank} of {ranks.world}"} if ranks.world > 1 else {}
    return {"numerics": numerics, "tokens": hashlib.sha256(prefix).hexdigest(), "shard": str(shard), **own}


def shard_path(folder: Path, shard: int, ranks: Ranks = ALONE) -> Path:
    return folder / f"{shard:06d}{suffix(ranks)}"


def suffix(ranks: Ranks) -> str:
    own = f"-{ranks.rank}of{ranks.world}" if ranks.world > 1 else ""
    return f"{own}.safetensors"
