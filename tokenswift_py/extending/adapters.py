"""A model whose attention learns by LoRA, and whose embeddings and norms learn as they are (the LoRA+ of LongLoRA)."""

from __future__ import annotations

from typing import Any

import torch

from tokenswift_py.checkpoints.checkpoint import Checkpoint
from tokenswift_py.errors import UserError
from tokenswift_py.extending import attention
from tokenswift_py.extending.settings import Settings
from tokenswift_py.extending.transformers_model import hugging_face


def check_peft() -> None:
    """Raises UserError with the line that installs peft, where it is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"extend-context: it needs peft: pip install 'tokenswift-py[train]' ({error})") from error


def learner(
    checkpoint: Checkpoint, config: Any, settings: Settings, dtype: torch.dtype, recompute: bool = False
) -> Any:
    """Returns peft's model of a checkpoint, with a stretched config and S2-Attn. The parameters that learn are in fp32.

    dtype: the type of the weights that do not learn. recompute: whether layers compute their activations again in the
    backward pass. Then a long text takes the memory of its residual stream alone, and half as much time again.
    Source: LongLoRA (arXiv 2309.12307), section 3.3. Every projection of attention gets LoRA, and embeddings and norms
    learn too. A tied LM head is the embedding, and learns with it.
    """
    from peft import LoraConfig, get_peft_model

    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = hugging_face(checkpoint, dtype, config, attn_implementation=attention.NAME)
        lora = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=projections(model),
        )  # fmt: skip
        adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if not settings.only_lora and learns_whole(name):
            parameter.requires_grad_()
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recompute:
        # The name from before transformers 5.20 still works, with a warning.
        enable = "activation_checkpointing_enable"
        getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")({"use_reentrant": False})
    return adapted.train()


def projections(model: Any) -> list[str]:
    """Returns the names of the linear layers inside of attention."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".self_attn." in name
    }
    return sorted(found)


def learns_whole(name: str) -> bool:
    """Returns whether a parameter is of an embedding or a norm."""
    owner = name.rsplit(".", 2)[-2]
    return owner == "embed_tokens" or owner.endswith("norm")


def trained_parameters(adapted: Any) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that learn, by their names."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def merged(adapted: Any) -> Any:
    """Returns transformers' model, in fp32 on the CPU. What was learned is added to its weights.

    The adapters are removed from it. peft's model is of no use afterwards.
    """
    model = adapted.cpu().float().merge_and_unload().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
