"""A progress bar for passes over a text that exists already.

It counts arithmetic, so that the time it expects is right although later tokens cost more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from tokenswift_py.models.spec import ModelSpec


def work(spec: ModelSpec, rows: int) -> float:
    """Returns the floating-point operations of the first `rows` rows of a text under full attention."""
    attention = 4 * spec.layers * spec.heads * spec.head_dim
    return 2.0 * spec.multiplied * rows + attention * rows * (rows + 1) / 2


@contextmanager
def work_bar(what: str, spec: ModelSpec, rows: int, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of rows of each pass. rows: rows of all passes."""
    layout = "{desc}: {percentage:3.0f} % |{bar}| {elapsed}, {remaining} left"
    done = 0
    with tqdm(total=work(spec, rows), desc=what, bar_format=layout, disable=hidden, delay=1, file=sys.stderr) as bar:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bar.update(work(spec, done) - work(spec, done - count))

        yield progress
