"""A later stage of a pipeline at work: it does what the first stage tells it until it is let go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from tokenswift_py.checkpoints import checkpoint as files
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.models.devices import find_device
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.parallel.column import told_error
from tokenswift_py.parallel.pipeline import rows_heard
from tokenswift_py.parallel.pipeline_executor import fingerprint
from tokenswift_py.parallel.ranks import RanksError
from tokenswift_py.parallel.stages import Place, load_stage
from tokenswift_py.parallel.wire import (
    ANSWER,
    COMMAND,
    STATISTICS,
    STATUS_BYTES,
    STREAM,
    Array,
    Words,
    packed,
    unpacked,
    wire,
)

Found = tuple[Words, Sequence[Array]] | None


class Worker:
    """One process of a later stage.

    held:     executors with their checkpoints, models and pools, by the numbers that the first stage gave them.
    failures: what went wrong in passes, by their numbers, until the first stage asks for it.
    spoiled:  what went wrong in commands that have no answer, by the pool that they were for. Nothing is done with such
              a pool any more, because its rows are not those that the first stage believes in.
    """

    def __init__(self, place: Place):
        self.place, self.wire = place, wire()
        self.first, self.before = place.process(0), place.process(place.stage - 1)
        self.after = place.process((place.stage + 1) % place.stages)
        self.held: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self.spoiled: dict[int, Exception] = {}
        self._fresh: dict[int, list[int]] = {}  # pages that each pool has yet to make usable
        self.actions: dict[str, Callable[[Words, list[Array]], Found]] = {
            "load": self.load, "model": self.model, "pool": self.pool, "dump": self.dump, "scores": self.scores,
            "keys": self.keys, "bounds": self.bounds, "trouble": self.tell_trouble, "move": self.move,
            "restore": self.restore, "forget": self.forget,
        }  # fmt: skip

    def serve(self) -> None:
        """Does what the first stage tells it, until that lets it go."""
        logging.getLogger("tokenswift").setLevel(logging.CRITICAL)
        while True:
            words, arrays = self.wire.hear(self.first, COMMAND)
            if words["do"] == "end":
                self.held.clear()
                self.wire.flush()
                return
            if words["do"] == "pass":
                self.compute(words, arrays)
                continue
            try:
                self.make_usable(words)
                found = self.actions[words["do"]](words, arrays)
            except Exception as error:
                if words["do"] in SILENT:
                    self.spoiled.setdefault(words["pool"], error)
                else:
                    self.wire.tell(self.first, ANSWER, told_error(error))
                continue
            if found is not None:
                self.wire.tell(self.first, ANSWER, *found)

    def make_usable(self, words: Words) -> None:
        """Makes pages usable that are about to be written. Those for which there is no memory stay to be made so.

        Raises the error of a spoiled pool.
        """
        if (failed := self.spoiled.get(words.get("pool", -1))) is not None:
            raise failed
        if "fresh" in words:
            waiting = self._fresh.setdefault(words["pool"], [])
            waiting += words["fresh"]
            while waiting:
                self.held[words["pool"]].reserve(waiting[0])
                del waiting[0]

    def load(self, words: Words, _: list[Array]) -> Found:
        source, settings = words["source"], words["settings"]
        device = find_device(source["device"], self.place.processes)
        self.place.ranks.place(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        checkpoint = open_checkpoint(source["model"], source["revision"], settings["dtype"])
        if files.model_fingerprint(checkpoint) != words["model"]:
            raise RanksError(f"the model's files differ from the first stage's: {checkpoint.folder}")
        executor = load_stage(self.place, checkpoint, device, settings)
        self.held[words["number"]] = checkpoint, executor
        found = {"kinds": sorted(executor.kinds), "multiplied": executor.multiplied_nbytes}
        return {**found, "products": executor.products}, []

    def model(self, words: Words, _: list[Array]) -> Found:
        checkpoint, executor = self.held[words["executor"]]
        rope = rope_tables(checkpoint.config, words["context"], Positions(*words["positions"]))
        if fingerprint(rope) != words["tables"]:
            raise RanksError("the tables of positions differ from the first stage's: do all have the same packages?")
        drafts = words["kind"] == "draft"
        made = executor.self_draft(rope, words["weights"], words["kv"], "all") if drafts else executor.model(rope)
        self.held[words["number"]] = made
        return {}, []

    def pool(self, words: Words, _: list[Array]) -> Found:
        self.held[words["number"]] = self.held[words["model"]].new_pool(words["pages"])
        return {}, []

    def compute(self, words: Words, arrays: list[Array]) -> None:
        """Computes this stage's layers for the rows of a pass. Whatever goes wrong, the others hear of it and go on."""
        model, rows = self.held[words["model"]], rows_heard(words["segments"], arrays)
        count, spec = len(rows.tokens), model.spec
        dtype = torch.float32 if model.streams == 1 else model.dtype
        shape = (model.streams, count, spec.hidden_size)
        size = int(np.prod(shape)) * dtype.itemsize
        stream, status = unpacked(self.wire.receive(self.before, STREAM, size + STATUS_BYTES).wait(), shape, dtype)
        mass_size = spec.layers * count * spec.kv_heads * (words["mass"] or 0)
        query_size = count * spec.layers * spec.heads * spec.head_dim if words["queries"] else 0
        statistics = torch.zeros(mass_size + query_size)
        number = words["number"]
        try:
            self.make_usable(words)
            if (failed := self.failures.get(number)) is not None:
                raise failed  # in an earlier part of the pass
            if not status:
                passed = model.advance(self.held[words["pool"]], rows, stream, words["mass"], words["queries"])
                stream = passed.stream
                for part, place in ((passed.mass, slice(mass_size)), (passed.queries, slice(mass_size, None))):
                    if part is not None:
                        statistics[place] = part.reshape(-1)
        except Exception as error:
            if not status:
                self.failures[number] = error
                status = self.place.stage
        self.wire.send(self.after, STREAM, packed(stream, status))
        if words["mass"] is not None or words["queries"]:
            self.wire.send(self.first, STATISTICS, statistics.view(torch.uint8))

    def tell_trouble(self, words: Words, _: list[Array]) -> Found:
        trouble = self.failures.pop(words["number"], None)
        for earlier in [number for number in self.failures if number < words["number"]]:
            del self.failures[earlier]  # nobody will ask: passes end in the order of their numbers
        told = told_error(trouble) if trouble is not None else {"error": -1, "text": ""}
        return {"kind": told["error"], "text": told["text"]}, []

    def move(self, words: Words, arrays: list[Array]) -> Found:
        self.held[words["pool"]].move(*arrays)
        return None

    def dump(self, words: Words, _: list[Array]) -> Found:
        return {}, [self.held[words["pool"]].dump(words["page"])]

    def restore(self, words: Words, arrays: list[Array]) -> Found:
        self.held[words["pool"]].restore(words["page"], arrays[0])
        return None

    def scores(self, words: Words, arrays: list[Array]) -> Found:
        pages, queries = arrays
        return {}, [self.held[words["pool"]].key_scores(pages, torch.from_numpy(queries)).cpu().numpy()]

    def keys(self, words: Words, arrays: list[Array]) -> Found:
        pool, layer = self.held[words["pool"]], words["layer"]
        return {}, [pool.page_keys(layer, arrays[0]).cpu().numpy()] if 0 <= layer < pool.layers else []

    def bounds(self, words: Words, arrays: list[Array]) -> Found:
        return {}, [side.cpu().numpy() for side in self.held[words["pool"]].key_bounds(arrays[0])]

    def forget(self, words: Words, _: list[Array]) -> Found:
        for number in words["numbers"]:
            for known in (self.held, self.spoiled, self._fresh):
                known.pop(number, None)
        return None


def serve_stage(place: Place) -> NoReturn:
    """Serves the first stage until it ends, and leaves the program."""
    Worker(place).serve()
    raise SystemExit(0)


SILENT = ("move", "restore")  # commands of a pool that may fail and have no answer
