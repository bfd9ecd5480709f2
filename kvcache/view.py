"""A partial cache is a page table into the full one. Nothing is copied, and nothing has to be kept in step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenswift_py.kvcache.base import IntArray


@dataclass(frozen=True, eq=False)
class PageView:
    """The full pages that each layer and KV head attends to.

    pages: [layers, kv_heads, n] absolute page numbers, strictly ascending along the last axis.
    """

    pages: IntArray

    def __post_init__(self) -> None:
        pages = np.array(self.pages, np.int32)
        if pages.ndim != 3:
            raise ValueError(f"a view is [layers, kv_heads, pages], not {pages.shape}")
        if (pages < 0).any() or (np.diff(pages, axis=-1) <= 0).any():
            raise ValueError("a view's pages must be ascending, without repeats")
        pages.flags.writeable = False
        object.__setattr__(self, "pages", pages)

    @classmethod
    def all(cls, layers: int, kv_heads: int, pages: int) -> PageView:
        """Returns the view of every page, which must give the same bits as no view."""
        return cls(np.broadcast_to(np.arange(pages, dtype=np.int32), (layers, kv_heads, pages)))
