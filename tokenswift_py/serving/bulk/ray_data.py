"""Answers requests on many machines with Ray Data. Each actor has an engine. The answers are the same as those of
`tokenswift batch`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenswift_py.errors import UserError, check
from tokenswift_py.serving.bulk.batch import AHEAD, Batch
from tokenswift_py.serving.bulk.lines import encoded, read_line
from tokenswift_py.serving.bulk.requests import SHAPES, Requests
from tokenswift_py.serving.engine import Engine
from tokenswift_py.serving.limits import Limits

COLUMN = "request"  # the column with the JSON of a line of a batch
PARTS = ("custom_id", "url", "body")  # the columns of a request that is not one text
# The number of batches that an actor works on at once, so that the last texts of one do not leave its engine empty.
CALLS = 4


def need_ray(package: str) -> None:
    """Raises UserError with the command that installs Ray, unless the package can be imported."""
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(f"ray: it needs {package}: pip install 'tokenswift-py[ray]' ({error})") from error


def requests_in(paths: str | Sequence[str]) -> Any:
    """Returns the Ray dataset of requests in .jsonl or .parquet files. Empty lines are skipped.

    A Parquet file has a column `request` with the JSON of a line of a batch, or the columns custom_id, url and body.
    The body is JSON or a struct. In a struct, null means that the field is not given.
    """
    need_ray("ray.data")
    import ray.data

    all_paths = [paths] if isinstance(paths, str) else list(paths)
    kinds = {Path(path).suffix for path in all_paths}
    check(kinds in ({".jsonl"}, {".parquet"}), "paths", paths, "files that are all .jsonl or all .parquet")
    if kinds == {".parquet"}:
        return ray.data.read_parquet(all_paths)
    return ray.data.read_text(all_paths, drop_empty_lines=True).rename_columns({"text": COLUMN})


class Kept:
    """Takes the answers of one batch of rows."""

    def __init__(self) -> None:
        self.answered: set[bytes] = set()
        self.answers: list[dict[str, Any]] = []

    def write(self, answers: Sequence[dict[str, Any]]) -> None:
        self.answers += answers


class Writer:
    """The work of an actor in `dataset.map_batches(Writer, ...)`. It loads a model once and answers batches of
    requests.

    The rows are those of `requests_in`. The rows that come back have the columns `custom_id`, `status` and `answer`.
    `status` is 0 if there was no request to answer. `answer` is the line that `tokenswift batch` writes. The rows come
    in the order in which the texts end. If an actor dies, Ray begins another one and gives it the same rows. It writes
    the same texts if the requests have a seed.

    model:   the model, as `TokenSwift.from_pretrained` takes it. Arguments that are not named here go there, too.
    name:    the model's name in requests. None takes the name from `model`, without folders.
    running: the number of texts that are written at once.
    seed:    the seed of requests that have none. None draws one for each.
    """

    def __init__(
        self, model: str, *, name: str | None = None, context: int | None = None, drafter: str = "auto",
        running: int = 16, kv_tokens: int | None = None, default_tokens: int = 2048, seed: int | None = None,
        **loading: Any,
    ):  # fmt: skip
        from tokenswift_py.api import TokenSwift

        limits = Limits(default_tokens=default_tokens)
        self.room = running + AHEAD
        engine = Engine(
            TokenSwift.from_pretrained(model, **loading), context, drafter=drafter, most_running=running,
            most_waiting=CALLS * (self.room + limits.choices), kv_tokens=kv_tokens,
        )  # fmt: skip
        self.requests = Requests(engine, name or Path(model).name, limits, seed)
        self._calls = threading.BoundedSemaphore(CALLS)

    async def __call__(self, batch: Any) -> dict[str, list[Any]]:
        """Answers a batch. It is a coroutine, so Ray Data calls it for several batches at once."""
        return await asyncio.to_thread(self.answer, batch)

    def answer(self, batch: Any) -> dict[str, list[Any]]:
        lines = [read_line(number, data, tuple(SHAPES)) for number, data in enumerate(rows_of(batch), 1)]
        kept = Kept()
        with self._calls:
            Batch(self.requests, kept, self.room).run(lines)
        return {
            "custom_id": [answer["custom_id"] for answer in kept.answers],
            "status": [(answer["response"] or {}).get("status_code", 0) for answer in kept.answers],
            "answer": [encoded(answer).decode().rstrip() for answer in kept.answers],
        }


def rows_of(batch: Any) -> Iterator[bytes]:
    """Yields the requests of a batch of rows as JSON. Raises UserError for other columns."""
    columns = batch.to_pydict() if hasattr(batch, "to_pydict") else dict(batch)
    if COLUMN in columns:
        for text in columns[COLUMN]:
            yield str(text).encode(errors="surrogatepass")
        return
    wanted = f"{COLUMN}, or {', '.join(PARTS)}"
    check(set(PARTS) <= columns.keys(), "columns", sorted(columns), wanted)
    for name, url, body in zip(*(columns[part] for part in PARTS), strict=True):
        said = body if isinstance(body, str) else json.dumps(plain(body))
        yield f'{{"custom_id":{json.dumps(plain(name))},"url":{json.dumps(plain(url))},"body":{said}}}'.encode()


def plain(value: Any) -> Any:
    """Returns a value of numpy or Arrow in a form that JSON takes. Leaves out null in structs: Arrow adds it for fields
    that only other rows have."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
