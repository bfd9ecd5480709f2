"""Retrieval attention: pages by the attention mass that clusters of their keys promise the query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE, FloatArray, IntArray, PagePool, PageStats
from tokenswift_py.kvcache.pages import index
from tokenswift_py.kvcache.policies.base import LastQueries

SEGMENTS = (64, 16, 4, 1)  # the sizes of segments in pages, each a multiple of the next
CLUSTERS = 4  # the number of clusters for each page of a segment
ROUNDS = 5  # the number of rounds of k-means


@dataclass(frozen=True)
class Segment:
    """The part of the index that is made of neighbouring pages.

    pages:     [n] ascending, those that are left.
    centroids: [layers, kv_heads, clusters, head_dim] bf16.
    counts:    [layers, kv_heads, n, clusters] uint8, how many of a page's keys are in a cluster.
    """

    pages: IntArray
    centroids: torch.Tensor
    counts: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes + self.counts.nbytes

    def only(self, pages: IntArray) -> Segment:
        """Returns the segment without its other pages, with the same clusters."""
        rows = np.flatnonzero(np.isin(self.pages, pages))
        if len(rows) == len(self.pages):
            return self
        return replace(self, pages=self.pages[rows], counts=self.counts[:, :, index(rows, self.counts.device)])

    def products(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns the scaled products of the queries with the centroids, [layers, kv_heads, group, clusters] fp32.

        They are -inf where no key of the pages that are left is in the cluster. queries: [layers, heads, head_dim].
        """
        centroids = self.centroids.float()
        grouped = queries.to(centroids).unflatten(1, (centroids.shape[1], -1)) * queries.shape[-1] ** -0.5
        empty = self.counts.amax(2, keepdim=True) == 0
        products: torch.Tensor = (grouped @ centroids.mT).masked_fill(empty, -torch.inf)
        return products


class Clusters(LastQueries):
    """The attention probability on a page, estimated for the queries of the last committed row by an index of the keys.

    The keys of a segment of pages are put into clusters by k-means, for each layer and KV head. The index holds each
    cluster's centroid c, and how many of a page's keys are in it, n. A page's attention weight is estimated as the sum
    of n exp(q.c / sqrt(head_dim)) over the clusters. Its probability is its share of all pages' weights, and its score
    the sum of that over the query heads of the KV head's group. The exponential is convex, so a page with keys far from
    their centroids is estimated too low.

    Sources: RetrievalAttention (arXiv 2409.10516) looks keys up in an index of vectors by the row's own query.
    RetroInfer (arXiv 2505.02922) clusters the keys of long segments, one cluster for 16 keys, and estimates from
    centroids and sizes what it does not read. There a cluster's keys are read from wherever they lie; here whole pages.

    A full page is a segment of its own at first. Four neighbours become one of four pages, four of these one of 16, and
    four of these one of 64, which stays. So the index depends on the pages' keys and on how many pages there are. An
    evicted page leaves its segment. One that has half of its pages left is made again from these. So where pages are
    evicted the index depends on when scores were asked for as well, and an eviction asks at fixed positions.

    The index has the same bits with any number of threads. As with quest, the last bits of scores may change with them.

    clusters: of each page of a segment, at least 1 and at most PAGE_SIZE.
    """

    name = "clusters"
    needs = frozenset({"queries", "index"})

    def __init__(self, clusters: int = CLUSTERS):
        super().__init__()
        check(1 <= clusters <= PAGE_SIZE, "clusters", clusters, f"between 1 and {PAGE_SIZE}")
        self.clusters = clusters
        self._segments: dict[tuple[int, int], Segment] = {}  # the keys are (first page, size)

    @staticmethod
    def index_bytes(head_dim: int) -> int:
        """Returns the size of a page's part of a large segment for a layer and KV head, with the default clusters."""
        return CLUSTERS * (head_dim * torch.bfloat16.itemsize + SEGMENTS[0])

    @property
    def nbytes(self) -> int:
        """The size of the index in bytes."""
        return sum(segment.nbytes for segment in self._segments.values())

    def score(self, stats: PageStats) -> FloatArray:
        scores = np.zeros((stats.layers, stats.kv_heads, stats.pages), np.float32)
        held = stats.held
        if self._queries is not None and len(held):
            assert stats.pool is not None and stats.table is not None
            self._refresh(stats.pool, stats.table, held)
            parts = [
                (part, part.products(queries))
                for pages, queries in self._met(held)
                for segment in self._segments.values()
                if len((part := segment.only(pages)).pages)
            ]
            scores[..., np.concatenate([part.pages for part, _ in parts])] = shares(parts).cpu().numpy()
        return scores

    def _refresh(self, pool: PagePool, table: IntArray, held: IntArray) -> None:
        """Brings the index up to date with the pages that there are, and with those that are left of them."""
        before, self._segments = self._segments, {}
        for first, size in cover(len(table)):
            pages = held[(held >= first) & (held < first + size)]
            found = before.get((first, size))
            if not len(pages):
                continue
            if found is None or 2 * len(pages) * self.clusters <= found.centroids.shape[2]:
                self._segments[first, size] = clustered(pool, pages, table[pages], self.clusters)
            else:
                self._segments[first, size] = found.only(pages)


def cover(pages: int) -> Iterator[tuple[int, int]]:
    """Yields the segments that `pages` pages make, as first page and size: the largest that are full come first."""
    first = 0
    for size in SEGMENTS:
        while first + size <= pages:
            yield first, size
            first += size


def clustered(pool: PagePool, pages: IntArray, places: IntArray, clusters: int) -> Segment:
    """Makes a segment of pages that lie at `places` of the pool, with `clusters` clusters a page."""
    centroids, counts = [], []
    for layer in range(pool.layers):
        keys = pool.page_keys(layer, places).flatten(1, 2)  # [kv_heads, n * PAGE_SIZE, head_dim]
        means, nearest = k_means(keys.to(torch.bfloat16).double(), clusters * len(pages))
        members = nearest.unflatten(1, (len(pages), -1))[..., None] == torch.arange(means.shape[1], device=means.device)
        centroids.append(means.to(torch.bfloat16))
        counts.append(members.sum(2).to(torch.uint8))
    return Segment(pages, torch.stack(centroids), torch.stack(counts))


def k_means(keys: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts keys [heads, n, head_dim] into clusters.

    Returns the centroids [heads, clusters, head_dim], and the cluster of each key, [heads, n] int64. It begins with
    keys at even distances. A cluster that becomes empty stays where it is.

    keys: float64 of values that bf16 has. Centroids are rounded to such values, too. So sums and products are exact,
    but for what is 1e-9 of their largest part, and no choice hangs on the order of a sum, threads or library.
    """
    heads, count, head_dim = keys.shape
    centroids = keys[:, torch.arange(clusters, device=keys.device) * count // clusters]
    of_head = clusters * torch.arange(heads, device=keys.device)[:, None]
    for _ in range(ROUNDS):
        # The nearest centroid c of a key k has the largest k.c - c.c / 2.
        nearest = (keys @ centroids.mT - (centroids**2).sum(-1)[:, None] / 2).argmax(-1)
        at = (of_head + nearest).flatten()
        sums = keys.new_zeros(heads * clusters, head_dim).index_add_(0, at, keys.flatten(0, 1))
        sizes = at.bincount(minlength=heads * clusters)[:, None]
        means = (sums / sizes.clamp(min=1)).to(torch.bfloat16).double()
        centroids = torch.where(sizes > 0, means, centroids.flatten(0, 1)).unflatten(0, (heads, clusters))
    return centroids, nearest


def shares(parts: Sequence[tuple[Segment, torch.Tensor]]) -> torch.Tensor:
    """Returns each page's estimated probability, summed over its group's heads, [layers, kv_heads, pages] fp32.

    parts: segments, each with the products of the queries that meet it. Pages are in the parts' order.
    """
    top = torch.stack([products.amax(-1, keepdim=True) for _, products in parts]).amax(0)
    weights = [part.counts.float() @ (products - top).exp().mT for part, products in parts]
    joined = torch.cat(weights, 2)  # [layers, kv_heads, pages, group]
    return (joined / joined.sum(2, keepdim=True)).sum(-1)


POLICY = Clusters
