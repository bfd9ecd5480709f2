"""A local window that thins out with distance (LogSparse, arXiv 1907.00235)."""

from __future__ import annotations

from tokenswift_py.kvcache.policies.base import Array, ByPlace


class Local(ByPlace):
    """Scores a page by the stride that it stands on over its distance from the end.

    So up to some distance d every page is chosen, from d to 2 d every second, from 2 d to 4 d every fourth, and so on:
    each doubling of the distance gets as many pages. The paper picks single positions at such distances beside a local
    window. A window alone is `recent`.
    """

    name = "local"

    def worth(self, pages: Array, stride: Array) -> Array:
        worth: Array = stride / (len(pages) - pages)
        return worth


POLICY = Local
