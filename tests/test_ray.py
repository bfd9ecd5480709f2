"""Many machines, played by actors of a local Ray: nothing is lost and nothing is there twice when one is killed."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from served import surroundings, text_of
from tokenswift_py import TokenSwift, UserError
from tokenswift_py.serving.bulk import ray_data

CONTEXT = 512
SETTINGS: dict[str, Any] = {"dtype": "fp32", "threads": 1, "context": CONTEXT}
URL = "/v1/completions"


def body(i: int) -> dict[str, Any]:
    tokens = 60 + 11 * (i % 7)
    return {"prompt": "the cat", "seed": i, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}


def alone(tiny_swift: TokenSwift, i: int) -> str:
    said = body(i)
    return tiny_swift.generate(
        said["prompt"], seed=i, max_new_tokens=said["max_tokens"], temperature=1.0, ignore_eos=True, raw=True,
        context=CONTEXT,
    ).text  # fmt: skip


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="pip install 'tokenswift-py[ray]'")
    os.environ |= surroundings()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


def test_requests_are_rows_of_text_or_of_columns() -> None:
    said = {"prompt": "the cat", "stop": None, "messages": np.array([{"role": "user", "content": "\u2028"}], object)}
    columns = {"custom_id": np.array(["a", "b"], object), "url": np.array([URL, URL], object)}
    rows = ray_data.rows_of({**columns, "body": np.array([said, '{"prompt": "x"}'], object)})
    assert [json.loads(row) for row in rows] == [
        {"custom_id": "a", "url": URL,
         "body": {"prompt": "the cat", "messages": [{"role": "user", "content": "\u2028"}]}},
        {"custom_id": "b", "url": URL, "body": {"prompt": "x"}},
    ]  # fmt: skip
    assert list(ray_data.rows_of({"request": np.array(["{torn"], object)})) == [b"{torn"]
    with pytest.raises(UserError, match=r"columns: \['text'\]"):
        list(ray_data.rows_of({"text": ["a"]}))


def test_ray_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"ray: it needs ray.data: pip install 'tokenswift-py\[ray\]'"):
        ray_data.requests_in("in.jsonl")


def test_an_actor_answers_without_ray(tiny_folder: Path, tiny_swift: TokenSwift) -> None:
    writer = ray_data.Writer(str(tiny_folder), running=2, **SETTINGS)
    batch = {"custom_id": ["a", "b"], "url": [URL, "/v1/none"], "body": [body(3), {}]}
    found = writer.answer(batch)
    assert sorted(zip(found["custom_id"], found["status"], strict=True)) == [("a", 200), ("b", 0)]
    assert text_of(json.loads(found["answer"][found["custom_id"].index("a")])) == alone(tiny_swift, 3)
    writer.requests.engine.close()


def workers() -> dict[int, psutil.Process]:
    """The processes of the actors that have engines."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that was killed
            if "MapWorker" in " ".join(child.cmdline()):
                found[child.pid] = child
    return found


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_actor_is_killed(ray: Any, tiny_folder: Path, tiny_swift: TokenSwift, tmp_path: Path, kind: str) -> None:
    count, path = 60, tmp_path / f"in.{kind}"
    said = [{"custom_id": f"{i}", "method": "POST", "url": URL, "body": body(i)} for i in range(count)]
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(one) for one in said) + "\n\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(said), path)
    dataset = ray_data.requests_in(str(path)).repartition(12).map_batches(
        ray_data.Writer, batch_size=5, concurrency=2, num_cpus=1, fn_constructor_args=[str(tiny_folder)],
        fn_constructor_kwargs={**SETTINGS, "running": 2},
    )  # fmt: skip
    rows: list[Any] = []
    first: dict[int, psutil.Process] = {}
    later: set[int] = set()
    for row in dataset.iter_rows():
        rows.append(row)
        if len(first) == 2:
            later |= workers().keys() - first.keys()
        elif len(first := workers()) == 2:
            next(iter(first.values())).kill()
    assert len(first) == 2 and len(later) == 1, "one of two actors was killed in its work, and another took its place"
    assert sorted(int(row["custom_id"]) for row in rows) == list(range(count)), "nothing lost, nothing twice"
    for row in rows:
        assert row["status"] == 200 and text_of(json.loads(row["answer"])) == alone(tiny_swift, int(row["custom_id"]))


@pytest.mark.soak
def test_replicas_follow_the_queue(ray: Any, tiny_folder: Path, tiny_swift: TokenSwift) -> None:
    serve = pytest.importorskip("ray.serve")
    openai = pytest.importorskip("openai")
    from tokenswift_py.serving.bulk.ray_serve import application

    scaling = {"upscale_delay_s": 0.5, "downscale_delay_s": 600, "look_back_period_s": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = application(str(tiny_folder), running=1, replicas=(1, 2), autoscaling=scaling, **SETTINGS)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app, name="tiny")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)

        def running() -> int:
            return sum(serve.status().applications["tiny"].deployments["tokenswift"].replica_states.values())

        def ask(i: int) -> str:
            said = body(i % 10)
            extra = {"ignore_eos": said.pop("ignore_eos")}
            return str(client.completions.create(model="tiny", **said, extra_body=extra).choices[0].text)

        assert running() == 1
        asked, deadline = 0, time.monotonic() + 120
        with ThreadPoolExecutor(8) as threads:
            while running() < 2:
                assert time.monotonic() < deadline
                texts = list(threads.map(ask, range(8)))
                assert texts == [alone(tiny_swift, i) for i in range(8)]
                asked += 8
        chunks = client.completions.create(model="tiny", prompt="the cat", max_tokens=20, seed=1, stream=True)
        wanted = tiny_swift.generate("the cat", raw=True, seed=1, max_new_tokens=20, context=CONTEXT).text
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="tiny", prompt="the cat", temperature=-1)
    finally:
        serve.shutdown()
