"""Strided blocks: pages at even distances over the whole text (Sparse Transformer's strides, arXiv 1904.10509)."""

from __future__ import annotations

from tokenswift_py.kvcache.policies.base import Array, ByPlace


class Block(ByPlace):
    """Scores a page by the stride that it stands on, so that every s-th page is chosen, with the least s that fits.

    Of those half as far apart the latest fill the budget. The last pages, which are in every view, are the local part
    that the paper puts beside a stride. There a position is skipped, here a page of 64, and s is a power of two.
    """

    name = "block"

    def worth(self, pages: Array, stride: Array) -> Array:
        return stride


POLICY = Block
