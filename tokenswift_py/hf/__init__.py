"""Inside transformers: `model.generate(..., custom_generate=tokenswift_py.hf.generate)` (docs/transformers.md)."""

from tokenswift_py.hf.custom import generate as generate
from tokenswift_py.hf.held import forget as forget

__all__ = ["forget", "generate"]
