"""Draft heads: small residual blocks on the last hidden state that guess the tokens behind the pending one.

The row that gave the pending token has everything they read, so a proposal costs products with the LM head and no
pass of the model. Head i = 1 .. K guesses the i-th token behind the pending one. Three forms:

medusa (Cai et al. 2024, arXiv 2401.10774): x = final norm's output; x <- x + SiLU(W x + b), once a block; each head
    on its own, with the model's LM head or one of its own.
tokenswift (Wu et al. 2025, arXiv 2502.18890): h_0 = residual stream before the final norm;
    h_i = h_{i-1} + W_i norm_in_i(h_{i-1}), and the model's LM head reads norm_out_i(h_i); norms are RMSNorms.
recurrent: the same chain, which also sees the token before the one it guesses (t_1 is the pending token, known when
    heads are asked, t_2 the first guess): h_i = h_{i-1} + W_i norm_in_i(h_{i-1}) + U_i rms(embedding(t_i)). The idea
    of Hydra (Ankner et al. 2024, arXiv 2402.05109) and ReDrafter (Zhang et al. 2024, arXiv 2403.09919). It costs a
    product with the LM head for every level of the tree; the other forms pay one for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

from tokenswift_py.checkpoints.cache import cache_folder
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import Acceptance, DraftTree, Model, Output, TreeBuilder
from tokenswift_py.drafters.base import Context, Draft, Drafter
from tokenswift_py.errors import UserError, check, one_line
from tokenswift_py.models.spec import ModelSpec
from tokenswift_py.planning.planner import Odds
from tokenswift_py.sampling.reference import NumericsError

logger = logging.getLogger("tokenswift")

Table = npt.NDArray[np.float64]

FORMS = ("medusa", "tokenswift", "recurrent")
FORMAT = "tokenswift-heads"
VERSION = 1
PACKAGED = Path(__file__).parent / "data"

RANKS = 8  # candidates of each head
PRIOR = (0.4 * 0.8 ** np.arange(64)[:, None] / (1 + np.arange(RANKS)) ** 1.5).round(4)  # where none was measured
UNLIKELY = 0.01  # paths below this are not proposed
MEASURED = 50.0  # guesses that an acceptance measured in training counts as
MARGIN = 1.5  # what guesses must save over the time of asking for them, for what seems to pay just so seldom does
BEAM = 3  # places of a level that get children


@dataclass(frozen=True)
class HeadWeights:
    """K heads. The tensors, by form:

    medusa:     weight [K, blocks, E, E], bias [K, blocks, E]; head [K, V, E] unless the model's LM head is shared.
    tokenswift: weight [K, E, E], norm_in [K, E], norm_out [K, E].
    recurrent:  those and token [K, E, E].

    eps:         of the RMSNorms.
    model:       `fingerprint` of the model that they were made for; None is not known.
    acceptance:  [K, ranks] how often each candidate of each head, best first, is what the model then writes if the
                 tokens before it are right.
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

    @property
    def sees_tokens(self) -> bool:
        return self.form == "recurrent"

    def reads(self, output: Output, row: int) -> torch.Tensor:
        """[E] what the heads read of a row of a pass."""
        states = output.hidden if self.form == "medusa" else output.residual
        assert states is not None, "this executor does not report the residual stream"
        return states[row]

    def step(self, head: int, x: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next head reads, and what the LM head reads for this one. All [R, E].

        x: of `reads`, or of the head before; token: embedding of the token before the one that is guessed.
        """
        at = {name: tensor[head] for name, tensor in self.tensors.items()}
        if self.form == "medusa":
            state = x
            for weight, bias in zip(at["weight"], at["bias"], strict=True):
                state = state + F.silu(F.linear(state, weight, bias))
            return x, state
        x = x + F.linear(rms_norm(x, self.eps) * at["norm_in"], at["weight"])
        if self.sees_tokens:
            x = x + F.linear(rms_norm(token, self.eps), at["token"])
        return x, rms_norm(x, self.eps) * at["norm_out"]

    def project(self, states: torch.Tensor, heads: Sequence[int], model: Model) -> torch.Tensor:
        """[R, V] fp32 logits of rows [R, E] that these heads gave, by the model's LM head or their own."""
        own = self.tensors.get("head")
        if own is None:
            return model.project(states)
        rows = zip(states.to(own.dtype), heads, strict=True)
        return torch.stack([F.linear(state, own[head]).float() for state, head in rows])

    def to(self, device: torch.device) -> HeadWeights:
        """On a device, in fp32 but for LM heads in bf16, which are large and stay as they are."""
        wide = {
            name: tensor.to(device, torch.bfloat16 if (name, tensor.dtype) == BF16_HEAD else torch.float32)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=wide)


BF16_HEAD = ("head", torch.bfloat16)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class Place:
    """A node that the tree may have.

    chance: that the model writes the path; x: [1, E] what the head that guesses its children reads.
    """

    chance: float
    path: tuple[int, ...]
    x: torch.Tensor


@dataclass(frozen=True)
class Terms:
    """What guesses of heads are worth to a drafter that has more than heads.

    known:   the chance that its other guesses hold the next token already.
    gain_ms: milliseconds that a guess of such a chance saves, as one more row of a draft of so many.
    """

    known: float
    gain_ms: Callable[[float, int], float]


class Heads(Drafter):
    """A tree of the heads' best guesses, by the same noise as the target's choice.

    The chance of a node is the product of the acceptances of the ranks on its path, as Medusa's trees are grown
    (arXiv 2401.10774, section 2.3.3); level by level the most probable nodes get children, and the most probable of
    all are proposed. The acceptances start at those measured in training and follow those seen.

    embedding: [V, E] the model's; only heads that see tokens read it.
    """

    name = "heads"

    def __init__(self, weights: HeadWeights, embedding: torch.Tensor):
        self.weights = weights
        self.embedding = embedding
        measured = np.asarray(weights.acceptance[: len(weights)]).tolist()
        self.odds = [[Odds(share, weight=MEASURED) for share in ranks] for ranks in measured]  # of a head's ranks
        self._row: torch.Tensor | None = None
        self._guesses: dict[tuple[int, ...], list[int]] = {}  # behind each path of the last tree that got children

    def prefill(self, context: Context, output: Output) -> None:
        self._row = self.weights.reads(output, -1)

    def propose(self, context: Context, budget: int) -> DraftTree:
        if self._row is None:
            return DraftTree.chain([context.history[-1]])
        return self.tree(self._row, context, budget)

    def observe(self, taken: Acceptance, output: Output) -> None:
        self.learn(taken.tokens)
        self._row = self.weights.reads(output, taken.path[-1])

    def alike(self) -> object:
        digest = hashlib.sha256()
        for _, tensor in sorted(self.weights.tensors.items()):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return self.weights.form, np.asarray(self.weights.acceptance).tolist(), digest.hexdigest()

    @torch.inference_mode()
    def tree(self, row: torch.Tensor, context: Context, budget: int) -> DraftTree:
        """Up to `budget` nodes behind the history's last token. row: [E], `weights.reads` of the row that gave it."""
        self.move(row.device)
        self._guesses = {}
        depth = min(len(self.weights), budget - 1)
        x = row.float()[None]
        same = self.same_ahead(x, depth, context.draft_model)
        places = [Place(1.0, (), x)]
        for head in range(depth):
            places.sort(key=by_chance)
            least = places[budget - 1].chance if len(places) >= budget else UNLIKELY
            best = max(odds.chance for odds in self.odds[head])  # a place is asked if one of its children could be in
            parents = [p for p in places[:budget] if len(p.path) == head and (head == 0 or p.chance * best >= least)]
            if not parents:
                break
            places += self.children(head, parents[:BEAM], context, None if same is None else same[head])
        places = sorted(places, key=by_chance)[:budget]
        worth = context.planner.worth_row
        rows = next((n for n, place in enumerate(places) if n and not worth(place.chance, n)), len(places))
        builder = TreeBuilder(context.history[-1], budget)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for place in places[1 : context.planner.rows_paid([place.chance for place in places[:rows]], 1)]:
            child = builder.add(nodes[place.path[:-1]], place.path[-1])
            assert child is not None
            nodes[place.path] = child
        return builder.build()

    def same_ahead(self, x: torch.Tensor, heads: int, model: Model) -> torch.Tensor | None:
        """[heads, V] logits of heads that see no tokens, one product for all; None for those that do."""
        if self.weights.sees_tokens or not heads:
            return None
        states = []
        for head in range(heads):
            x, state = self.weights.step(head, x, x)
            states.append(state)
        return self.weights.project(torch.cat(states), range(heads), model)

    def children(self, head: int, parents: Sequence[Place], context: Context, same: torch.Tensor | None) -> list[Place]:
        """The candidates of one head behind each of these places, as the sampler would rank them.

        same: [V] logits of a head that sees no tokens: it is ranked once, behind the first place, for all of them.
        """
        if same is None:
            asked = self.ask(head, parents, context)
        else:
            guesses = self.rank(same, parents[0].path, context)
            asked = [(place.x, guesses) for place in parents]
        found = []
        for place, (x, guesses) in zip(parents, asked, strict=True):
            self._guesses[place.path] = guesses
            for guess, odds in zip(guesses, self.odds[head], strict=False):
                chance = place.chance * odds.chance
                if chance >= UNLIKELY:
                    found.append(Place(chance, (*place.path, guess), x))
        return found

    def ask(self, head: int, places: Sequence[Place], context: Context) -> list[tuple[torch.Tensor, list[int]]]:
        """What the next head reads behind each of these places, and this one's guesses there, best first."""
        # Row by row: of a few rows torch makes work for several threads, which wait for one another, on a busy machine
        # for milliseconds. One row takes microseconds.
        steps = [self.step(head, place, context.history[-1]) for place in places]
        states = torch.cat([state for _, state in steps])
        rows = self.weights.project(states, [head] * len(places), context.draft_model)
        ranked = [self.rank(row, place.path, context) for row, place in zip(rows, places, strict=True)]
        return [(x, guesses) for (x, _), guesses in zip(steps, ranked, strict=True)]

    def step(self, head: int, place: Place, pending: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head makes of a place, which the token on its way there is the last to enter."""
        token = self.embedding[place.path[-1] if place.path else pending]
        return self.weights.step(head, place.x, token[None].to(place.x.device, place.x.dtype))

    @torch.inference_mode()
    def extend(self, draft: Draft, end: int, row: torch.Tensor, context: Context, terms: Terms) -> None:
        """For a drafter that has more than heads: hang guesses behind node `end` of its draft, which carries the
        history's last token, head by head behind the likeliest, as long as one more head is worth its time, or until
        it is known what it takes.

        row: [E], `weights.reads` of the row that gave that token.
        """
        self.move(row.device)
        place = Place(draft.chances[end], (), row.float()[None])
        for head, odds in enumerate(self.odds):
            if len(draft) == draft.budget:
                return
            cost = context.planner.heads
            ms = cost(1, 0)
            unknown = place.chance * (1 - terms.known)
            gains = (terms.gain_ms(unknown * each.chance, len(draft) + rank) for rank, each in enumerate(odds))
            gain = sum(takewhile(lambda saved: saved > 0, gains))
            if cost.measured and gain <= MARGIN * ms and not (head == 0 and context.planner.may_probe(ms, "heads")):
                return
            lap = context.draft_model.clock.start()
            [(x, guesses)] = self.ask(head, [place], context)
            lap.stop()
            cost.observe(1, 0, lap.ms)
            best = None
            for token, each in zip(guesses, odds, strict=False):
                if terms.gain_ms(place.chance * each.chance, len(draft)) <= 0:
                    break
                node = draft.guess(end, token, each)
                best = node if best is None else best
            if best is None:
                return
            place, end = Place(draft.chances[best], (*place.path, draft.tokens[best]), x), best

    def move(self, device: torch.device) -> None:
        """The weights to where the model's rows are, in fp32."""
        weight = self.weights.tensors["weight"]
        if weight.device != device or weight.dtype != torch.float32:
            self.weights = self.weights.to(device)

    def rank(self, logits: torch.Tensor, path: Sequence[int], context: Context) -> list[int]:
        """What the target's sampler would choose of these logits behind this path, best first; nothing where nobody
        can choose: whether the text comes that far is for the target to say."""
        start = len(context.history)
        context.history.extend(path)
        try:
            return context.sampler.rank(logits, context.history, len(self.odds[0]))
        except NumericsError:
            return []
        finally:
            context.history.truncate(start)

    def learn(self, tokens: Sequence[int]) -> None:
        """What the model wrote behind the pending token of the last tree."""
        for head, token in enumerate(tokens[: len(self.weights)]):
            guesses = self._guesses.get(tuple(tokens[:head]))
            if guesses is None:
                break
            for guess, odds in zip(guesses, self.odds[head], strict=False):
                odds.learn(guess == token)
        self._guesses = {}


def by_chance(place: Place) -> tuple[float, int]:
    """Most probable first; of equals the shallower, so that a parent comes before its children."""
    return -place.chance, len(place.path)


def for_checkpoint(checkpoint: Checkpoint, path: str | None = None) -> Heads:
    """The drafter with the heads that `path` names, see `find_heads`."""
    weights = find_heads(checkpoint, path)
    return Heads(weights, checkpoint.tensors(dtype=torch.bfloat16)["model.embed_tokens.weight"])


DRAFTER = for_checkpoint


def find_heads(checkpoint: Checkpoint, path: str | None = None) -> HeadWeights:
    """Read heads and check them against the model. Raises UserError.

    path: a file of ours, or a file or folder with heads of Medusa or TokenSwift (.safetensors, .pt, .bin), which is
    converted once into the cache; "auto" and None look for heads that were trained for this model, in the cache and in
    the package.
    """
    key = fingerprint(checkpoint)
    if path in (None, "auto"):
        found = [file for file in heads_files(checkpoint) if file.is_file()]
        advice = f"train them (tokenswift train-heads --model {checkpoint.name}) or name a file"
        check(bool(found), "draft_heads", path, f"there are none for {checkpoint.name}: {advice}")
        file = found[0]
    else:
        assert path is not None
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


def heads_files(checkpoint: Checkpoint) -> list[Path]:
    """Where heads for a model are looked for, what was trained here first."""
    key = fingerprint(checkpoint)
    return [heads_file(folder, key) for folder in (cache_folder(), PACKAGED)]


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
        fresh.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, about))
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
        if weights.form == "recurrent":
            wanted["token"] = (heads, hidden, hidden)
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
    stacked = torch.stack([pieces[numbers] for numbers in sorted(pieces)])
    return stacked.reshape(*counts, *stacked.shape[1:])
