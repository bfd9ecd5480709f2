"""Where Triton's kernels run: on the GPU if there is one, else in Triton's interpreter on the CPU.

Triton reads the setting when it is first imported, and some of the packages that tests import do so: conftest.py
imports this file before them.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
