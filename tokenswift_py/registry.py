"""The registry is the folder: a drafter, a policy or a backend is one file that defines one name. This is a leaf."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tokenswift_py.errors import check

# The files that implementations have in common.
SHARED = (
    "base", "chain", "dflash_layers", "draft_folders", "eagle_files", "eagle_layer", "eagle_training", "head_files",
    "head_weights", "own_layers", "training", "views",
)  # fmt: skip


def names(package: str) -> list[str]:
    """Returns the names of a folder's implementations: its public files, without `SHARED` ones."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name not in SHARED and not m.name.startswith("_"))


def module(package: str, field: str, name: str) -> Any:
    """Imports file `name` of the folder. Raises UserError, naming `field`, if there is none."""
    known = names(package)
    check(name in known, field, name, f"known are {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")


def says(package: str, field: str, name: str, attribute: str, default: Any) -> Any:
    """Returns what file `name` of the folder says of its implementation before one is made, or the default."""
    return getattr(module(package, field, name), attribute, default)


def create(package: str, attribute: str, field: str, name: str, **settings: Any) -> Any:
    """Calls `attribute` of file `name` of the folder. Raises UserError, naming `field`, if there is no such file."""
    return getattr(module(package, field, name), attribute)(**settings)
