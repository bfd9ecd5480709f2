"""Counts what goes between host and device, where both are one machine too."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "cpu", "nonzero", "unique", "equal", "__bool__", "__int__", "__float__", "__index__"}


class Transfers(TorchFunctionMode):
    """Counts what makes the host wait for the device (numbers taken from tensors, and copies to the host) and the bytes
    of that, and the bytes that are uploaded without a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.read_bytes = self.uploads = self.upload_bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.reads += 1
            self.read_bytes += args[0].nbytes
        if name == "copy_" and (kwargs or {}).get("non_blocking"):
            self.uploads += 1
            self.upload_bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))
