"""Trains an EAGLE-3 draft for a model on text that the model writes itself.

It learns as the paper has it (Li et al. 2025, arXiv 2503.01840, section 3.2, "training-time test"): in the first step
its rows read the target's states, in each later one what they handed on in the step before, beside the keys of the
target's rows and of their own earlier steps. So it meets its own errors in training as it will in drafting. The target
stays as it is, and so do the embeddings.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokenswift_py.checkpoints.cache import write_beside
from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.core import DraftTree, Model, Output, Segment
from tokenswift_py.drafters.draft_folders import rope_config
from tokenswift_py.drafters.eagle_files import own_folder, usual_taps, write_eagle
from tokenswift_py.drafters.eagle_layer import TAPS, EagleLayer, EagleShape
from tokenswift_py.drafters.training import TEACHER, Rows, rising_and_falling
from tokenswift_py.errors import check
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import pages_for
from tokenswift_py.models.devices import fast_bf16
from tokenswift_py.models.spec import ModelSpec


@dataclass(frozen=True)
class Lesson:
    """A text of n tokens, and what the target says of its n rows.

    taps:   [n, 3, target_hidden] bf16.
    tokens: [n]. first: the first token that the model wrote; those before it are the prompt.
    likeliest, probabilities: [n, TEACHER] the model's likeliest tokens after each row, and their probabilities.
    """

    taps: torch.Tensor
    tokens: torch.Tensor
    first: int
    likeliest: torch.Tensor
    probabilities: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)


Written = tuple[Rows, Sequence[Sequence[int]]]  # the result of `training.write`


class Nothing:
    """Keeps nothing of a row while the model writes: texts are read again, whole."""

    def reads(self, output: Output, row: int) -> torch.Tensor:
        return output.hidden[row, :0]


def learn(
    model: Model,
    checkpoint: Checkpoint,
    tensors: Mapping[str, torch.Tensor],
    written: Written,
    held: Written,
    steps: int,
    draft_vocab: int,
    epochs: float,
    seed: int,
    rate: float,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[EagleLayer, list[float], dict[str, list[float]]]:
    """Makes a draft and trains it. Returns it as it is kept, in bf16, the losses, and its `accuracy` on held-out texts.

    tensors: the target's. written, held: texts to learn from, and held out. steps: how many tokens ahead it learns.
    """
    spec = checkpoint.spec
    counts = torch.bincount(written[0].following, minlength=spec.vocab_size)
    fresh = new_eagle(spec, tensors, checkpoint.config, counts, draft_vocab, seed)
    lessons, others = (read(model, fresh.shape.taps, texts, lengths(rows), quiet) for rows, texts in (written, held))
    layer, losses = train(fresh, lessons, steps, epochs, seed, rate, deadline=deadline, quiet=quiet)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in layer.tensors.items()}
    kept = EagleLayer(layer.shape, halves, layer.embedding, layer.targets)
    kept.move(torch.device("cpu"))
    return kept, losses, accuracy(kept, others, steps)


def lengths(rows: Rows) -> list[int]:
    """Returns how many tokens of each text the model wrote."""
    found: list[int] = []
    at = 0
    while at < len(rows):
        found.append(int(rows.left[at]) + 1)
        at += found[-1]
    return found


CHUNK = 256  # rows of a pass that reads a text


@torch.inference_mode()
def read(
    model: Model, taps: Sequence[int], texts: Sequence[Sequence[int]], written: Sequence[int], quiet: bool = False
) -> list[Lesson]:
    """Returns what the target says of texts. written: how many tokens at the end of each the model wrote."""
    lessons: list[Lesson] = []
    pool = model.new_pool(pages_for(model.context))
    for text, count in zip(tqdm(texts, unit="text", desc="reading", disable=quiet), written, strict=True):
        cache = KVCache(pool, model.context)
        said: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(text), CHUNK):
            chunk = text[start : start + CHUNK]
            output = model.forward([Segment(DraftTree.chain(chunk), cache, causal=True)], taps=taps)
            cache.commit(range(len(chunk)))
            assert output.taps is not None, "this executor does not report what enters a layer"
            best = output.logits.softmax(-1).topk(min(TEACHER, output.logits.shape[1]))
            said.append((output.taps.to("cpu", torch.bfloat16), best.indices.cpu(), best.values.float().cpu()))
        cache.release()
        states, likeliest, shares = (torch.cat(column) for column in zip(*said, strict=True))
        lessons.append(Lesson(states, torch.tensor(text), len(text) - count, likeliest, shares))
    return lessons


def taps_for(layers: int) -> tuple[int, ...]:
    """Returns the layers that a new draft reads: the authors', or three spread over a model that is too small."""
    usual = usual_taps(layers)
    if list(usual) == sorted(set(usual)):
        return usual
    check(layers >= TAPS, "model", f"{layers} layers", f"an EAGLE-3 draft reads {TAPS} of them")
    return 0, layers // 2, layers - 1


def new_eagle(
    spec: ModelSpec, tensors: Mapping[str, torch.Tensor], config: Any, counts: torch.Tensor, draft_vocab: int, seed: int
) -> EagleLayer:
    """Makes a draft to start from. Its feed-forward, norms and the half of attention that reads states are those of the
    target's last layer where they have the same form, so that its states are at home before the target's LM head.

    tensors: the target's. config: its config. counts: [vocab] how often each token is in the text. The draft can guess
             the most frequent ones, and of equals those with the lowest ids, which tokenizers learned first.
    """
    vocab, hidden = spec.vocab_size, spec.hidden_size
    rope = rope_config(
        {
            "hidden_size": hidden,
            "num_attention_heads": spec.heads,
            "head_dim": spec.head_dim,
            "max_position_embeddings": MOST_POSITIONS,
            "rope_theta": config.rope_parameters.get("rope_theta", 10000.0),
        }
    )
    size = min(draft_vocab, vocab)
    ffn = min(spec.intermediate_size, 4 * hidden)
    sizes = (hidden, hidden, spec.heads, spec.kv_heads, spec.head_dim, ffn, vocab, size)
    shape = EagleShape(*sizes, spec.norm_eps, taps_for(spec.layers), rope)
    targets = counts.sort(descending=True, stable=True).indices[:size].sort().values
    draw = torch.Generator().manual_seed(seed)
    made = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw) * SMALL / math.sqrt(size[1])
        for name, size in shape.shapes().items()
    }
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if spec.tied else tensors["lm_head.weight"]
    made["lm_head.weight"] = head[targets].float()
    made["norm.weight"] = spec.folded("model.norm.weight", tensors["model.norm.weight"].float())
    made["fc.weight"][:, 2 * hidden :] += torch.eye(hidden)  # the highest of the three states
    at = spec.at(spec.layers - 1)
    for name, source in LIKE_THE_LAST.items():
        theirs = tensors.get(at + source)
        own = made[f"midlayer.{name}"]
        if theirs is not None and theirs.shape[0] == own.shape[0] and own.shape[-1] % theirs.shape[-1] == 0:
            own[..., -theirs.shape[-1] :] = spec.folded(at + source, theirs.float())  # of joined inputs the states
    return EagleLayer(shape, made, embedding, targets)


SMALL = 0.1  # the scale of random weights, by that which keeps a row's size
MOST_POSITIONS = 2048
SAME = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
LIKE_THE_LAST = {  # tensors of a draft, and those of the target's last layer that they begin as
    **{f"{part}_proj.weight": f"{part}_proj.weight" for part in SAME},
    "hidden_norm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
}


def unrolled(layer: EagleLayer, lesson: Lesson, steps: int) -> list[torch.Tensor]:
    """Returns [n - 1 - step, hidden] the states h of each step. Row i of a step guesses token i + 2 + step.

    The rows of the first step attend to those before them. A row of a later step stands `step` positions further on,
    and attends to the target's rows up to its own, and to itself in the steps since.
    """
    count = len(lesson) - 1
    layer.reach(count + steps)
    states = layer.fuse(lesson.taps[:count].to(layer.dtype))
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    found = []
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    for step in range(min(steps, count)):
        rows = count - step
        joined, base = layer.inputs(lesson.tokens[1 + step :], states[:rows])
        own_keys, own_values = layer.keys_values(joined)
        keys.append(layer.rotate(own_keys, step))
        values.append(own_values)
        queries = layer.rotate(layer.queries(joined), step)
        scores = layer.scores(queries, keys[0]).masked_fill(hidden[:rows], -torch.inf)
        grouped = queries.unflatten(1, (layer.shape.kv_heads, -1))
        own = [(grouped * key[:rows, :, None]).sum(-1).permute(1, 2, 0)[..., None] for key in keys[1:]]
        shares = torch.cat([scores, *(score.float() * layer.shape.head_dim**-0.5 for score in own)], -1).softmax(-1)
        mixed = layer.attended(shares[..., :count], values[0])
        for i, value in enumerate(values[1:]):
            share = shares[..., count + i].permute(2, 0, 1)[..., None]  # [rows, kv_heads, group, 1]
            mixed = mixed + (share * value[:rows, :, None]).flatten(1)
        h = layer.finish(base, mixed)
        found.append(h)
        states = layer.handed_on(h)
    return found


def guessed(lesson: Lesson, step: int) -> torch.Tensor:
    """Returns the rows of a step whose guesses are of tokens that the model wrote."""
    first = max(0, lesson.first - 2 - step)
    return torch.arange(first, max(first, len(lesson) - 2 - step))


def losses(layer: EagleLayer, lesson: Lesson, steps: int, place: torch.Tensor) -> list[torch.Tensor]:
    """Returns for each step the cross entropy in nats between the draft's guesses and the model's distribution, summed
    over its `guessed` rows. What the draft cannot guess counts for nothing.

    place: [vocab] the draft's number of each token, -1 where it has none.
    """
    found = []
    for step, h in enumerate(unrolled(layer, lesson, steps)):
        rows = guessed(lesson, step)
        teacher = rows + 1 + step
        places = place[lesson.likeliest[teacher]]
        share = torch.where(places >= 0, lesson.probabilities[teacher], 0.0)
        logits = layer.own_logits(h[rows])
        found.append(-(share * logits.log_softmax(-1).gather(-1, places.clamp_min(0))).sum())
    return found


def batches_of(lessons: Sequence[Lesson], epochs: float, batch: int, generator: torch.Generator) -> list[list[Lesson]]:
    """Returns the texts of each update, in random order. No text is missing or read twice in an epoch, and the last
    epoch is as long as is left of `epochs`."""
    order: list[Lesson] = []
    wanted = epochs * sum(map(len, lessons))
    while wanted > 0:
        for number in torch.randperm(len(lessons), generator=generator).tolist():
            if wanted > 0:
                order.append(lessons[number])
                wanted -= len(lessons[number])
    batches: list[list[Lesson]] = [[]]
    for lesson in order:
        if sum(map(len, batches[-1])) >= batch:
            batches.append([])
        batches[-1].append(lesson)
    return batches


def train(
    layer: EagleLayer,
    lessons: Sequence[Lesson],
    steps: int,
    epochs: float,
    seed: int = 0,
    rate: float = 2e-3,
    batch: int = 512,
    deadline: float = math.inf,
    quiet: bool = False,
) -> tuple[EagleLayer, list[float]]:
    """Trains by AdamW on the losses of `steps` steps, each weighed by DECAY less than the one before.

    The LM head stays as it is, which is the target's. It is half of a small draft's parameters, and where it learnt,
    drafts were worse after the same time.
    batch:    tokens of an update at least, whole texts. Small updates learn more of as many tokens: a draft was right
              0.28 of the time after updates of one text of 500 tokens, 0.15 after updates of 1 024 tokens.
    deadline: time.monotonic() at which to stop early. A run that this ends cannot be repeated bit for bit.
    Returns the draft and the loss of every update, a mean over its rows and steps in nats.
    """
    began = time.monotonic()
    learnt = {name: tensor.float().clone() for name, tensor in layer.tensors.items()}
    parameters = [tensor.requires_grad_() for name, tensor in learnt.items() if name != "lm_head.weight"]
    learner = EagleLayer(layer.shape, learnt, layer.embedding, layer.targets)
    place = torch.full((layer.shape.vocab,), -1).index_copy_(0, layer.targets, torch.arange(len(layer.targets)))
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    weights = DECAY ** torch.arange(steps)
    updates = batches_of(lessons, epochs, batch, torch.Generator().manual_seed(seed))
    fast = fast_bf16(torch.device("cpu"))
    seen: list[float] = []
    bar = tqdm(updates, unit="step", desc="training", disable=quiet)
    for update, chosen in enumerate(bar):
        now = time.monotonic()
        if now > deadline:
            break
        optimiser.param_groups[0]["lr"] = rate * rising_and_falling(update, len(updates), began, now, deadline)
        rows = torch.tensor([sum(len(guessed(lesson, step)) for lesson in chosen) for step in range(steps)])
        shares = weights * (rows > 0) / (weights * (rows > 0)).sum().clamp_min(1e-9) / rows.clamp_min(1)
        total = 0.0
        for lesson in chosen:  # one text at a time, which bounds memory
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                each = losses(learner, lesson, steps, place)
            if each:
                weighed = torch.stack(each) @ shares[: len(each)]
                weighed.backward()
                total += weighed.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seen.append(total)
        bar.set_postfix_str(f"loss {np.mean(seen[-50:]):.3f}", refresh=False)
    made = {name: tensor.detach() for name, tensor in learnt.items()}
    return EagleLayer(layer.shape, made, layer.embedding, layer.targets), seen


DECAY = 0.8  # the weight of a step, by that of the one before, as in the authors' code


@torch.inference_mode()
def accuracy(layer: EagleLayer, lessons: Sequence[Lesson], steps: int) -> dict[str, list[float]]:
    """Returns for each step how often the token that the model wrote was its best (top1), or among its best three,
    where the tokens before are those that were written."""
    hits, tried = np.zeros((2, steps)), np.zeros(steps)
    for lesson in lessons:
        for step, h in enumerate(unrolled(layer, lesson, steps)):
            rows = guessed(lesson, step)
            best = layer.targets[layer.own_logits(h[rows]).topk(min(3, len(layer.targets))).indices]
            right = best == lesson.tokens[rows + 2 + step, None]
            hits[:, step] += [int(right[:, 0].sum()), int(right.any(-1).sum())]
            tried[step] += len(rows)
    top1, top3 = (hits / np.maximum(tried, 1)).round(4).tolist()
    return {"top1": top1, "top3": top3}


def keep(layer: EagleLayer, checkpoint: Checkpoint, provenance: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Writes a draft to a new folder, or where the drafter looks for this model's. The one that is there is renamed."""
    target, about = folder or own_folder(checkpoint), json.loads(json.dumps(dict(provenance)))
    if folder is None:
        write_beside(target, lambda fresh: write_eagle(layer, fresh, checkpoint.spec.layers, about))
    else:
        write_eagle(layer, target, checkpoint.spec.layers, about)
    return target
