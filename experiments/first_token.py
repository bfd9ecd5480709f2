"""Measures how long a short request waits for its first token while an engine writes long texts."""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from results import Row
from tokenswift_py import TokenSwift
from tokenswift_py.serving.engine import Engine
from workloads import continuation

LONG_TEXTS = 8  # how many long texts are always in work or in line
LONG_PROMPT, LONG_NEW = 512, 256  # the tokens of each of them
PROMPT, NEW = 64, 8  # the tokens of a request
MOST_PAUSE = 0.5  # the most seconds between two requests
CONTEXT = 1024


def first_token(swift: TokenSwift, args: argparse.Namespace, most_running: int, priority: int) -> Row:
    """Returns the milliseconds from a request to its first piece, of an engine that is busy and of one that is idle.

    Every request is written on both, and must get the same answer.
    """
    tokens = continuation("docs", swift.tokenizer, LONG_PROMPT + LONG_TEXTS * PROMPT + args.requests * PROMPT).tokens
    cuts = range(LONG_PROMPT + LONG_TEXTS * PROMPT, len(tokens), PROMPT)
    requests = [tokens[cut : cut + PROMPT] for cut in cuts]
    longs = [tokens[i * PROMPT :][:LONG_PROMPT] for i in range(LONG_TEXTS)]
    common = {
        "raw": True, "ignore_eos": True, "on_loop": "ignore", "temperature": args.temperature, "min_p": args.min_p,
    }  # fmt: skip
    room = 4 * CONTEXT * LONG_TEXTS  # this is enough that nobody waits for memory
    engine = Engine(swift, CONTEXT, most_running=most_running, kv_tokens=room)
    moments = random.Random(0)
    try:
        ask(engine, requests[0], priority, seed=0, **common)  # the first text makes the models
        idle = [ask(engine, prompt, priority, seed=i, **common) for i, prompt in enumerate(requests)]
        with busy(engine, longs, common):
            found = []
            for i, prompt in enumerate(requests):
                time.sleep(moments.uniform(0, MOST_PAUSE))
                found.append(ask(engine, prompt, priority, seed=i, **common))
        preemptions = engine.figures()["preemptions"]
    finally:
        engine.close()
    return {
        **percentiles("first_token", [ms for ms, _ in found]),
        **percentiles("first_token_idle", [ms for ms, _ in idle]),
        "identical": [answer for _, answer in found] == [answer for _, answer in idle],
        "preemptions": preemptions,
    }


def ask(engine: Engine, prompt: Sequence[int], priority: int, **settings: Any) -> tuple[float, list[int]]:
    """Returns the milliseconds until the first piece of a request, and its whole answer."""
    began = time.perf_counter()
    text = engine.submit(prompt, priority=priority, max_new_tokens=NEW, **settings)
    pieces = iter(text)
    next(pieces)
    ms = 1e3 * (time.perf_counter() - began)
    for _ in pieces:
        pass
    return ms, text.result().tokens


@contextmanager
def busy(engine: Engine, longs: Sequence[Sequence[int]], settings: dict[str, Any]) -> Iterator[None]:
    """Keeps long texts in the engine, one for each prompt. The next begins where one ends, and they end in turn."""
    over, begun = threading.Event(), [threading.Event() for _ in longs]

    def keep(i: int) -> None:
        new = LONG_NEW * (i + 1) // len(longs)
        try:
            while not over.is_set():
                text = engine.submit(longs[i], max_new_tokens=new, seed=i, **settings)
                for _ in text:
                    begun[i].set()
                    if over.is_set():
                        text.cancel()
                        break
                new = LONG_NEW
        finally:
            begun[i].set()  # after an error nobody waits for this text

    with ThreadPoolExecutor(len(longs)) as pool:
        kept = [pool.submit(keep, i) for i in range(len(longs))]
        for each in begun:
            each.wait()
        try:
            yield
        finally:
            over.set()
    for one in kept:
        one.result()


def percentiles(name: str, ms: Sequence[float]) -> Row:
    return {f"{name}_p{p}_ms": round(float(np.percentile(ms, p)), 1) for p in (50, 99)}
