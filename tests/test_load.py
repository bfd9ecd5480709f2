"""A server under load, among clients that hang, leave or send rubbish: texts stay themselves, and nothing leaks."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest

from servers import ask, until
from tokenswift_py import TokenSwift

ROOT = Path(__file__).resolve().parent.parent
SECONDS = float(os.environ.get("TOKENSWIFT_SOAK_SECONDS", "120"))  # of load; 1800 is half an hour
CLIENTS, REQUESTS = 32, 200  # of a round
CONTEXT, RUNNING, WAITING = 512, 8, 8
KIB = 1024
RUBBISH: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("/v1/chat/completions", b"{", (400,)),
    ("/v1/chat/completions", b"\xff\xfe\x00" * 500, (400,)),
    ("/v1/chat/completions", {"messages": []}, (400,)),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, (400,)),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, (400,)),
    ("/v1/completions", {"prompt": "the cat " * 2000}, (400,)),
    ("/v1/completions", {"prompt": "a", "stop": ["x" * 10**6]}, (400,)),
    ("/v1/completions", b"[" * 10**6, (400,)),
    ("/v1/completions", b"a" * (3 * 2**20), (413,)),
    ("/v1/nothing", {"prompt": "a"}, (404,)),
    ("/tokenize", {"prompt": 1}, (400,)),
    ("/detokenize", {"tokens": [10**9]}, (400,)),
)
RAW = (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
       b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", b"\r\n" * 50)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request, and the text that it has alone."""

    body: dict[str, Any]
    text: str
    finish: str


def requests(swift: TokenSwift, count: int, ticks: random.Random) -> list[Asked]:
    """Greedy and sampled ones of several lengths, some with a stop string, some with prompts that begin alike."""
    found = []
    for number in range(count):
        prompt = "the cat and the dog " * ticks.choice((1, 1, 4, 9)) + ticks.choice(("the bird", "the rain", "a"))
        settings: dict[str, Any] = {"temperature": ticks.choice((0.0, 0.8, 1.2)), "seed": number, "ignore_eos": True}
        if number % 4 == 0:
            settings |= {"stop": ["a"], "ignore_eos": False}
        most = ticks.choice((3, 20, 60, 150))
        alone = swift.generate(prompt, max_new_tokens=most, context=CONTEXT, **settings)
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": most, **settings}
        found.append(Asked(body, alone.text, "length" if alone.ending == "length" else "stop"))
    return found


@contextmanager
def served(model: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server in a process of its own, and its address."""
    flags = {"--model": model, "--dtype": "fp32", "--threads": 1, "--context": CONTEXT, "--running": RUNNING,
             "--waiting": WAITING, "--kv-tokens": 16 * CONTEXT, "--port": 0, "--stall": 2, "--max-body": 2,
             "--drain": 0}  # fmt: skip
    command = [sys.executable, str(ROOT / "generate.py"), "serve"]
    command += [str(one) for flag in flags.items() for one in flag]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
        reader.start()
        try:
            yield psutil.Process(process.pid), url
        finally:
            process.terminate()
            assert process.wait(60) == 0
            reader.join(10)
    assert [line for line in log if "Traceback" in line] == []


@dataclass
class Clients:
    """The work of 32 clients at a time. endings: how often each ending was met. wrong: what should not have been."""

    url: str
    asked: list[Asked]
    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def round(self, number: int) -> None:
        left = iter(range(REQUESTS))
        lock = threading.Lock()

        def client(mine: random.Random) -> None:
            api = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
            with api:
                while True:
                    with lock:
                        if next(left, None) is None:
                            return
                    kinds = (self.whole, self.streamed, self.leave, self.hang, self.rubbish)
                    (kind,) = mine.choices(kinds, (8, 6, 3, 1, 3))
                    try:
                        self.endings[kind(api, mine)] += 1
                    except Exception as error:
                        self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=client, args=(random.Random(f"{number}/{n}"),)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def begin(self, api: Any, mine: random.Random, asked: Asked, stream: bool) -> Any:
        """Asks until there is room; what is refused must say when to come again."""
        body = dict(asked.body)
        named = {name: body.pop(name) for name in ("messages", "max_tokens", "temperature", "seed")}
        if "stop" in body:
            named["stop"] = body.pop("stop")
        while True:
            try:
                return api.chat.completions.create(model=None, stream=stream, extra_body=body, **named)
            except openai.RateLimitError as error:
                self.endings[f"429 {error.code}"] += 1
                time.sleep(float(error.response.headers["Retry-After"]) * mine.random())

    def whole(self, api: Any, mine: random.Random) -> str:
        asked = mine.choice(self.asked)
        answer = self.begin(api, mine, asked, stream=False)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (asked.text, asked.finish)
        return "whole"

    def streamed(self, api: Any, mine: random.Random) -> str:
        asked = mine.choice(self.asked)
        with self.begin(api, mine, asked, stream=True) as stream:
            chunks = [choice for chunk in stream for choice in chunk.choices]
        text = "".join(choice.delta.content or "" for choice in chunks)
        assert (text, chunks[-1].finish_reason) == (asked.text, asked.finish)
        return "streamed"

    def leave(self, api: Any, mine: random.Random) -> str:
        """In mid-stream, after so many events."""
        with self.begin(api, mine, mine.choice(self.asked), stream=True) as stream:
            for _ in range(mine.randrange(3)):
                next(iter(stream), None)
        return "left"

    def hang(self, api: Any, mine: random.Random) -> str:
        """Asks for a text and does not read it, or does not even end its request."""
        host, port = self.url.removeprefix("http://").split(":")
        body = json.dumps({**mine.choice(self.asked).body, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection((host, int(port))) as sent:
            sent.sendall(mine.choice((request, request[:-5], request[:30])))
            time.sleep(mine.uniform(0.5, 3.0))
        return "hung"

    def rubbish(self, api: Any, mine: random.Random) -> str:
        if mine.random() < 0.3:
            host, port = self.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as sent, suppress(OSError):
                sent.sendall(mine.choice(RAW))
                sent.settimeout(0.5)
                sent.recv(1000)
            return "raw rubbish"
        path, body, statuses = mine.choice(RUBBISH)
        reply = ask(f"{self.url}{path}", body)
        assert reply.status in statuses and reply.json()["error"]["message"]
        return f"refused with {reply.status}"


def figures(url: str) -> dict[str, float]:
    """The server's own counts of what is in work."""
    lines = [line.rsplit(" ", 1) for line in ask(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in lines}


def idle(url: str) -> bool:
    found = figures(url)
    return all(found[f"vllm:{name}"] == 0 for name in ("num_requests_running", "num_requests_waiting"))


@pytest.mark.soak
def test_texts_are_themselves_and_nothing_leaks_under_load(tiny_folder: Path, record_property: Any) -> None:
    swift = TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)
    asked = requests(swift, 60, random.Random(1))
    samples: list[tuple[float, int, int, int]] = []
    with served(tiny_folder) as (process, url):
        clients = Clients(url, asked)
        began = time.monotonic()
        while time.monotonic() - began < SECONDS or len(samples) < 3:
            clients.round(len(samples))
            assert clients.wrong == []
            until(lambda: idle(url), 60)
            assert figures(url)["vllm:kv_cache_usage_perc"] == 0  # every page is free, or known and nobody's
            until(lambda: process.num_fds() <= (samples[0][3] if samples else 10**6), 60)  # keep-alive has ended
            resident = process.memory_info().rss
            samples.append((time.monotonic() - began, resident, process.num_threads(), process.num_fds()))
    took, sizes, threads, files = np.array(samples, np.float64).T
    middle = len(samples) // 2  # after what is made once: threads and their arenas, pages, known beginnings of prompts
    grown = float(np.polyfit(np.arange(len(samples))[middle:], sizes[middle:], 1)[0])
    told = {
        "requests": REQUESTS * len(samples), "seconds": round(took[-1]), "endings": dict(clients.endings),
        "RSS in MiB (first round, middle, end)": [round(sizes[i] / KIB**2, 1) for i in (0, middle, -1)],
        "KiB a round": round(grown / KIB, 1), "threads": [int(threads[0]), int(threads[-1])],
        "files and sockets": [int(files[0]), int(files[-1])],
    }  # fmt: skip
    curve = [(int(size) // KIB, int(count)) for size, count in zip(sizes, threads, strict=True)]
    print(json.dumps({**told, "RSS in KiB, threads": curve}))
    for name, value in told.items():
        record_property(name, value)
    assert {"whole", "streamed", "left", "hung", "429 queue_full"} <= set(clients.endings)
    # Starlette's pool has up to 40 threads, of which some are left idle for a while after a round.
    assert max(threads) < 64 and np.median(threads[middle:]) <= np.median(threads[:middle]) + 8
    assert grown < 512 * KIB  # a round's 200 texts, if they were kept, take several MiB
