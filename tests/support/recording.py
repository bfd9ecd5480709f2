"""Does a CUDA graph's work without a GPU: records launches, with their memory and numbers, and launches them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """A recorded launch.

    numbers: scalars, and the shapes of tensors.
    again:   function that computes the same from the present contents of its memory.
    """

    name: str
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    again: Callable[[], None]


class Tape(TorchDispatchMode):
    """Records Triton's launches and torch's operations while it is on. Views and empty tensors are no launches."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.interpreting = False

    def __enter__(self) -> Tape:
        self.run = run = InterpretedFunction.run
        tape = self

        def noted(kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
            def again() -> None:
                run(kernel, *args, grid=grid, **options)

            tape.interpreting = True
            again()
            tape.interpreting = False
            tape.launches.append(Launch(kernel.__name__, tuple(grid), numbers((args, options)), again))

        InterpretedFunction.run = noted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        InterpretedFunction.run = self.run
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = memory(result)
        if self.interpreting or func._schema.name in ("aten::empty", "aten::empty_like", "aten::new_empty"):
            return result
        if func._schema.is_mutable or not made <= memory((args, kwargs)):

            def again() -> None:
                fresh = func(*args, **kwargs)
                if not func._schema.is_mutable:
                    for kept, value in zip(tree_flatten(result)[0], tree_flatten(fresh)[0], strict=True):
                        kept.copy_(value)

            self.launches.append(Launch(func._schema.name, (), numbers((args, kwargs)), again))
        return result

    def replay(self) -> None:
        for launch in self.launches:
            launch.again()


def memory(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)}


def numbers(values: Any) -> tuple[Any, ...]:
    return tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in tree_flatten(values)[0])


def record(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Records a function like `captured.cuda_graphs` does."""
    tape = Tape()
    with tape:
        result = function()
    return result, tape.replay
