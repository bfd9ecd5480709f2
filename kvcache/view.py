"""A partial cache is a page table into the full one. Nothing is copied, and nothing has to be kept in step."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from tokenswift_py.kvcache.base import IntArray


class PageView:
    """The full pages that each layer and KV head attends to.

    pages: [layers, kv_heads, n] absolute page numbers, strictly ascending along the last axis. Where they were chosen
           on a device, they come to the host when they are first asked for, which waits for it.
    there: the same on that device, int32; None where the host has them.
    """

    def __init__(self, pages: IntArray | torch.Tensor):
        self.there = pages if isinstance(pages, torch.Tensor) else None
        if not isinstance(pages, torch.Tensor):
            self.pages = pages = checked(pages)
        self.shape: tuple[int, ...] = tuple(pages.shape)

    @cached_property
    def pages(self) -> IntArray:
        assert self.there is not None
        return checked(self.there.cpu().numpy())

    @classmethod
    def all(cls, layers: int, kv_heads: int, pages: int) -> PageView:
        """Returns the view of every page, which must give the same bits as no view."""
        return cls(np.broadcast_to(np.arange(pages, dtype=np.int32), (layers, kv_heads, pages)))


def checked(pages: IntArray) -> IntArray:
    """Returns a copy that cannot be changed. Raises ValueError where it is no view."""
    pages = np.array(pages, np.int32)
    if pages.ndim != 3:
        raise ValueError(f"a view is [layers, kv_heads, pages], not {pages.shape}")
    if (pages < 0).any() or (np.diff(pages, axis=-1) <= 0).any():
        raise ValueError("a view's pages must be ascending, without repeats")
    pages.flags.writeable = False
    return pages
