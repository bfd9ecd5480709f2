"""Ultra-long outputs from language models, several times faster, without changing one token."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from tokenswift_py.version import __version__ as __version__

# In a checkout drafters/, kvcache/ and kernels/ stand beside this folder; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if all((_root / name).is_dir() for name in ("drafters", "kvcache", "kernels")) and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))


if TYPE_CHECKING:
    from tokenswift_py.api import TokenSwift as TokenSwift
    from tokenswift_py.core import SamplingParams as SamplingParams
    from tokenswift_py.errors import UserError as UserError
    from tokenswift_py.options import Options as Options
    from tokenswift_py.runs.audit import audit as audit
    from tokenswift_py.runs.result import Result as Result

_HOME = {
    "Options": "options",
    "Result": "runs.result",
    "SamplingParams": "core",
    "TokenSwift": "api",
    "UserError": "errors",
    "audit": "runs.audit",
}
__all__ = ["Options", "Result", "SamplingParams", "TokenSwift", "UserError", "__version__", "audit"]


def __getattr__(name: str) -> Any:
    """Imports on first use. torch and transformers take seconds, which `tokenswift --help` does not need."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
