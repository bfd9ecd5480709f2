"""Pages of earlier texts: which are given back first, and that neither finding out nor waiting takes long."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenswift_py.kvcache.base import PAGE_SIZE
from tokenswift_py.kvcache.cache import KVCache
from tokenswift_py.kvcache.pages import Holders
from tokenswift_py.serving.prefixes import Prefix, Prefixes


class Text:
    """A text of a few pages, of which only the page table is there."""

    def __init__(self, pool: Holders, words: list[int]):
        self.tokens = np.repeat(np.array([*words, 0], np.int32), PAGE_SIZE)
        self.cache, self.prefix = KVCache(pool, len(self.tokens)), Prefix()  # type: ignore[arg-type]

    def grow(self, pages: int) -> None:
        for _ in range(min(pages, len(self.tokens) // PAGE_SIZE - 1 - self.cache.full_pages)):
            at = np.arange(self.cache.length, self.cache.length + PAGE_SIZE, dtype=np.int32)
            self.cache.append(at, True)
            self.cache.commit(range(PAGE_SIZE))


class Plain:
    """The choice in its simplest form: all idle pages are looked at, and sorted.

    known: of each page that is held for later texts, by the words up to its end: page, when it was last of use.
    """

    def __init__(self, pool: Holders):
        self.pool, self.known, self.time = pool, dict[tuple[int, ...], list[int]](), 0

    def keep(self, text: Text) -> None:
        """Is asked before the real one, and counts no holder."""
        full = text.cache.full_pages
        if full <= text.prefix.told:
            return
        self.time += 1
        for depth in range(full):
            words = tuple(text.tokens[: (depth + 1) * PAGE_SIZE : PAGE_SIZE].tolist())
            if depth >= text.prefix.told:
                self.known.setdefault(words, [int(text.cache.pages[depth]), 0])
            if words in self.known:
                self.known[words][1] = self.time

    def attach(self, text: Text) -> list[int]:
        self.time += 1
        found = []
        for depth in range(len(text.tokens) // PAGE_SIZE - 1):
            words = tuple(text.tokens[: (depth + 1) * PAGE_SIZE : PAGE_SIZE].tolist())
            if words not in self.known:
                break
            self.known[words][1] = self.time
            found.append(self.known[words][0])
        return found

    def make_room(self, pages: int) -> list[int]:
        def key(words: tuple[int, ...]) -> Any:
            tokens = np.repeat(np.array(words, np.int32), PAGE_SIZE)
            digest = b""
            for start in range(0, len(tokens), PAGE_SIZE):
                digest = hashlib.sha256(digest + tokens[start : start + PAGE_SIZE].tobytes()).digest()
            return self.known[words][1], -len(words), digest

        idle = sorted((words for words, (page, _) in self.known.items() if self.pool.holders(page) == 1), key=key)
        return [self.known.pop(words)[0] for words in idle[:pages]]

    @property
    def idle(self) -> int:
        return sum(self.pool.holders(page) == 1 for page, _ in self.known.values())


words = st.lists(st.integers(1, 2), min_size=1, max_size=4)
moves = st.one_of(
    st.tuples(st.just("begin"), words), st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 3)),
    st.tuples(st.just("end"), st.integers(0, 5)), st.tuples(st.just("room"), st.integers(0, 4)),
)  # fmt: skip


@given(st.lists(moves, max_size=40))
def test_the_longest_unused_pages_go_first_of_a_text_the_last(moves: list[Any]) -> None:
    pool = Holders(200)
    prefixes, plain, texts = Prefixes(pool), Plain(pool), list[Text]()  # type: ignore[arg-type]
    for move, *what in moves:
        if move == "begin":
            text = Text(pool, what[0])
            expected = plain.attach(text)
            text.prefix.cover(text.tokens[:-1])
            assert prefixes.find(text.prefix) == expected
            prefixes.attach(text.cache, expected, text.prefix)
            assert text.cache.pages.tolist() == expected
            texts.append(text)
        elif move == "room":
            free, gone = set(pool._free), plain.make_room(what[0])
            prefixes.make_room(what[0])
            assert set(pool._free) - free == set(gone)
        elif texts:
            text = texts[what[0] % len(texts)]
            if move == "grow":
                text.grow(what[1])
                plain.keep(text)
                prefixes.keep(text.cache, text.tokens, text.prefix)
            else:
                text.cache.release()
                texts.remove(text)
        assert prefixes.idle == plain.idle
    for text in texts:
        text.cache.release()
    prefixes.make_room(pool.pages)
    assert pool.free == pool.pages and prefixes.idle == 0


def test_pages_that_others_hold_too_are_not_freed() -> None:
    pool = Holders(40)
    prefixes = Prefixes(pool)  # type: ignore[arg-type]
    first, alike, other = Text(pool, [1, 2, 3, 4]), Text(pool, [1, 2, 5]), Text(pool, [9, 9])
    first.grow(4)
    prefixes.keep(first.cache, first.tokens, first.prefix)
    alike.prefix.cover(alike.tokens)
    prefixes.attach(alike.cache, prefixes.find(alike.prefix), alike.prefix)
    other.grow(1)
    assert prefixes.freed([first.cache]) == 2 and prefixes.freed([alike.cache]) == 0
    assert prefixes.freed([first.cache, alike.cache, other.cache]) == 5
    before = pool.free + prefixes.idle
    first.cache.release()
    assert pool.free + prefixes.idle == before + 2
    assert prefixes.freed([alike.cache]) == 2 and prefixes.freed([]) == 0


def calls(work: Callable[[], object]) -> int:
    """Counts the functions that are called meanwhile, built-in ones included."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("held", [False, True])
def test_a_page_is_given_back_without_a_look_at_all_others(held: bool) -> None:
    def cost(pages: int) -> int:
        pool = Holders(pages + 40)
        prefixes = Prefixes(pool)  # type: ignore[arg-type]
        texts = [Text(pool, [number] * 8) for number in range(pages // 8)]
        for text in texts:
            text.grow(8)
            prefixes.keep(text.cache, text.tokens, text.prefix)
        for text in texts[-2:] if held else texts:
            text.cache.release()
        return calls(lambda: (prefixes.idle, prefixes.make_room(3), prefixes.idle))

    assert cost(8000) <= cost(80) + 20
