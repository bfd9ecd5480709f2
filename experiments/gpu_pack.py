"""Packs the files for a machine without a network, and joins them there.

There are two loads, each small enough for one transfer. The first has wheels of packages that are missing there and one
half of the default model's file, the second has the other half. Modules that need these packages are imported only
after they are joined.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenswift_py.errors import check

LIMIT = 64 * 2**20  # the most bytes of a load
# Distributions and the names they are imported by. Those that the machine has are left alone.
WHEELS = {
    "gguf": "gguf", "google-crc32c": "google_crc32c", "pytest": "pytest", "iniconfig": "iniconfig",
    "pluggy": "pluggy", "packaging": "packaging", "pygments": "pygments", "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
}  # fmt: skip
THERE = ("--only-binary=:all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64",
         "--platform", "manylinux2014_x86_64", "--platform", "any")  # fmt: skip


def finding() -> Any:
    return importlib.import_module("tokenswift_py.checkpoints.finding")


def pack(folder: Path, model: Path | None = None) -> list[Path]:
    """Makes the two loads, as folders `first` and `second`. model: a .gguf file. None is the default model's.

    Raises UserError where wheels cannot be fetched, and for a load that is too large.
    """
    first, second = loads = [folder / "first", folder / "second"]
    for load in loads:
        shutil.rmtree(load, ignore_errors=True)
        load.mkdir(parents=True)
    data = (model or finding().kept_default_gguf()).read_bytes()
    (first / "model").write_bytes(data[: len(data) // 2])
    (second / "model").write_bytes(data[len(data) // 2 :])
    pip("download", "--quiet", "--no-deps", *THERE, "--dest", str(first / "wheels"), *WHEELS)
    for load in loads:
        size = sum(file.stat().st_size for file in load.rglob("*") if file.is_file())
        check(size < LIMIT, f"pack: bytes of {load.name}", size, f"less than {LIMIT}")
    return loads


def join(folder: Path) -> list[str]:
    """Joins the loads that have come so far, and returns a line for each part. Raises UserError for a damaged model.

    The model's file goes to its place in the package that it is from, where it is looked for first.
    """
    told = []
    wheels = folder / "first" / "wheels"
    if wheels.is_dir():
        missing = [name for name, module in WHEELS.items() if importlib.util.find_spec(module) is None]
        if missing:
            site = str(folder / "site")
            offline = ("--no-index", "--no-deps", "--find-links", str(wheels))
            pip("install", "--quiet", *offline, "--target", site, *missing)
        told.append(f"installed: {', '.join(missing) or 'nothing, all is there'}")
    use(folder)
    halves = [folder / load / "model" for load in ("first", "second")]
    if all(half.is_file() for half in halves):
        model = folder / "site" / finding().DEFAULT_MEMBER
        model.parent.mkdir(parents=True, exist_ok=True)
        fresh = model.with_name("joined")
        fresh.write_bytes(b"".join(half.read_bytes() for half in halves))
        finding().checked_default(fresh).replace(model)
        (model.parent / "__init__.py").touch()
        told.append(f"the model: {model}")
    else:
        told.append("the model: " + ", ".join(f"no {half}" for half in halves if not half.is_file()))
    return told


def use(folder: Path) -> None:
    """Lets Python find the packages that `join` installed."""
    site = str((folder / "site").resolve())
    if site not in sys.path:
        sys.path.append(site)
    importlib.invalidate_caches()


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    reason = (done.stderr.strip().splitlines() or [""])[-1]
    check(done.returncode == 0, "pip", arguments[0], f"it must succeed: {reason}")
