"""Trains the gates of an Infini-attention memory (arXiv 2404.07143). The model is frozen: one number a head learns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenswift_py import registry
from tokenswift_py.core import DraftTree, Segment
from tokenswift_py.decoding.eviction import Eviction
from tokenswift_py.drafters.training import rising_and_falling
from tokenswift_py.extending.texts import Source, Tokens, texts_of
from tokenswift_py.kernels.base import on_device
from tokenswift_py.kvcache.memories.base import Memory
from tokenswift_py.kvcache.pages import TorchPagePool
from tokenswift_py.kvcache.policies.recent import Recent
from tokenswift_py.models.decoder import TorchDecoder
from tokenswift_py.models.ops import TorchOps
from tokenswift_py.models.rows import lay_out, recalls_of
from tokenswift_py.options import MEMORIES
from tokenswift_py.remembering.reading import CHUNK, nats

WARMUP = 10  # steps in which the rate rises
START = -4.0  # beta of a head that has learnt nothing: 2 % of its output are recalled


class FrozenRows(TorchOps):
    """Operations under which gradients go through the residual stream alone, not through keys and values.

    So a chunk of rows can be learnt from without the chunks before it.
    """

    def rope_write(
        self,
        pool: TorchPagePool,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        return super().rope_write(pool, layer, q, k.detach(), v.detach(), cos, sin, slots)


def new_memory(model: TorchDecoder, kind: str, gates: torch.Tensor, label: str = "") -> Memory:
    memory: Memory = registry.create(
        MEMORIES, "MEMORY", "kv_memory", kind, shape=model.remembers(), gates=gates, label=label
    )
    return memory


def texts_to_learn(sources: Sequence[Source], length: int, seed: int) -> Iterator[Tokens]:
    """Yields texts of `length` tokens and one more, of all sources in turn and in a random order, again and again."""
    draw = np.random.default_rng(seed)
    cut = [list(texts_of(source.learned, length)) for source in sources]
    while True:
        orders = [draw.permutation(len(texts)) for texts in cut]
        for place in range(max(map(len, orders))):
            for texts, order in zip(cut, orders, strict=True):
                yield texts[order[place % len(order)]]


def train(
    model: TorchDecoder,
    kind: str,
    texts: Iterator[Tokens],
    budget: int,
    steps: int,
    rate: float,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[torch.Tensor, list[float]]:
    """Learns by Adam on the cross entropy of the text's own next tokens, a step for each chunk behind an eviction.

    model: in fp32, with `FrozenRows` for its operations. budget: tokens of the cache; policy `recent` evicts.
    rate: peak learning rate; a short warm-up, then a cosine down to nothing, at the deadline if that comes first.
    deadline: time.monotonic() at which to stop early; such a run cannot be repeated.
    Returns the gates [layers, heads], and the loss of every step in nats a token.
    """
    gates = torch.full((model.spec.layers, model.spec.heads), START, device=model.device, requires_grad=True)
    optimiser, losses = torch.optim.Adam([gates], lr=rate), list[float]()
    bar, began = tqdm(total=steps, unit="step", desc="training", disable=quiet), time.monotonic()
    while len(losses) < steps and time.monotonic() < deadline:
        eviction = Eviction(Recent(), budget, memory=new_memory(model, kind, gates))
        for loss in losses_of(model, eviction, next(texts)):
            share = rising_and_falling(len(losses), steps, began, time.monotonic(), deadline, WARMUP)
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}", refresh=False)
            if len(losses) == steps or time.monotonic() > deadline:
                break
    bar.close()
    return gates.detach(), losses


def losses_of(model: TorchDecoder, eviction: Eviction, text: Tokens) -> Iterator[torch.Tensor]:
    """Reads a text, and yields the loss of every chunk that reads a memory. The next chunk is read when it was used."""
    cache = eviction.new_cache(model)
    pool = cache.pool
    assert isinstance(pool, TorchPagePool)
    while (at := cache.length) < len(text) - 1:
        count = min(CHUNK, cache.limit - at, len(text) - 1 - at)
        segment = Segment(DraftTree.chain(text[at : at + count]), cache, causal=True)
        rows = lay_out([segment])
        recalls = recalls_of([segment], rows)
        wanted = slice(None) if recalls else slice(0)
        plan, places = model.attention.prepare(rows.segments, model.device), on_device(rows.places, model.device)
        with torch.set_grad_enabled(bool(recalls)):
            output = model.compute(pool, plan, places, wanted, None, False, recalls)
        if recalls:
            after = torch.from_numpy(text[at + 1 : at + 1 + count].astype(np.int64)).to(model.device)
            yield F.cross_entropy(output.logits, after)
        cache.commit(range(count))
        eviction.committed(cache, range(count), output)
    cache.release()


def held_out_nats(
    model: TorchDecoder, kind: str, gates: torch.Tensor | None, sources: Sequence[Source], length: int, budget: int
) -> float:
    """Returns nats a token of held-out texts behind the budget. gates: None reads them without a memory."""
    found = []
    for source in sources:
        for text in texts_of(source.held_out, length):
            memory = None if gates is None else new_memory(model, kind, gates)
            eviction = Eviction(Recent(), budget, memory=memory)
            cache = eviction.new_cache(model)
            found.append(nats(model, cache, eviction, text.tolist(), length - budget))
            cache.release()
    return float(np.mean(found))
