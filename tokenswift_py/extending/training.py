"""The training steps: the loss over a text, gradients that are summed over the texts of a step, and AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenswift_py.extending.schedule import Sample
from tokenswift_py.extending.settings import Settings
from tokenswift_py.extending.texts import Tokens

ROWS = 512  # the number of rows whose logits are in memory at a time
CLIP = 1.0  # the largest norm of the gradient
LEAST_RATE = 0.1  # the last learning rate, as a part of the peak


def rate_at(settings: Settings, step: int) -> float:
    """Returns the learning rate of a step: a linear rise, for half of the steps at most, then a cosine down to a tenth
    of the peak."""
    warmup = min(settings.warmup, settings.steps // 2)
    if step < warmup:
        return settings.rate * (step + 1) / warmup
    left = max(1, settings.steps - warmup)
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / left))
    return settings.rate * (LEAST_RATE + (1 - LEAST_RATE) * falling)


def optimiser_of(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Returns AdamW with the settings of LongLoRA (arXiv 2309.12307, section 4.1)."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Returns a context in which products are in `dtype`. For other types than fp32 it is torch's autocast."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def losses(model: Any, sample: Sample, device: torch.device, group: int | None) -> torch.Tensor:
    """Returns -ln p of the token after each row, [rows] in nats. model: transformers' model. group: that of S2-Attn."""
    tokens, following, positions = (
        torch.from_numpy(part).to(device) for part in (sample.tokens, sample.following, sample.positions)
    )
    hidden = model.base_model(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, s2_group=group
    ).last_hidden_state[0]
    head = model.get_output_embeddings()

    def of_rows(states: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), after, reduction="none")

    parts = zip(hidden.split(ROWS), following.split(ROWS), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_rows(*part) for part in parts])
    return torch.cat([checkpoint(of_rows, *part, use_reentrant=False) for part in parts])


def take_step(
    model: Any,
    optimiser: torch.optim.Optimizer,
    samples: Sequence[Sample],
    group: int | None,
    rate: float,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Makes one step of the optimiser. Returns the mean loss of the step's tokens before it, in nats.

    Raises RuntimeError for a loss or a gradient that is not finite. The parameters are then as they were.
    """
    total, count = 0.0, sum(len(sample.tokens) for sample in samples)
    for sample in samples:
        with precision(device, dtype):
            loss = losses(model, sample, device, group).sum() / count
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise RuntimeError(f"the loss is {total}: a lower rate is needed")
    learning = [parameter for parts in optimiser.param_groups for parameter in parts["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(learning, CLIP))
    if not math.isfinite(norm):
        raise RuntimeError(f"the gradient's norm is {norm}: a lower rate is needed")
    for parts in optimiser.param_groups:
        parts["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    return total


@torch.no_grad()
def read(model: Any, text: Tokens, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Returns the nats a token in each quarter of a text, with full attention at its true positions."""
    rows = len(text) - 1
    sample = Sample(text[:-1].astype(np.int64), text[1:].astype(np.int64), np.arange(rows))
    model.eval()
    with precision(device, dtype):
        found = losses(model, sample, device, None)
    model.train()
    return [float(part.double().mean()) for part in found.chunk(4)]
