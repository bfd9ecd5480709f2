"""The page of all results: everything is in it, and nothing else is needed to read it."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from report import build
from tokenswift_py.errors import UserError

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ROWS = [
    {"part": "a", "engine": "<native> & co", "ms": 1.25, "same": True},
    {"part": "a", "engine": "torch", "ms": None, "same": False},
    {"part": "b", "p": 0.5},
]


class Page(HTMLParser):
    """Tags with their attributes, and the text of every table cell."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lasttag in ("td", "th") and self.cells:
            self.cells[-1] += data.rstrip("\n")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def record(name: str, **changes: Any) -> dict[str, Any]:
    machine = {"cpu": "Zen", "cores": 2, "threads": 2, "memory_bandwidth_gb_s": 50.0, "isa": "avx512"}
    return {
        "schema": 1, "name": name, "question": f"What of {name}?", "command": f"python experiments/{name}.py --new 8",
        "created": "2026-01-01T00:00:00+00:00", "commit": "c" * 40, "dirty": False, "machine": machine,
        "versions": {"torch": "2.13"}, "settings": {"new": 8, "drafters": "auto"},
        "guarantees": {"tokens": "bitwise", "times": "measured"}, "cells": [{"commit": "d" * 40}], "rows": ROWS,
        **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("speedup", "peers"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(name)))
    (tmp_path / "speedup.png").write_bytes(PNG)
    return tmp_path


def test_every_table_picture_and_fact_is_in_the_page(folder: Path) -> None:
    page = Page(build(folder))
    assert [tag["id"] for tag in page.all("section")] == ["peers", "speedup"]
    assert len(page.all("table")) == 4  # rows of other columns have a table of their own
    for told in ("<native> & co", "1.25", "–", "yes", "no", "0.5", "part", "engine"):
        assert page.cells.count(told) >= 2, told
    (picture,) = page.all("img")
    assert picture["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode() and picture["alt"]
    facts = "What of peers?", "experiments/speedup.py --new 8", "c" * 12, "d" * 12, "Zen", "50 GB/s", "torch 2.13"
    for told in facts:
        assert told in page.text, told
    assert {tag.get("class") for tag in page.all("span")} == {"bitwise", "measured"}
    assert "uncommitted" not in page.text


def test_nothing_is_fetched_and_nothing_runs(folder: Path) -> None:
    html = build(folder)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "background"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    policies = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies and policies[0] and policies[0].startswith("default-src 'none'")


def test_it_is_readable_on_a_phone(folder: Path) -> None:
    html = build(folder)
    page = Page(html)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    order = [tag for tag, attributes in page.tags if tag in ("table", "img") or attributes.get("class") == "scroll"]
    assert order == ["div", "table"] * 2 + ["div", "img"] + ["div", "table"] * 2  # each scrolls in a box of its own
    assert "prefers-color-scheme: dark" in html


def test_whole_runs_have_a_section_with_summary_pictures_and_sample(folder: Path) -> None:
    from tokenswift_py.runs.report import NO_BASELINE, text_figures

    run = {
        "new_tokens": 5, "prompt_tokens": 3, "ending": "length", "model": "m", "drafter": "auto", "numerics": "n",
        "parameters": {"seed": 4}, "guarantee": "bitwise", "resumed_behind": None, "lossy": False, "ms_per_token": 2.0,
        "mean_acceptance_length": 2.5, **NO_BASELINE, **text_figures([1, 2, 3, 4, 5]),
    }  # fmt: skip
    (there := folder / "100k").mkdir()
    (there / "report.json").write_text(json.dumps(run))
    (there / "speed.png").write_bytes(PNG)
    (there / "sample.txt").write_text("Once upon a <time>.")
    page = Page(build(folder))
    assert [tag["id"] for tag in page.all("section")][-1] == "100k" and len(page.all("img")) == 2
    assert "2.00 ms a token" in page.text and "Once upon a <time>." in page.text


def test_other_files_and_empty_folders_are_told(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="there is nothing in it"):
        build(tmp_path_factory.mktemp("empty"))
    (folder / "old.json").write_text(json.dumps([1, 2]))
    with pytest.raises(UserError, match="results: schema: None is not allowed; 1 is read"):
        build(folder)


def test_the_page_begins_with_the_long_runs_and_the_speed_ups(tmp_path: Path) -> None:
    raced = {"workload": "docs", "length": 2048, "drafter": "auto", "speedup": 2.25, "identical": True,
             "tokens_a_pass": 3.5, "distinct_4": 0.91, "looping": False}  # fmt: skip
    rows = [raced, {**raced, "drafter": "ngram", "speedup": 7.75}]
    (tmp_path / "speedup.json").write_text(json.dumps(record("speedup", rows=rows, note="Stale: older texts.")))
    figures = {
        "new_tokens": 100_000, "wall_minutes": 31.5, "plain_minutes": 61.5, "speedup": 1.952, "distinct_4_median": 0.9,
        "spots_identical": [True, False], "spots": [{"share_of_memory_limit": 0.5}, {"share_of_memory_limit": 0.7}],
        "looping_windows": 3, "numerics": "native/rope", "window_perplexity": {"median": 17.5, "worst": 44.5},
    }  # fmt: skip
    (tmp_path / "story").mkdir()
    (tmp_path / "story" / "longrun.json").write_text(json.dumps(figures))
    page = Page(build(tmp_path))
    assert [section["id"] for section in page.all("section")] == ["headline", "speedup"]
    first = page.cells[: page.cells.index("stale") + 1]
    for shown in ("story", "100000", "31.5", "61.5", "1.952", "0.6", "1 of 2", "17.5", "44.5", "docs", "2.25"):
        assert shown in first
    assert "7.75" not in first and "Stale: older texts." in page.text


def test_a_check_of_a_card_has_a_section_of_its_own(tmp_path: Path) -> None:
    steps = {"3": {"title": "row law", "verdict": "ok", "seconds": 1.5, "rows": [{"keys": "int8", "ok": True}]},
             "5": {"title": "variants", "verdict": "skipped", "seconds": 0.0, "rows": []}}  # fmt: skip
    gpu = {"schema": 1, "name": "gpu", "question": "Is it right?", "created": "2026-01-01", "commit": "c" * 40,
           "dirty": False, "card": {"name": "H100"}, "versions": {}, "tiny": False, "steps": steps}  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    (tmp_path / "other.json").write_text(json.dumps(record("other")))
    page = Page(build(tmp_path))
    assert {"row law", "skipped", "int8"} <= set(page.cells) and "H100" in page.text
