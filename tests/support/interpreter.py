"""Chooses where Triton's kernels run: on the GPU if there is one, else in Triton's interpreter on the CPU.

Triton reads the setting when it is first imported, and some packages that tests use import it. So conftest.py imports
this file before them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def product(builder: Any, a: Any, b: Any, d: Any, precision: Any, most_imprecise: Any) -> Any:
    """Computes tl.dot so that rows round alike wherever they stand in a tile, like a matrix unit's.

    The interpreter's own is numpy's, whose BLAS on some CPUs rounds the last rows of a product unlike the first.
    """
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.einsum("...mk,...kn->...mn", a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


if INTERPRETED and find_spec("triton") is not None:
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = product
