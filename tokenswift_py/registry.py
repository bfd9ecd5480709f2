"""The registry is the folder: a drafter, a policy or a backend is one file that defines one name. A leaf module."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tokenswift_py.errors import check

SHARED = ("base", "chain", "head_files", "head_weights", "training")  # what implementations have in common


def names(package: str) -> list[str]:
    """The files of a folder of implementations, the public ones only; `SHARED` ones implement nothing."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name not in SHARED and not m.name.startswith("_"))


def module(package: str, field: str, name: str) -> Any:
    """File `name` of the folder. Raises UserError, naming `field`, if there is none."""
    known = names(package)
    check(name in known, field, name, f"known are {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")


def create(package: str, attribute: str, field: str, name: str, **settings: Any) -> Any:
    """Make what file `name` of the folder calls `attribute`. Raises UserError, naming `field`, if there is none."""
    return getattr(module(package, field, name), attribute)(**settings)
