"""Triton kernels for CUDA and ROCm: attention, and operations for which torch would launch several kernels.

Importing this folder does not import triton; making the backend does.
"""

from __future__ import annotations

from tokenswift_py.errors import need_extra
from tokenswift_py.kernels.base import AttentionBackend


def create() -> AttentionBackend:
    """Makes the backend. Raises UserError with the line that installs triton where it is missing."""
    need_extra("attention", "triton", "triton")
    from tokenswift_py.kernels.triton.attention import TritonAttention

    return TritonAttention()


BACKEND = create
CAPS_SCORES = True
