"""What learns of a model: LoRA beside attention, embeddings and norms too (the LoRA+ of LongLoRA), or every weight."""

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
    """Returns a checkpoint's model, with a stretched config and S2-Attn. The parameters that learn are in fp32.

    It is peft's model, or transformers' own where every weight learns.

    dtype: the type of the weights that do not learn. recompute: whether layers compute their activations again in the
    backward pass. Then a long text takes the memory of its residual stream alone, and half as much time again.
    Source: LongLoRA (arXiv 2309.12307), section 3.3. Every projection of attention gets LoRA, and embeddings and norms
    learn too. A tied LM head is the embedding, and learns with it.
    """
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = hugging_face(checkpoint, dtype, config, attn_implementation=attention.NAME)
        learning = model.requires_grad_() if settings.learn == "full" else with_lora(model, settings)
    for name, parameter in learning.named_parameters():
        if settings.learn == "lora+" and learns_whole(name):
            parameter.requires_grad_()
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recompute:
        # The name from before transformers 5.20 still works, with a warning.
        enable = "activation_checkpointing_enable"
        getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")({"use_reentrant": False})
    return learning.train()


def with_lora(model: Any, settings: Settings) -> Any:
    """Returns peft's model with LoRA beside every projection of attention. Only its matrices learn."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=projections(model),
    )  # fmt: skip
    return get_peft_model(model, lora)


def base_model(learning: Any) -> Any:
    """Returns transformers' model inside of what `learner` returned."""
    return learning.get_base_model() if hasattr(learning, "merge_and_unload") else learning


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


def trained_parameters(learning: Any) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that learn, by their names."""
    return {name: parameter for name, parameter in learning.named_parameters() if parameter.requires_grad}


def merged(learning: Any) -> Any:
    """Returns transformers' model, in fp32 on the CPU. What was learned is added to its weights.

    The adapters are removed from it. peft's model is of no use afterwards.
    """
    learning = learning.cpu().float()
    model = (learning.merge_and_unload() if hasattr(learning, "merge_and_unload") else learning).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
