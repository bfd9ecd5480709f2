"""The folder of a merged model, which our engines and transformers load: config, safetensors, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tokenswift_py.checkpoints.cache import full_disks
from tokenswift_py.checkpoints.checkpoint import DTYPES, Checkpoint
from tokenswift_py.checkpoints.finding import HUB_FILES
from tokenswift_py.checkpoints.gguf_folder import SUMS
from tokenswift_py.checkpoints.stored_tensors import INDEX

SCRATCH = ".merged-"
OWN = ("config.json", INDEX, SUMS)  # these are written anew, or are about the files that the model was read from


def write_model(model: Any, checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Writes transformers' model with the tokenizer and the generation defaults of the checkpoint that it came from.

    The files of a model that is there already stay until all new ones are written.
    """
    for left in folder.glob(f"{SCRATCH}*"):  # of a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        made = Path(scratch)
        write_files(model, checkpoint, made, dtype)
        for path in sorted(made.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            path.replace(folder / path.name)


def write_files(model: Any, checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # our own bar is enough
    try:
        with torch.no_grad(), full_disks():
            model.to(DTYPES[dtype]).save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    for pattern in (pattern for pattern in HUB_FILES if pattern != "*.safetensors"):
        for path in checkpoint.folder.glob(pattern):
            if path.name not in OWN:
                shutil.copyfile(path, folder / path.name)
    told = folder / "tokenizer_config.json"
    if told.exists():
        config = json.loads(told.read_text(encoding="utf-8"))
        config["model_max_length"] = max(model.config.max_position_embeddings, config.get("model_max_length") or 0)
        told.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
