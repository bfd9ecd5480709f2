"""Trains draft heads on text that the model writes itself. The base is frozen, and only the heads' own matrices
learn."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenswift_py.checkpoints.cache import cache_folder, write_beside
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import DraftTree, Model, Output, Segment
from tokenswift_py.decoding.history import History
from tokenswift_py.drafters.head_files import fingerprint, heads_file, write_heads
from tokenswift_py.drafters.head_weights import FORMS, RANKS, HeadWeights, Table, rms_norm
from tokenswift_py.errors import check
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.sampling.reference import Sampler


@dataclass(frozen=True)
class Rows:
    """N rows of a model over texts that it wrote, text after text. Row r is the one that chose `following[r]`.

    states:    [N, E] bf16, the states that the heads read.
    following: [N] the token that was chosen.
    left:      [N] how many rows of the same text come after it.
    tokens, probabilities: [N, TEACHER] the model's likeliest next tokens and their probabilities.
    """

    states: torch.Tensor
    following: torch.Tensor
    left: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor

    def __len__(self) -> int:
        return len(self.following)


PROMPTS = Path(__file__).parent / "data" / "prompts.json"
TEACHER = 32  # how many tokens of the model's distribution heads learn from


class Reader(Protocol):
    """Says what is kept of a row, as heads do."""

    def reads(self, output: Output, row: int) -> torch.Tensor: ...


class Text:
    """A text being written, and the data that the heads will learn from."""

    def __init__(self, number: int, prompt: Sequence[int], cache: KVCache, sampler: Sampler):
        self.number, self.cache, self.sampler = number, cache, sampler
        self.history = History(prompt)
        self.start = len(prompt)
        self.seen: list[tuple[torch.Tensor, ...]] = []  # each row's state, likeliest tokens, their probabilities

    def __len__(self) -> int:
        return len(self.history) - self.start

    def take(self, state: torch.Tensor, logits: torch.Tensor) -> None:
        """Chooses the next token. state: [E]; logits: [V]."""
        best = logits.softmax(-1).topk(min(TEACHER, len(logits)))
        self.seen.append((state.to("cpu", torch.bfloat16), best.indices.cpu(), best.values.float().cpu()))
        self.history.append(self.sampler.choose(logits, self.history))

    def rows(self) -> Rows:
        states, tokens, probabilities = (torch.stack(column) for column in zip(*self.seen, strict=True))
        following = torch.from_numpy(self.history.tokens[self.start :].astype(np.int64))
        return Rows(states, following, torch.arange(len(self) - 1, -1, -1), tokens, probabilities)


def write(
    model: Model,
    weights: Reader,
    prompts: Iterator[list[int]],
    sampler_of: Callable[[int], Sampler],
    wanted: int,
    length: int,
    context: int,
    ends: Collection[int],
    lanes: int = 16,
    least: int = 1,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[Rows, list[list[int]]]:
    """Lets the model write `wanted` tokens, in texts of at most `length` that end with a token of `ends`, several of
    them a pass. Returns the rows that chose them and the texts, prompts included.

    context: positions for the longest prompt and a text; the model's, or fewer.
    sampler_of: function from the number of a text to its sampler. A row is a row, so text i and its rows depend on
                prompt i and sampler i only, not on how many lanes there are (bitwise so on the native engine).
    deadline: value of time.monotonic() at which all texts of at least `least` tokens are cut where they are; such a run
              cannot be repeated bit for bit.
    """
    lanes = min(lanes, max(1, wanted // length))
    pool, running, done = model.new_pool(lanes * pages_for(context)), list[Text](), list[Text]()
    bar = tqdm(total=wanted, unit="tok", desc="writing", disable=quiet)
    while True:
        while len(running) < lanes and sum(map(len, running + done)) < wanted:
            if time.monotonic() > deadline and running + done:
                break
            number, prompt = len(running) + len(done), next(prompts)
            text = Text(number, prompt, KVCache(pool, context), sampler_of(number))
            output = model.forward([Segment(DraftTree.chain(prompt), text.cache, causal=True)], [len(prompt) - 1])
            text.cache.commit(range(len(prompt)))
            text.take(weights.reads(output, -1), output.logits[0])
            running.append(text)
        late = time.monotonic() > deadline
        cut = [text for text in running if late and len(text) >= least]
        for text in [text for text in running if text.history[-1] in ends or len(text) == length or text in cut]:
            running.remove(text)
            text.cache.release()
            done.append(text)
        if not running and (sum(map(len, done)) >= wanted or late):
            break
        if running:
            output = model.forward([Segment(DraftTree.chain([text.history[-1]]), text.cache) for text in running])
            for row, text in enumerate(running):
                text.cache.commit([0])
                text.take(weights.reads(output, row), output.logits[row])
            bar.update(len(running))
    bar.close()
    return gathered(sorted(done, key=lambda text: text.number), wanted)


def gathered(texts: Sequence[Text], wanted: int) -> tuple[Rows, list[list[int]]]:
    """Returns the first texts that make `wanted` tokens. The number of lanes decides which others had been begun by
    then."""
    count = int(np.searchsorted(np.cumsum([len(text) for text in texts]), wanted)) + 1
    columns = zip(*(vars(text.rows()).values() for text in texts[:count]), strict=True)
    return Rows(*(torch.cat(column) for column in columns)), [text.history.tokens.tolist() for text in texts[:count]]


def usable_rows(rows: Rows, weights: HeadWeights) -> torch.Tensor:
    """Returns the rows after which every head's token was written. Raises UserError where there are none."""
    usable = torch.nonzero(rows.left >= len(weights)).flatten()
    check(len(usable) > 0, "tokens", len(rows), f"texts of more than {len(weights)} tokens")
    return usable


def new_heads(form: str, heads: int, final_norm: torch.Tensor, eps: float) -> HeadWeights:
    """Makes heads whose blocks add nothing yet, so that they guess the pending token again. final_norm: [E] the
    model's."""
    check(form in FORMS, "form", form, f"one of {', '.join(FORMS)}")
    hidden = len(final_norm)
    if form == "medusa":
        return HeadWeights(
            form, {"weight": torch.zeros(heads, 1, hidden, hidden), "bias": torch.zeros(heads, 1, hidden)}
        )
    tensors = {
        "weight": torch.zeros(heads, hidden, hidden),
        "norm_in": torch.ones(heads, hidden),
        "norm_out": final_norm.float().repeat(heads, 1),
    }
    if form == "recurrent":
        tensors["token"] = torch.zeros(heads, hidden, hidden)
    return HeadWeights(form, tensors, eps)


def regressed(weights: HeadWeights, rows: Rows, embedding: torch.Tensor) -> HeadWeights:
    """Makes heads to start training from. Each gets the matrices that come closest to the residual stream i rows later.

    This is ridge regression in closed form. Medusa's block is not linear and starts unchanged.
    """
    if weights.form == "medusa":
        return weights
    at = usable_rows(rows, weights)
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    fitted = replace(weights, tensors=tensors)
    x, hidden = rows.states[at].float(), rows.states.shape[1]
    width = hidden * (2 if weights.sees_tokens else 1)
    for i in range(len(weights)):
        square, toward = torch.zeros(width, width), torch.zeros(width, hidden)
        blocks = list(zip(x.split(BLOCK), at.split(BLOCK), strict=True))  # the inputs of all rows would be gigabytes
        for own, place in blocks:
            parts = [rms_norm(own, weights.eps) * tensors["norm_in"][i]]
            if weights.sees_tokens:
                parts.append(rms_norm(embedding[rows.following[place + i]].float(), weights.eps))
            inputs = torch.cat(parts, 1)
            square += inputs.T @ inputs
            toward += inputs.T @ (rows.states[place + i + 1].float() - own)
        square += RIDGE * square.diagonal().mean() * torch.eye(width)
        solved = torch.linalg.solve(square, toward).T
        for name, matrix in zip(("weight", "token"), solved.split(hidden, dim=1), strict=False):
            tensors[name][i] = matrix
        x = torch.cat([fitted.step(i, own, embedding[rows.following[place + i]].float())[0] for own, place in blocks])
    return fitted


RIDGE = 1e-2
BLOCK = 8192  # rows whose inputs are held at a time


def train(
    weights: HeadWeights,
    rows: Rows,
    lm_head: torch.Tensor,
    embedding: torch.Tensor,
    epochs: float,
    seed: int = 0,
    rate: float = 1e-3,
    batch: int = 256,
    deadline: float = math.inf,
    quiet: bool = False,
    cap: float = 0.0,
) -> tuple[HeadWeights, list[float]]:
    """Trains by AdamW on the cross entropy between the guess of head i at row r and the model's distribution at row r +
    i.

    lm_head:  [V, E], frozen. Products with it are nearly all of the work, so each step takes `Candidates` of it.
    rate:     peak learning rate; a short warm-up, then a cosine down to nothing.
    deadline: time.monotonic() at which to stop early. A run that this ends cannot be repeated bit for bit.
    cap:      soft cap of the model's logits, which is one of the heads' too; 0 is none.
    Returns the heads and the loss of every step (mean over heads, in nats).
    """
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in weights.tensors.items()}
    learner = replace(weights, tensors=parameters)
    scales = {} if weights.form == "medusa" else SCALES
    groups = [{"params": [tensor], "scale": scales.get(name, 1.0)} for name, tensor in parameters.items()]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    usable = usable_rows(rows, weights)
    steps = max(1, round(epochs * len(usable) / batch))
    batches = shuffled(usable, batch, generator)
    common = torch.bincount(rows.following, minlength=len(lm_head)).topk(min(COMMON, len(lm_head))).indices
    losses: list[float] = []
    bar = tqdm(range(steps), unit="step", desc="training", disable=quiet)
    began = time.monotonic()
    for step in bar:
        now = time.monotonic()
        if now > deadline:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"] * rising_and_falling(step, steps, began, now, deadline)
        at = next(batches)
        targets = [(rows.tokens[at + i], rows.probabilities[at + i]) for i in range(1, len(weights) + 1)]
        candidates = Candidates(lm_head, torch.cat([tokens for tokens, _ in targets]), common, generator, cap)
        states = chained(learner, rows, at, embedding)
        loss = torch.stack([candidates.loss(x, *target) for x, target in zip(states, targets, strict=True)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-50:]):.3f}", refresh=False)
    return replace(weights, tensors={name: tensor.detach() for name, tensor in parameters.items()}), losses


def rising_and_falling(step: int, steps: int, began: float, now: float, deadline: float, warmup: int = 20) -> float:
    """Returns the share of the peak learning rate in a step: a warm-up of so many steps, then a cosine down to nothing
    at the last step, or at the deadline where that comes first."""
    done = max(step / steps, (now - began) / max(deadline - began, 1e-9))
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


SCALES = {"weight": 10.0, "token": 10.0}
"""Factors on the learning rate. These matrices lead from normed rows to the residual stream, which is some ten times
larger."""


def shuffled(rows: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields batches of all rows in a random order, again and again."""
    left = rows[:0]
    while True:
        while len(left) < batch:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        yield left[:batch]
        left = left[batch:]


COMMON = 512  # tokens that are candidates in every step
LIKELY = 2  # the model's best tokens at each row of a batch that are candidates of its step
OTHERS = 256  # random tokens, which stand for all the rest


class Candidates:
    """The part of the vocabulary that a training step looks at: tokens the model finds likely in the batch, common
    ones, and a random sample whose share of the softmax's sum is scaled up to that of all others.

    lm_head: [V, E]; likely: [R, TEACHER] the model's best tokens of each row; common: [n] token ids.
    """

    def __init__(
        self,
        lm_head: torch.Tensor,
        likely: torch.Tensor,
        common: torch.Tensor,
        generator: torch.Generator,
        cap: float = 0.0,
    ):
        vocab = len(lm_head)
        inside = torch.zeros(vocab, dtype=torch.bool)
        inside[likely[:, :LIKELY].flatten()] = inside[common] = True
        kept = torch.nonzero(inside).flatten()
        drawn = torch.randint(vocab, (OTHERS,), generator=generator).unique()
        others = drawn[~inside[drawn]]
        self.place = torch.full((vocab,), -1)
        self.place[kept] = torch.arange(len(kept))
        self.matrix, self.cap = lm_head[torch.cat([kept, others])].to(torch.bfloat16), cap
        self.weight = torch.zeros(len(self.matrix))
        self.weight[len(kept) :] = math.log(max(1, vocab - len(kept)) / max(1, len(others)))

    def loss(self, states: torch.Tensor, tokens: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Returns the cross entropy in nats against the model's probabilities of those of its best tokens that are
        candidates.

        states: [R, E]; tokens, probabilities: [R, TEACHER].
        """
        logits = logits_of(states, self.matrix, self.cap) + self.weight
        places = self.place[tokens]
        share = torch.where(places >= 0, probabilities, 0.0)
        share = share / share.sum(-1, keepdim=True)
        return -(share * logits.log_softmax(-1).gather(-1, places.clamp_min(0))).sum(-1).mean()


def logits_of(states: torch.Tensor, matrix: torch.Tensor, cap: float = 0.0) -> torch.Tensor:
    """Returns [R, n] fp32 logits of states [R, E] by rows [n, E] of the LM head, under the model's soft cap."""
    logits = F.linear(states.to(matrix.dtype), matrix).float()
    return torch.tanh(logits / cap) * cap if cap else logits


def chained(weights: HeadWeights, rows: Rows, at: torch.Tensor, embedding: torch.Tensor) -> list[torch.Tensor]:
    """Returns for each head the states [len(at), E] that the LM head reads, where the tokens before its guess are those
    that were written."""
    x, states = rows.states[at].float(), []
    for i in range(len(weights)):
        x, state = weights.step(i, x, embedding[rows.following[at + i]].float())
        states.append(state)
    return states


@torch.inference_mode()
def accuracy(
    weights: HeadWeights, rows: Rows, lm_head: torch.Tensor, embedding: torch.Tensor, batch: int = 256
) -> dict[str, list[float]]:
    """Returns for each head how often the token that followed was its best (top1), or among its best three (top3)."""
    hits = torch.zeros(2, len(weights))
    usable = usable_rows(rows, weights)
    matrix = lm_head.to(torch.bfloat16)
    for at in usable.split(batch):
        for i, state in enumerate(chained(weights, rows, at, embedding)):
            best = logits_of(state, matrix).topk(3).indices  # a cap does not change their order
            right = best == rows.following[at + i + 1, None]
            hits[:, i] += torch.stack([right[:, 0].sum(), right.any(-1).sum()])
    top1, top3 = (hits / len(usable)).double().numpy().round(4).tolist()
    return {"top1": top1, "top3": top3}


@torch.inference_mode()
def acceptance(
    weights: HeadWeights,
    rows: Rows,
    texts: Sequence[Sequence[int]],
    sampler_of: Callable[[int], Sampler],
    lm_head: torch.Tensor,
    embedding: torch.Tensor,
    most: int = 1000,
    cap: float = 0.0,
) -> Table:
    """Returns [K, RANKS] how often each candidate of each head, best first by the noise of its position, was the token
    that the model wrote there. Drafting would have seen the same, at up to `most` rows spread over the texts.

    texts: the texts of `write`.
    """
    hits, matrix = np.zeros((len(weights), RANKS)), lm_head.to(torch.bfloat16)
    every = max(1, len(usable_rows(rows, weights)) // most)
    offset = seen = 0
    for number, text in enumerate(texts):
        count = int(rows.left[offset]) + 1
        sampler, start = sampler_of(number), len(text) - count
        for row in range(0, count - len(weights), every):
            history = History(text[: start + row + 1])
            states = torch.cat(chained(weights, rows, torch.tensor([offset + row]), embedding))
            for i, logits in enumerate(logits_of(states, matrix, cap)):
                guesses, token = sampler.rank(logits, history, RANKS), text[len(history)]
                if token in guesses:
                    hits[i, guesses.index(token)] += 1
                history.append(token)
            seen += 1
        offset += count
    return hits / max(1, seen)


def own_file(checkpoint: Checkpoint) -> Path:
    """Returns the place where the drafter looks for heads of this model."""
    return heads_file(cache_folder(), fingerprint(checkpoint))


def keep(weights: HeadWeights, checkpoint: Checkpoint, file: Path | None = None) -> Path:
    """Writes heads for this model to a file, or where the drafter looks for them, with their origin and figures beside
    them. Those that are there are renamed."""
    target = file or own_file(checkpoint)
    made = replace(weights, model=fingerprint(checkpoint))
    if file is None:
        write_beside(target, lambda fresh: write_heads(made, fresh), also=target.with_suffix(".json"))
    else:
        write_heads(made, target)
    target.with_suffix(".json").write_text(json.dumps(dict(weights.provenance), indent=1) + "\n", encoding="utf-8")
    return target
