"""Ultra-long outputs from language models, several times faster, without changing one token."""

from pathlib import Path as _Path

# In a checkout drafters/, kvcache/ and kernels/ stand beside this folder; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if all((_root / name).is_dir() for name in ("drafters", "kvcache", "kernels")) and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

from tokenswift_py.api import Result, TokenSwift  # noqa: E402 - the folders above must be found first
from tokenswift_py.core import SamplingParams  # noqa: E402
from tokenswift_py.errors import UserError  # noqa: E402
from tokenswift_py.options import Options  # noqa: E402

__all__ = ["Options", "Result", "SamplingParams", "TokenSwift", "UserError", "__version__"]
