"""For a repository on a hub: `model.generate(..., custom_generate="owner/name", trust_remote_code=True)`."""

from typing import Any

from tokenswift_py import hf


def generate(inputs: Any = None, *, model: Any, **arguments: Any) -> Any:
    """What `model.generate` writes, by speculation; takes what it takes, and `tokenswift`."""
    return hf.generate(model, inputs, **arguments)
