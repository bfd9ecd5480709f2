"""Training of draft heads on text the model writes itself: frozen base, only the heads' own matrices learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenswift_py.core import DraftTree, Model, Segment
from tokenswift_py.drafters.heads import RANKS, HeadWeights, Table
from tokenswift_py.errors import check
from tokenswift_py.history import History
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.sampling import Sampler


@dataclass(frozen=True)
class Rows:
    """N rows of a model over texts that it wrote, text after text; row r is that which chose `following[r]`.

    states:    [N, E] bf16, what the heads read.
    following: [N] the token that was chosen.
    left:      [N] how many rows of the same text come after.
    tokens, probabilities: [N, TEACHER] the model's likeliest next tokens and what it gave them.
    """

    states: torch.Tensor
    following: torch.Tensor
    left: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor

    def __len__(self) -> int:
        return len(self.following)


TEACHER = 32  # of the model's distribution that heads learn from


class Text:
    """A text being written, and what the heads will learn from it."""

    def __init__(self, number: int, prompt: Sequence[int], cache: KVCache, sampler: Sampler):
        self.number, self.cache, self.sampler = number, cache, sampler
        self.history = History(prompt)
        self.start = len(prompt)
        self.seen: list[tuple[torch.Tensor, ...]] = []  # of each row: state, likeliest tokens, their probabilities

    def __len__(self) -> int:
        return len(self.history) - self.start

    def take(self, state: torch.Tensor, logits: torch.Tensor) -> None:
        """Choose the next token. state: [E]; logits: [V]."""
        best = logits.softmax(-1).topk(min(TEACHER, len(logits)))
        self.seen.append((state.to("cpu", torch.bfloat16), best.indices.cpu(), best.values.float().cpu()))
        self.history.append(self.sampler.choose(logits, self.history))

    def rows(self) -> Rows:
        states, tokens, probabilities = (torch.stack(column) for column in zip(*self.seen, strict=True))
        following = torch.from_numpy(self.history.tokens[self.start :].astype(np.int64))
        return Rows(states, following, torch.arange(len(self) - 1, -1, -1), tokens, probabilities)


def write(
    model: Model,
    weights: HeadWeights,
    prompts: Iterator[list[int]],
    sampler_of: Callable[[int], Sampler],
    wanted: int,
    length: int,
    ends: Collection[int],
    lanes: int = 16,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[Rows, list[list[int]]]:
    """Let the model write `wanted` tokens, in texts of at most `length` that end with a token of `ends`, several of
    them a pass. Returns the rows behind them and the texts, prompts included.

    sampler_of: the number of a text -> its sampler. A row is a row, so text i and its rows depend on prompt i and
    sampler i only, not on how many lanes there are (bitwise so on the native engine). At `deadline`
    (time.monotonic()) all texts are cut where they are; such a run cannot be repeated bit for bit.
    """
    pool, running, done = None, list[Text](), list[Text]()
    bar = tqdm(total=wanted, unit="tok", desc="writing", disable=quiet)
    while True:
        while len(running) < lanes and sum(map(len, running + done)) < wanted and time.monotonic() < deadline:
            prompt = next(prompts)
            pool = pool or model.new_pool(lanes * pages_for(len(prompt) + 2 * length))
            number = len(running) + len(done)
            text = Text(number, prompt, KVCache(pool, len(prompt) + length), sampler_of(number))
            output = model.forward([Segment(DraftTree.chain(prompt), text.cache, causal=True)], [len(prompt) - 1])
            text.cache.commit(range(len(prompt)))
            text.take(weights.reads(output, -1), output.logits[0])
            running.append(text)
        late = time.monotonic() > deadline
        for text in [text for text in running if text.history[-1] in ends or len(text) == length or late]:
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
    """The first texts that make `wanted` tokens. Which others had been begun by then depends on the lanes."""
    count = int(np.searchsorted(np.cumsum([len(text) for text in texts]), wanted)) + 1
    columns = zip(*(vars(text.rows()).values() for text in texts[:count]), strict=True)
    return Rows(*(torch.cat(column) for column in columns)), [text.history.tokens.tolist() for text in texts[:count]]


def new_heads(form: str, heads: int, hidden: int, final_norm: torch.Tensor, eps: float, blocks: int = 1) -> HeadWeights:
    """Heads that begin as the model's own prediction of the next token: their blocks add nothing yet."""
    if form == "medusa":
        shape = (heads, blocks, hidden)
        tensors = {"weight": torch.zeros(*shape, hidden), "bias": torch.zeros(shape)}
    else:
        norm = final_norm.float()
        tensors = {
            "weight": torch.zeros(heads, hidden, hidden),
            "norm_in": torch.ones(heads, hidden),
            "norm_out": norm.repeat(heads, 1),
        }
    return HeadWeights(form, tensors, eps)


def train(
    weights: HeadWeights,
    rows: Rows,
    lm_head: torch.Tensor,
    epochs: float,
    seed: int = 0,
    rate: float = 1e-3,
    batch: int = 256,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[HeadWeights, list[float]]:
    """AdamW on the cross entropy between what head i says at row r and what the model said at row r + i.

    lm_head:  [V, E], frozen; products with it are nearly all of the work, so each step takes `Candidates` of it.
    rate:     peak learning rate; a short warm-up, then a cosine down to nothing.
    deadline: time.monotonic() at which to stop early; a run that this ends cannot be repeated bit for bit.
    Returns the heads and the loss of every step (mean over heads, in nats).
    """
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in weights.tensors.items()}
    learner = replace(weights, tensors=parameters)
    groups = [{"params": [tensor], "scale": SCALE.get((weights.form, name), 1.0)} for name, tensor in parameters.items()]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    usable = torch.nonzero(rows.left >= len(weights)).flatten()
    check(len(usable) > 0, "tokens", len(rows), f"texts of more than {len(weights)} tokens")
    steps = max(1, round(epochs * len(usable) / batch))
    order = torch.cat([usable[torch.randperm(len(usable), generator=generator)] for _ in range(math.ceil(epochs) + 1)])
    common = torch.bincount(rows.following, minlength=len(lm_head)).topk(min(COMMON, len(lm_head))).indices
    losses: list[float] = []
    bar = tqdm(range(steps), unit="step", desc="training", disable=quiet)
    for step in bar:
        if time.monotonic() > deadline:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"] * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        at = order[step * batch : (step + 1) * batch]
        targets = [(rows.tokens[at + i], rows.probabilities[at + i]) for i in range(1, len(weights) + 1)]
        candidates = Candidates(lm_head, torch.cat([tokens for tokens, _ in targets]), common, generator)
        states = learner.states(rows.states[at].float())
        loss = torch.stack([candidates.loss(x, *target) for x, target in zip(states, targets, strict=True)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-50:]):.3f}", refresh=False)
    return replace(weights, tensors={name: tensor.detach() for name, tensor in parameters.items()}), losses


SCALE = {("tokenswift", "weight"): 10.0}
COMMON = 1024  # tokens that are candidates in every step
LIKELY = 4  # of the model's best tokens at each row of a batch, candidates of its step
OTHERS = 512  # tokens drawn at random, which stand for all the rest


class Candidates:
    """The part of the vocabulary that a training step looks at: tokens the model finds likely in the batch, common
    ones, and a random sample whose share of the softmax's sum is scaled up to that of all others.

    lm_head: [V, E]; likely: [R, TEACHER] the model's best tokens of each row; common: [n] token ids.
    """

    def __init__(self, lm_head: torch.Tensor, likely: torch.Tensor, common: torch.Tensor, generator: torch.Generator):
        vocab = len(lm_head)
        inside = torch.zeros(vocab, dtype=torch.bool)
        inside[likely[:, :LIKELY].flatten()] = inside[common] = True
        kept = torch.nonzero(inside).flatten()
        drawn = torch.randint(vocab, (OTHERS,), generator=generator).unique()
        others = drawn[~inside[drawn]]
        self.place = torch.full((vocab,), -1)
        self.place[kept] = torch.arange(len(kept))
        self.matrix = lm_head[torch.cat([kept, others])].to(torch.bfloat16)
        self.weight = torch.zeros(len(self.matrix))
        self.weight[len(kept) :] = math.log(max(1, vocab - len(kept)) / max(1, len(others)))

    def loss(self, states: torch.Tensor, tokens: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats against the model's probabilities of those of its best tokens that are candidates.

        states: [R, E]; tokens, probabilities: [R, TEACHER].
        """
        logits = F.linear(states.to(self.matrix.dtype), self.matrix).float() + self.weight
        places = self.place[tokens]
        share = torch.where(places >= 0, probabilities, 0.0)
        share = share / share.sum(-1, keepdim=True)
        return -(share * logits.log_softmax(-1).gather(-1, places.clamp_min(0))).sum(-1).mean()


@torch.inference_mode()
def accuracy(weights: HeadWeights, rows: Rows, lm_head: torch.Tensor, batch: int = 256) -> dict[str, list[float]]:
    """Of each head, how often the token that followed was its best (top1), or among its best three (top3)."""
    hits = torch.zeros(2, len(weights))
    usable = torch.nonzero(rows.left >= len(weights)).flatten()
    matrix = lm_head.to(torch.bfloat16)
    for at in usable.split(batch):
        for i, state in enumerate(weights.states(rows.states[at].float())):
            best = F.linear(state.to(matrix.dtype), matrix).float().topk(3).indices
            right = best == rows.following[at + i + 1, None]
            hits[:, i] += torch.stack([right[:, 0].sum(), right.any(-1).sum()])
    return {name: [round(x, 4) for x in (row / len(usable)).tolist()] for name, row in zip(("top1", "top3"), hits)}


@torch.inference_mode()
def acceptance(
    weights: HeadWeights,
    rows: Rows,
    texts: Sequence[Sequence[int]],
    sampler_of: Callable[[int], Sampler],
    lm_head: torch.Tensor,
    most: int = 1000,
) -> Table:
    """[K, RANKS] how often each candidate of each head, best first by the noise of its position, was what the model
    wrote there: what drafting would have seen, at up to `most` rows spread over the texts. texts: of `write`."""
    hits, matrix = np.zeros((len(weights), RANKS)), lm_head.to(torch.bfloat16)
    every = max(1, int((rows.left >= len(weights)).sum()) // most)
    offset = seen = 0
    for number, text in enumerate(texts):
        count = int(rows.left[offset]) + 1
        sampler, start = sampler_of(number), len(text) - count
        for row in range(0, count - len(weights), every):
            history = History(text[: start + row + 1])
            states = weights.states(rows.states[offset + row, None].float())[:, 0]
            for i, logits in enumerate(F.linear(states.to(matrix.dtype), matrix).float()):
                guesses, token = sampler.rank(logits, history, RANKS), text[len(history)]
                if token in guesses:
                    hits[i, guesses.index(token)] += 1
                history.append(token)
            seen += 1
        offset += count
    return hits / max(1, seen)
