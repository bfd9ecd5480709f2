"""Chooses where Triton's kernels run: on the GPU if there is one, else in Triton's interpreter on the CPU.

Triton reads the setting when it is first imported, and some packages that tests use import it. So conftest.py imports
this file before them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def product(builder: Any, a: Any, b: Any, d: Any, precision: Any, most_imprecise: Any) -> Any:
    """Computes tl.dot so that rows round alike wherever they stand in a tile, like a matrix unit's.

    The interpreter's own is numpy's, whose BLAS on some CPUs rounds the last rows of a product unlike the first.
    """
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.einsum("...mk,...kn->...mn", a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def hasten_types(language: Any) -> None:
    """Every operation makes a tensor, and this its type: what follows from a shape is found once for each shape."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    scalar: dict[str, Any] = {}
    constexpr, make_type, make_tensor = language.constexpr, language.block_type.__init__, language.tensor.__init__

    def typed(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, tuple(size.value if isinstance(size, constexpr) else size for size in shape))
        if key not in known:
            make_type(self, element_ty, shape)
            known[key] = {"shape": self.shape, "numel": self.numel, "name": self.name, "of_tensors": {}}
        vars(self).update(known[key], element_ty=element_ty)

    def made(self: Any, handle: Any, kind: Any) -> None:
        found = kind.of_tensors if kind.is_block() else scalar
        if not found:
            make_tensor(self, handle, kind)
            found.update(numel=self.numel, shape=self.shape)
        vars(self).update(found, handle=handle, type=kind, dtype=kind.scalar)

    language.block_type.__init__, language.tensor.__init__ = typed, made


def hastened(interpreter: Any) -> None:
    """Takes from the interpreter what it spends more than half of its time on. The results stay as they are.

    It maps Triton's language to its own at every launch and call, and back. Nothing else uses the language in a process
    of tests, so here it is mapped once. It makes a table of types whenever it looks one up; here each is found once. It
    takes numbers of bf16 and fp32 apart and puts them together again, where the upper half of the bits is all there is
    to it. It computes whether sums and products overflow, and tells nobody unless Triton debugs.
    """
    mapped: dict[int, Any] = {}
    kinds: dict[str, Any] = {}
    map_language, numpy_kind, convert = interpreter._patch_lang, interpreter._get_np_dtype, interpreter._convert_float

    def mapped_once(function: Any) -> Any:
        if id(function.__globals__) not in mapped:
            map_language(function)
            mapped[id(function.__globals__)] = function.__globals__
        return SimpleNamespace(restore=lambda: None)

    def known_kind(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in kinds:
            kinds[scalar.name] = numpy_kind(scalar)
        return kinds[scalar.name]

    def converted(numbers: Any, kind: Any, wanted: Any, rounding: Any) -> Any:
        if (kind.name, wanted.name) == ("bf16", "fp32"):
            return numbers.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (kind.name, wanted.name) == ("fp32", "bf16") and rounding is None:
            return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return convert(numbers, kind, wanted, rounding)

    interpreter._patch_lang, interpreter._get_np_dtype, interpreter._convert_float = mapped_once, known_kind, converted
    hasten_types(interpreter.tl)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


if INTERPRETED and find_spec("triton") is not None:
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = product
    hastened(interpreter)
