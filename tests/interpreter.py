"""Without a GPU, Triton's kernels run in its interpreter. Triton reads the setting when it is first imported, and some
of the packages that tests import do so: conftest.py imports this file before them."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
