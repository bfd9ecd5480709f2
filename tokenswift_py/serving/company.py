"""The parts that texts in company share: the models of one context, and the pool from which all their pages come."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from tokenswift_py.core import Model
from tokenswift_py.errors import check
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import ROUND_PAGES, SPARE_PAGES
from tokenswift_py.loaded import LoadedModel
from tokenswift_py.memory import check_memory, free_on
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import AUTO, RopeTables, rope_bytes
from tokenswift_py.planning.costs import Load, PassCost
from tokenswift_py.planning.rounds import Probes


class SharedModels:
    """An executor that makes each model only once, so that the passes of all texts are passes of the same model."""

    def __init__(self, executor: Any):
        self._executor = executor
        self._models: dict[tuple[Any, ...], Model] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def model(self, rope: RopeTables) -> Model:
        return self._once(("target", id(rope)), lambda: self._executor.model(rope))

    def self_draft(self, rope: RopeTables, weights: str, kv: str = "auto", vocabulary: str | int = "auto") -> Model:
        asked = (weights, kv, vocabulary)
        return self._once(("draft", id(rope), *asked), lambda: self._executor.self_draft(rope, *asked))

    def _once(self, key: tuple[Any, ...], make: Any) -> Model:
        if key not in self._models:
            self._models[key] = make()
        return self._models[key]


class Company(LoadedModel):
    """A loaded model for many texts with one context and one pool.

    context:   the positions of each text. None is the trained length. It is the same for all texts. So is the scheme of
               `positions`, since the tables of some schemes depend on the context.
    kv_tokens: the tokens that the pool holds at least. None takes as many as fit into half of the free memory, but not
               more than `most_running` whole texts need.
    alone:     the model as it was loaded.
    """

    prefill_chunk = 128  # so that a long prompt holds up the other texts for a moment only

    def __init__(
        self,
        loaded: LoadedModel,
        context: int | None = None,
        kv_tokens: int | None = None,
        most_running: int = 16,
        positions: Positions = AUTO,
    ):
        check(loaded.executor.ranks.world == 1, "world", loaded.executor.ranks.world, "one process writes many texts")
        super().__init__(loaded.checkpoint, loaded.tokenizer, SharedModels(loaded.executor), loaded.origin)
        self._costs: dict[tuple[Hashable, ...], PassCost] = {}
        self._load, self._probes = Load(), Probes()
        self.alone = loaded
        self.context = loaded.checkpoint.spec.trained_context if context is None else context
        check(self.context >= 1, "context", context, "at least 1")
        tables = rope_bytes(loaded.checkpoint.config, self.context)
        check_memory(tables, loaded.executor.device, f"RoPE tables of {self.context} positions")
        self._rope = loaded.rope(self.context, positions)
        self.executor.check_rope(self._rope)
        self.target = self.executor.model(self._rope)
        page_bytes = self.kv_bytes(0) // SPARE_PAGES
        one = -(-self.context // PAGE_SIZE) + ROUND_PAGES
        whole = most_running * one
        if kv_tokens is None:
            pages = min(whole, free_on(self.executor.device) // 2 // page_bytes)
        else:
            pages = -(-kv_tokens // PAGE_SIZE) + ROUND_PAGES
        what = f"a KV pool of {pages} pages of 64 tokens"
        check(pages >= one, "kv_tokens", kv_tokens, f"room for one text of {self.context} tokens")
        check_memory(pages * page_bytes, self.executor.device, what)
        self.pool = self.target.new_pool(pages)

    def rope(self, context: int, positions: Positions) -> RopeTables:
        """Returns the tables that all texts share. They do not depend on what a text asks for: they belong to the
        company."""
        return self._rope

    def pass_cost(self, *kind: Hashable) -> PassCost:
        """Returns what all texts have learned together, so that the next text need not learn it again. It knows no
        shapes, because rows of several texts fill a pass; see `sharing.Width`."""
        return self._costs.setdefault(kind, PassCost(load=self._load))

    def probes(self) -> Probes:
        """Returns the probes that all texts share. If few texts know that something does not pay, the others do not try
        it."""
        return self._probes

    def new_cache(self) -> KVCache:
        return KVCache(self.pool, self.context)
