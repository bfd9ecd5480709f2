"""Drafters with decoder layers of their own, which read states of the target over a bounded window of the text.

The keys and values of the text's rows are made of the target's own states when a draft begins: a text in which no draft
pays computes next to nothing. A draft's rows are provisional: nothing of them is kept, and they are made anew from the
target's states where they were accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tokenswift_py.core import Acceptance, IntArray, Output
from tokenswift_py.decoding.passes import without_passes
from tokenswift_py.drafters.base import Context, Drafter
from tokenswift_py.drafters.chain import TRAINED, Chain, Confidence
from tokenswift_py.drafters.head_weights import rms_norm
from tokenswift_py.errors import check
from tokenswift_py.models.positions import Positions
from tokenswift_py.models.rope import rope_tables
from tokenswift_py.planning.costs import PassCost


class OwnLayers:
    """The tensors of a draft, with the operations that all drafts have.

    tensors:   by the names of their file.
    embedding: [vocab, hidden], its own or the target's.
    taps:      layers of the target, ascending, whose inputs it reads.
    rope:      config of transformers by which it rotates.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, taps: tuple[int, ...], eps: float, rope: Any
    ):
        self.tensors, self.embedding, self.taps = dict(tensors), embedding, taps
        self._eps, self._rope = eps, rope
        self.cos = self.sin = torch.empty(0, 0)

    @property
    def device(self) -> torch.device:
        return self.tensors["fc.weight"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["fc.weight"].dtype

    def move(self, device: torch.device) -> None:
        """Brings the tensors to where the target's rows are: in fp32 on a CPU, elsewhere in the type of the file."""
        dtype = torch.float32 if device.type == "cpu" else self.dtype
        if (self.device, self.dtype) != (device, dtype):
            self.tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}

    def reach(self, positions: int) -> None:
        """Makes tables of RoPE for so many positions, unless there are. A window grows by a few rows a round, so tables
        have room for some more."""
        if len(self.cos) < positions or self.cos.device != self.device:
            tables = rope_tables(self._rope, -(-positions // 256) * 256, Positions("trained"))
            self.cos, self.sin = tables.cos.to(self.device), tables.sin.to(self.device)

    def rotate(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Rotates rows [R, heads, head_dim] that stand at positions `first` and on."""
        cos, sin = (table[first : first + len(x), None].to(x.dtype) for table in (self.cos, self.sin))
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns [R, hidden]. tokens: [R], on the CPU."""
        return self.embedding[tokens].to(self.device, self.dtype)

    def gated(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """Returns the feed-forward whose matrices' names begin with `at`."""
        opened = F.silu(self.linear(x, f"{at}gate_proj")) * self.linear(x, f"{at}up_proj")
        return self.linear(opened, f"{at}down_proj")

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x.float(), self._eps).to(x.dtype) * self.tensors[f"{name}.weight"]


class Window:
    """Keys, not rotated, and values of a layer at a text's latest rows.

    They are rotated in a draft, at places counted from the oldest of them. RoPE sees only the distances of rows, which
    are those of the text, and no place is far beyond the window, however long the text is.
    most: rows that are kept. Memory is bounded by it.
    """

    def __init__(self, most: int):
        self.most = most
        self.keys = self.values = torch.empty(0)

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds the next rows, [R, kv_heads, head_dim] each, and drops the oldest that are too many."""
        self.keys, self.values = (
            (torch.cat([old, new]) if len(old) else new)[-self.most :].clone()
            for old, new in ((self.keys, keys), (self.values, values))
        )

    def clear(self) -> None:
        self.keys = self.values = torch.empty(0)


class Windowed(Drafter):
    """A drafter with layers of its own.

    window: rows that the layers attend to at most, beside those of the draft.
    width:  guesses a node has at most, runners-up included; 1 is a plain chain.
    windows: one for each layer.
    chance:  the chance that the next guess is right. At rest, where no guess tells more of it, it is not computed anew.
    """

    chance = 0.0

    def __init__(self, own: OwnLayers, layers: int, window: int | None, width: int):
        window = WINDOW if window is None else window
        check(window >= 1, "draft_budget", window, "at least 1")
        check(width >= 1, "width", width, "at least 1")
        self.own, self.width, self.taps, self.window = own, width, own.taps, window
        self.windows = [Window(window) for _ in range(layers)]
        self._next = 0  # position of the row after those that are known
        self._late: list[tuple[torch.Tensor, IntArray]] = []  # rows that the windows do not have yet
        self._rows_late = 0  # their number
        self._cost, self._confidence = PassCost(), Confidence(width, kind=TRAINED)
        self._chain, self._text = Chain(0, 1), 1  # the chain of the last proposal, and the tokens that the text had
        self._untested = -1  # the number of proposals since one that had guesses

    @property
    def known(self) -> int:
        """The number of the text's rows that the layers attend to."""
        return min(self.window, len(self.windows[0]) + self._rows_late)

    def take(self, taps: torch.Tensor, following: torch.Tensor) -> None:
        """Adds keys and values of the text's next rows to the windows.

        taps: [R, taps, target_hidden]. following: [R] the token after each row, on the CPU.
        """
        raise NotImplementedError

    @without_passes
    def prefill(self, context: Context, output: Output) -> None:
        start = len(context.history) - 1 - len(output.hidden)
        self.read_rows(output, start, context.history.tokens[start + 1 :])

    def read_rows(self, output: Output, start: int, following: IntArray) -> None:
        self._see(output.taps, start, following)

    def observe(self, taken: Acceptance, output: Output) -> None:
        chain = self._chain
        chain.draft.learn(taken)
        self._confidence.learn(chain.draft, chain.nodes, taken)
        taps = None if output.taps is None else output.taps[list(taken.path)]
        self._see(taps, self._text - 1, np.array(taken.tokens, np.int32))

    def alike(self) -> object:
        digest = hashlib.sha256()
        for _, tensor in sorted(self.own.tensors.items()):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return self.window, self.taps, digest.hexdigest()

    def explain(self) -> dict[str, Any]:
        expected = {"expected_acceptance": round(self._confidence.next, 4)}
        return {"window_rows": self.known, **expected, **self._chain.explain()}

    def begin(self, context: Context, budget: int) -> bool:
        """Begins a proposal. Returns whether all rows before the pending token are known, so that it can guess."""
        self._untested = 0 if len(self._chain.draft) > 1 else self._untested + 1
        self._cost.load = context.plan.load
        self._chain, self._text = Chain(context.history[-1], budget), len(context.history)
        self._confidence.expect(SPREAD, context.sampler.params.temperature)
        if self.news:
            self.chance = self._confidence.next
        return self.known > 0 and self._next == len(context.history) - 1

    @property
    def news(self) -> bool:
        """Whether what is expected of this proposal has to be computed anew: the last one had guesses, or it is long
        ago."""
        return self._untested % STALE == 0

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Lets the windows have all rows that are known. It is called before a draft's first guess."""
        if not self._late:
            return
        taps, following = (list(part) for part in zip(*self._late, strict=True))
        self._late, self._rows_late = [], 0
        self.own.move(taps[0].device)
        joined = torch.cat(taps)[-self.window :].to(self.own.device, self.own.dtype)
        self.take(joined, torch.from_numpy(np.concatenate(following)[-self.window :].astype(np.int64)))

    def _see(self, taps: torch.Tensor | None, start: int, following: IntArray) -> None:
        """Takes in rows of the text, the first at position `start`."""
        assert taps is not None, "this executor does not report what enters a layer"
        if start != self._next:  # the rows between came from elsewhere, as those that another text has computed do
            self._late, self._rows_late = [], 0
            for window in self.windows:
                window.clear()
        self._late.append((taps, following.copy()))
        self._rows_late += len(following)
        self._next = start + len(following)
        if self._rows_late >= min(self.window, LATE):
            self.catch_up()


STALE = 32  # proposals without a guess after which what is expected is computed anew: the context has grown
LATE = 256  # rows of which the target's states are kept at most: they are larger than keys and values
WINDOW = 1024  # rows: with a draft's own, half of the 2 048 positions that most such layers are trained on
SPREAD = 1.0  # the expected spread of the errors of their scores, in units of logit
