"""Draft heads: small residual blocks on the last hidden state that guess the tokens behind the pending one.

The row that gave the pending token has everything they read, so a proposal costs one product with the LM head and no
pass of the model. Two forms of head i = 1 .. K, which guesses the i-th token behind the pending one:

medusa (Cai et al. 2024, arXiv 2401.10774): x = final norm's output; x <- x + SiLU(W x + b), once a block; each head
    on its own, with the model's LM head or one of its own.
tokenswift (Wu et al. 2025, arXiv 2502.18890): h_0 = residual stream before the final norm;
    h_i = h_{i-1} + W_i norm_in_i(h_{i-1}), and the model's LM head reads norm_out_i(h_i); norms are RMSNorms.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from tokenswift_py.core import Acceptance, DraftTree, Model, Output, TreeBuilder
from tokenswift_py.drafters.base import Context
from tokenswift_py.errors import UserError, check
from tokenswift_py.loading import DEFAULT_MODEL, Checkpoint, cache_folder, one_line
from tokenswift_py.models.spec import ModelSpec

logger = logging.getLogger("tokenswift")

Table = npt.NDArray[np.float64]

FORMS = ("medusa", "tokenswift")
FORMAT = "tokenswift-heads"
VERSION = 1
PACKAGED = Path(__file__).parent / "data"

RANKS = 8  # candidates of each head
PRIOR = 0.4 * 0.8 ** np.arange(64)[:, None] / (1 + np.arange(RANKS)) ** 1.5  # of heads that come without figures
UNLIKELY = 0.01  # paths below this are not proposed
MEMORY = 0.02  # weight of the latest step in the acceptance of a head's rank


@dataclass(frozen=True)
class HeadWeights:
    """K heads. The tensors, by form:

    medusa:     weight [K, blocks, E, E], bias [K, blocks, E]; head [K, V, E] unless the model's LM head is shared.
    tokenswift: weight [K, E, E], norm_in [K, E], norm_out [K, E].

    eps:         of the RMSNorms.
    model:       `fingerprint` of the model that they were made for; None is not known.
    acceptance:  [K, RANKS] how often each candidate of each head, best first, is what the model then writes.
    provenance:  how they were made, accuracies included; kept as it is.
    """

    form: str
    tensors: Mapping[str, torch.Tensor]
    eps: float = 1e-5
    model: str | None = None
    acceptance: Table = field(default_factory=lambda: PRIOR)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tensors["weight"])

    def reads(self, output: Output, row: int) -> torch.Tensor:
        """[E] what the heads read of a row of a pass."""
        states = output.hidden if self.form == "medusa" else output.residual
        assert states is not None, "this executor does not report the residual stream"
        return states[row]

    def states(self, x: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """[heads, R, E] what the LM head reads for each of the first `heads`. x: [R, E] of `reads`."""
        found = []
        for i in range(len(self) if heads is None else heads):
            if self.form == "medusa":
                state = x
                for weight, bias in zip(self.tensors["weight"][i], self.tensors["bias"][i], strict=True):
                    state = state + F.silu(F.linear(state, weight, bias))
                found.append(state)
            else:
                x = x + F.linear(rms_norm(x, self.tensors["norm_in"][i], self.eps), self.tensors["weight"][i])
                found.append(rms_norm(x, self.tensors["norm_out"][i], self.eps))
        return torch.stack(found)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor, model: Model, heads: int | None = None) -> torch.Tensor:
        """[heads, V] fp32 of one row. x: [E] of `reads`."""
        states = self.states(x[None].float(), heads)[:, 0]
        own = self.tensors.get("head")
        if own is None:
            return model.project(states)
        return torch.stack([F.linear(state.to(own.dtype), head) for state, head in zip(states, own, strict=False)])

    def to(self, device: torch.device) -> HeadWeights:
        """On a device, in fp32 but for LM heads, which are large and stay as they are."""
        wide = {
            name: tensor.to(device, tensor.dtype if name == "head" else torch.float32)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=wide)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class Heads:
    """A tree of the heads' best guesses, by the same noise as the target's choice.

    Every path of candidates, one of each head, is a node; its chance is the product of the acceptances of its ranks,
    as Medusa's trees are grown (arXiv 2401.10774, section 2.3.3), and the most probable nodes are proposed. The
    acceptances start at those measured in training and follow those seen.
    """

    name = "heads"
    needs: frozenset[str] = frozenset()

    def __init__(self, weights: HeadWeights):
        self.weights = weights.to(torch.device("cpu"))
        self.acceptance = np.array(weights.acceptance[: len(weights)])
        self._row: torch.Tensor | None = None
        self._guesses: list[list[int]] = []

    def prefill(self, context: Context, output: Output) -> None:
        self._row = self.weights.reads(output, -1)

    def propose(self, context: Context, budget: int) -> DraftTree:
        if self._row is None:
            return DraftTree.chain([context.history[-1]])
        return self.tree(self._row, context, budget)

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.learn(taken.tokens)
        self._row = self.weights.reads(output, taken.path[-1])

    def tree(self, row: torch.Tensor, context: Context, budget: int) -> DraftTree:
        """Up to `budget` nodes behind the history's last token. row: [E], `weights.reads` of the row that gave it."""
        builder = TreeBuilder(context.history[-1], budget)
        self._guesses = self.guess(row, context, min(len(self.weights), budget - 1))
        order = 0  # of equals, the one found first
        queue: list[tuple[float, int, int, int, int]] = []  # -chance, order, parent, head, rank
        node, chance, head = 0, 1.0, 0
        while len(builder) < budget:
            for rank in range(len(self._guesses[head]) if head < len(self._guesses) else 0):
                order += 1
                heapq.heappush(queue, (-chance * self.acceptance[head, rank], order, node, head, rank))
            if not queue or -queue[0][0] < UNLIKELY:
                break
            minus, _, parent, head, rank = heapq.heappop(queue)
            child = builder.add(parent, self._guesses[head][rank])
            assert child is not None
            node, chance, head = child, -minus, head + 1
        return builder.build()

    def guess(self, row: torch.Tensor, context: Context, heads: int) -> list[list[int]]:
        """Candidates of the first heads, best first, as the sampler would rank them behind the best of those before."""
        history = context.history
        start = len(history)
        if self.weights.tensors["weight"].device != row.device:
            self.weights = self.weights.to(row.device)
        guesses = []
        for logits in self.weights.logits(row, context.model, heads) if heads else ():
            guesses.append(context.sampler.rank(logits, history, self.acceptance.shape[1]))
            history.append(guesses[-1][0])
        history.truncate(start)
        return guesses

    def learn(self, tokens: Sequence[int]) -> None:
        """What the model wrote behind the pending token of the last tree."""
        for guesses, token, acceptance in zip(self._guesses, tokens, self.acceptance, strict=False):
            acceptance[: len(guesses)] *= 1 - MEMORY
            if token in guesses:
                acceptance[guesses.index(token)] += MEMORY
        self._guesses = []


def for_checkpoint(checkpoint: Checkpoint, path: str | None = None) -> Heads:
    """The drafter with the heads at `path`, or with those that this model has in the cache or in the package."""
    return Heads(find_heads(checkpoint, path))


DRAFTER = for_checkpoint


def find_heads(checkpoint: Checkpoint, path: str | None = None) -> HeadWeights:
    """Read heads and check them against the model. Raises UserError.

    path: a file of ours, or a file or folder with heads of Medusa or TokenSwift (.safetensors, .pt, .bin), which is
    converted once into the cache; None looks for heads that were trained for this model.
    """
    key = fingerprint(checkpoint)
    if path is None:
        places = [heads_file(folder, key) for folder in (cache_folder(), PACKAGED)]
        found = [place for place in places if place.is_file()]
        advice = f"train them (tokenswift train-heads --model {checkpoint.name}) or name a file"
        check(bool(found), "draft_heads", path, f"there are none for {checkpoint.name}: {advice}")
        file = found[0]
    else:
        file = Path(path).expanduser()
        check(file.exists(), "draft_heads", path, "an existing file or folder")
        if not is_ours(file):
            file = convert(file, checkpoint)
    weights = read_heads(file)
    check_shapes(weights, checkpoint.spec)
    if weights.model not in (None, key):
        logger.warning("%s was made for another model of the same shape: its drafts may be poor", file.name)
    return weights


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that tell models apart, those of one shape too: of shape and final norm."""
    spec = checkpoint.spec
    norm = checkpoint.tensors()["model.norm.weight"].float().numpy()
    shape = f"{spec.family} {spec.vocab_size} {spec.hidden_size} {spec.layers} "
    return hashlib.sha256(shape.encode() + norm.tobytes()).hexdigest()[:16]


def heads_file(folder: Path, key: str) -> Path:
    """Where heads for the model of this fingerprint lie."""
    return folder / f"heads-{key}.safetensors"


def is_ours(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    with one_line(f"draft_heads: {file.name} is not a readable safetensors file"), safe_open(file, "pt") as tensors:
        return (tensors.metadata() or {}).get("format") == FORMAT


def read_heads(file: Path) -> HeadWeights:
    """A file that `write_heads` wrote. Raises UserError."""
    with one_line(f"draft_heads: {file.name} is not a readable file of heads"):
        with safe_open(file, "pt") as stored:
            about = stored.metadata()
            check(about["version"] == str(VERSION), "draft_heads: version", about["version"], f"{VERSION} is read")
            check(about["form"] in FORMS, "draft_heads: form", about["form"], f"one of {', '.join(FORMS)}")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        acceptance = np.array(json.loads(about["acceptance"]), np.float64)
        fine = acceptance.ndim == 2 and len(acceptance) and acceptance.shape[1] and np.isfinite(acceptance).all()
        check(bool(fine), "draft_heads: acceptance", about["acceptance"][:40], "a table of heads x ranks")
        return HeadWeights(
            about["form"], tensors, float(about["eps"]), about["model"] or None, acceptance,
            json.loads(about["provenance"]),
        )  # fmt: skip


def write_heads(weights: HeadWeights, file: Path) -> None:
    """Replaces the file whole."""
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "form": weights.form,
        "eps": repr(weights.eps),
        "model": weights.model or "",
        "acceptance": json.dumps(np.round(weights.acceptance[: len(weights)], 4).tolist()),
        "provenance": json.dumps(dict(weights.provenance), sort_keys=True),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        fresh = Path(scratch) / file.name
        save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, fresh, about)
        fresh.replace(file)


def check_shapes(weights: HeadWeights, spec: ModelSpec) -> None:
    """Raises UserError for tensors that are not those of heads for this model."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    first = found.get("weight", ())
    check(len(first) >= 2 and 1 <= first[0] <= len(PRIOR), "draft_heads: tensor weight", first, "1 to 64 heads")
    heads, hidden = first[0], spec.hidden_size
    if weights.form == "medusa":
        wanted = {"weight": (heads, first[1], hidden, hidden), "bias": (heads, first[1], hidden)}
        if "head" in found:
            wanted["head"] = (heads, spec.vocab_size, hidden)
    else:
        wanted = {"weight": (heads, hidden, hidden), "norm_in": (heads, hidden), "norm_out": (heads, hidden)}
    check(found.keys() == wanted.keys(), "draft_heads: tensors", sorted(found), f"for {weights.form} {sorted(wanted)}")
    for name, shape in wanted.items():
        check(found[name] == shape, f"draft_heads: tensor {name}", found[name], f"for this model it must be {shape}")
        tensor = weights.tensors[name]
        fine = tensor.dtype.is_floating_point and bool(torch.isfinite(tensor).all())
        check(fine, f"draft_heads: tensor {name}", str(tensor.dtype), "it must hold finite floating-point numbers")
    check(len(weights.acceptance) >= heads, "draft_heads: acceptance", len(weights.acceptance), f"{heads} rows")


MEDUSA = re.compile(r"(?:medusa_heads?\.|heads\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
TOKENSWIFT = re.compile(r"(?:model\.)?medusa_layers\.(\d+)\.(linear|input_layernorm|post_layernorm)\.weight")
TOKENSWIFT_NAMES = {"linear": "weight", "input_layernorm": "norm_in", "post_layernorm": "norm_out"}


def convert(path: Path, checkpoint: Checkpoint) -> Path:
    """A checkpoint of Medusa or TokenSwift as a file of ours, written once into the cache."""
    files = foreign_files(path)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(f"{VERSION} {checkpoint.spec.norm_eps} {stats}".encode()).hexdigest()[:12]
    target = cache_folder() / "heads" / f"{path.stem}-{key}.safetensors"
    if not target.is_file():
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors.update(foreign_tensors(file))
        weights = from_names(tensors, checkpoint.spec.norm_eps)
        check_shapes(weights, checkpoint.spec)
        write_heads(replace(weights, provenance={"converted_from": path.name}), target)
    return target


def foreign_files(path: Path) -> list[Path]:
    """The file, or those of a folder: safetensors, else pickles."""
    if path.is_file():
        return [path]
    for pattern in ("*.safetensors", "*.pt", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(f"draft_heads: {str(path)!r} is not allowed; a folder needs *.safetensors, *.pt or *.bin")


def foreign_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of heads in a file, which may hold the rest of a model too. Pickles: tensors only, no code runs."""
    with one_line(f"draft_heads: {file.name} is not a readable file of tensors"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                names = [name for name in stored.keys() if is_head(name)]  # noqa: SIM118 - not a mapping
                return {name: stored.get_tensor(name) for name in names}
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        fine = isinstance(tensors, dict) and all(isinstance(value, torch.Tensor) for value in tensors.values())
        check(fine, "draft_heads", file.name, "a pickle of a dictionary of tensors")
        return {name: tensor for name, tensor in tensors.items() if is_head(name)}


def is_head(name: object) -> bool:
    return isinstance(name, str) and bool(MEDUSA.fullmatch(name) or TOKENSWIFT.fullmatch(name))


def from_names(tensors: Mapping[str, torch.Tensor], eps: float) -> HeadWeights:
    """Heads from the names of Medusa (`0.0.linear.weight`, `0.0.linear.bias`, `0.1.weight`: head, block) or TokenSwift
    (`model.medusa_layers.0.linear.weight`, `.input_layernorm.weight`, `.post_layernorm.weight`).

    Raises UserError where one is missing or the heads differ in shape.
    """
    check(bool(tensors), "draft_heads", "no heads", "the names of Medusa's or TokenSwift's tensors, or a file of ours")
    found: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    form = "tokenswift" if any(TOKENSWIFT.fullmatch(name) for name in tensors) else "medusa"
    for name, tensor in tensors.items():
        if match := TOKENSWIFT.fullmatch(name):
            found.setdefault(TOKENSWIFT_NAMES[match[2]], {})[(int(match[1]),)] = tensor
        elif form == "medusa" and (match := MEDUSA.fullmatch(name)):
            head, block = int(match[1]), int(match[2])
            if match[3]:
                found.setdefault(match[4], {})[head, block] = tensor
            else:
                found.setdefault("head", {})[(head,)] = tensor
    return HeadWeights(form, {part: stack(part, pieces) for part, pieces in found.items()}, eps)


def stack(part: str, pieces: Mapping[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Pieces numbered without gaps as one tensor, the numbers its first dimensions."""
    counts = [max(numbers) + 1 for numbers in zip(*pieces, strict=True)]
    check(len(pieces) == np.prod(counts), f"draft_heads: pieces of {part}", sorted(pieces), f"all of {counts}")
    shapes = {tuple(piece.shape) for piece in pieces.values()}
    check(len(shapes) == 1, f"draft_heads: shapes of {part}", sorted(shapes), "all heads must have the same")
    return torch.stack([pieces[numbers] for numbers in sorted(pieces)]).unflatten(0, counts)
