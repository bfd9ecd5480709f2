"""A model with its tokenizer and executor: all that writing, resuming, auditing and judging need."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.checkpoints.loading import open_draft_checkpoint
from tokenswift_py.drafters.base import kind_of
from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.executors import Executor
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import RopeTables, rope_tables
from tokenswift_py.options import Options
from tokenswift_py.planning.costs import PassCost
from tokenswift_py.planning.rounds import Probes
from tokenswift_py.sampling.grammar import Vocabulary
from tokenswift_py.text import end_tokens


class LoadedModel:
    """A checkpoint, its tokenizer and an executor that holds the weights.

    origin: the arguments of `TokenSwift.from_pretrained` that load it again, as a journal records them.
    kept:   what drafters have read beside the model, by a name, for the next text.
    """

    prefill_chunk = 512  # the rows of a pass that reads a prompt

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, executor: Executor, origin: Mapping[str, Any]):
        self.checkpoint = replace(checkpoint, eos=end_tokens(tokenizer, checkpoint.eos))
        self.tokenizer = tokenizer
        self.executor = executor
        self._draft: tuple[tuple[str, str], LoadedModel] | None = None  # the last one, and how it was asked for
        self.origin = origin
        self.kept: dict[str, Any] = {}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary that grammars are made over. Raises UserError where there can be none."""
        return Vocabulary(self.tokenizer, self.checkpoint.spec.vocab_size, self.checkpoint.eos)

    def goes_on(self, options: Options) -> bool:
        """Returns whether a prompt is the beginning of the text, which then goes on from it."""
        return options.continue_final_message or not options.chat.templated(self.tokenizer)

    def ends(self, options: Options, eos: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Returns every token that ends a text. Another chat template may put one of its own after an answer.

        eos: instead of the checkpoint's.
        """
        eos = self.checkpoint.eos if eos is None else eos
        return eos if options.chat_template is None else end_tokens(self.tokenizer, eos, options.chat)

    def rope(self, context: int, positions: Positions) -> RopeTables:
        """Makes the RoPE tables of a run over so many positions. Raises UserError like `rope_tables`."""
        return rope_tables(self.checkpoint.config, context, positions)

    def pass_cost(self, *kind: Hashable) -> PassCost | None:
        """Returns what is known of passes of this kind ("target", or what drafts are made with): of a text alone
        nothing."""
        return None

    def probes(self) -> Probes:
        """Returns what says when drafting may be tried: a text alone has its own."""
        return Probes()

    def kv_bytes(self, tokens: int, of_keys: int = 0, dtype: torch.dtype | None = None) -> int:
        """Returns the bytes of a KV cache with room for so many tokens, with heads padded like the executor's. Of
        a pipeline, whose stages share the layers, they are those of one process.

        of_keys: bytes that policies keep of a page's keys, for each layer and KV head.
        dtype: type of the cache; None is the executor's.
        """
        spec, padded = self.checkpoint.spec, self.executor.padded_head
        held = spec.layer_specs[: self.executor.layers]
        pages, kept = pages_for(tokens), replace(spec, head_dim=padded(spec.head_dim), layer_specs=held)
        of_policies = spec.layers * spec.kv_heads * of_keys * pages
        return kept.kv_bytes(pages * PAGE_SIZE, dtype or self.executor.kv_dtype) + of_policies

    def step_bytes(self, context: float) -> float:
        """Returns the bytes of weights and KV that plain decoding must read for a token after so many others (this
        rank's)."""
        kv = self.checkpoint.spec.kv_bytes_read(context, self.executor.kv_dtype)
        return self.executor.multiplied_nbytes + kv / self.executor.ranks.world

    def draft(self, options: Options) -> LoadedModel | None:
        """Returns the smaller model of drafter draft_model, loaded at its first use. With several ranks, rank 0 has it
        whole and the others have none, because they verify its trees. Raises UserError."""
        if not kind_of(options.chosen_drafter).has_second_model or not self.executor.ranks.leads:
            return None
        assert options.draft_model is not None
        key = (options.draft_model, options.draft_weights)
        if self._draft is None or self._draft[0] != key:
            self._draft = None  # its weights make room
            checkpoint, tokenizer = open_draft_checkpoint(options.draft_model, self.tokenizer)
            executor = self.executor.beside(checkpoint, options.draft_weights)
            self._draft = key, LoadedModel(checkpoint, tokenizer, executor, {})
        return self._draft[1]
