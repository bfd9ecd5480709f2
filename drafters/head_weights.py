"""The tensors of draft heads, and their arithmetic. There are three forms.

medusa (Cai et al. 2024, arXiv 2401.10774): x = final norm's output; x <- x + SiLU(W x + b), once for each block. Each
head is on its own, with the model's LM head or one of its own.

tokenswift (Wu et al. 2025, arXiv 2502.18890): h_0 = residual stream before the final norm; h_i = h_{i-1} + W_i
norm_in_i(h_{i-1}), and the model's LM head reads norm_out_i(h_i). The norms are RMSNorms.

recurrent: the same chain, which also sees the token before the one it guesses (t_1 is the pending token, known when
           heads are asked, t_2 the first guess): h_i = h_{i-1} + W_i norm_in_i(h_{i-1}) + U_i rms(embedding(t_i)). It
           is the idea of Hydra (Ankner et al. 2024, arXiv 2402.05109) and ReDrafter (Zhang et al. 2024, arXiv
           2403.09919). It costs a product with the LM head for every level of the tree; the other forms pay one for
           all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tokenswift_py.core import Model, Output
from tokenswift_py.errors import check
from tokenswift_py.models.spec import ModelSpec

BF16_HEAD = ("head", torch.bfloat16)  # an LM head that was stored in bf16 keeps its type
Table = npt.NDArray[np.float64]
FORMS = ("medusa", "tokenswift", "recurrent")
RANKS = 8  # candidates of each head
PRIOR = (0.4 * 0.8 ** np.arange(64)[:, None] / (1 + np.arange(RANKS)) ** 1.5).round(4)  # if none is measured


@dataclass(frozen=True)
class HeadWeights:
    """K heads. Their tensors depend on their form.

    medusa:     weight [K, blocks, E, E], bias [K, blocks, E]; head [K, V, E] unless the model's LM head is shared.
    tokenswift: weight [K, E, E], norm_in [K, E], norm_out [K, E].
    recurrent:  those and token [K, E, E].

    eps:         epsilon of the RMSNorms.
    model:       `fingerprint` of the model that they were made for; None is not known.
    acceptance:  [K, ranks] how often each candidate of each head, best first, is the token that the model then writes
                 if the tokens before it are right.
    provenance:  record of how they were made, accuracies included; kept unchanged.
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
        """Returns [E] the state that the heads read from a row of a pass."""
        states = output.hidden if self.form == "medusa" else output.residual
        assert states is not None, "this executor does not report the residual stream"
        return states[row]

    def step(self, head: int, x: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the state that the next head reads, and the one that the LM head reads for this head. All are [R, E].

        x: state of `reads`, or of the head before. token: embedding of the token before the one that is guessed.
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
        """Returns [R, V] fp32 logits of rows [R, E] that these heads gave, by the model's LM head or their own."""
        own = self.tensors.get("head")
        if own is None:
            return model.project(states)
        rows = zip(states.to(own.dtype), heads, strict=True)
        return torch.stack([F.linear(state, own[head]).float() for state, head in rows])

    def to(self, device: torch.device) -> HeadWeights:
        """Moves the heads to a device, in fp32. LM heads in bf16 are large and keep their type."""
        wide = {
            name: tensor.to(device, torch.bfloat16 if (name, tensor.dtype) == BF16_HEAD else torch.float32)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=wide)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


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
