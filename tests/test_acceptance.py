"""Acceptance by policy: which guesses count as tested, what policies have seen, what the goals are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import acceptance
from experiment_runs import runner
from tokenswift_py import UserError
from tokenswift_py.decoding.loop import SEEN_ROWS
from tokenswift_py.drafters.partial import Partial
from tokenswift_py.kvcache.base import Committed
from tokenswift_py.kvcache.policies.h2o import H2O


def walked(guesses: int, right: int, age: int | None) -> dict[str, Any]:
    """A record of the trace of a chain."""
    tree = {"tokens": [5] * (guesses + 1), "parents": list(range(-1, guesses))}
    return {"tree": tree, "path": list(range(right + 1)), "drafter": {"view_age": age}}


def test_a_guess_counts_where_all_before_it_were_right() -> None:
    row = acceptance.figures([walked(4, 4, 0), walked(4, 1, 3), walked(2, 2, 0), walked(4, 0, 5), walked(0, 0, 0)])
    assert (row["right"], row["tested"]) == (7, 9)
    assert row["acceptance"] == pytest.approx(7 / 9, abs=1e-4)
    assert [row[f"depth_{d}"] for d in (1, 2, 3, 4)] == [0.75, pytest.approx(2 / 3, abs=1e-4), 1, 1]
    assert (row["fresh"], row["old"]) == (1, pytest.approx(1 / 3, abs=1e-4))
    assert acceptance.figures([])["acceptance"] is None


def test_goals_are_judged_over_all_workloads_of_a_length() -> None:
    def row(policy: str, view: int, right: int, workload: str = "code", text: str = "a") -> dict[str, Any]:
        key = {"workload": workload, "length": 9000, "policy": policy, "view": view, "weights": "int8"}
        return {**key, "right": right, "tested": 100, "text": workload + text}

    rows = [row("recent", 1024, 60), row("recent", 4096, 80), row("mass", 1024, 90), row("mass", 4096, 95)]
    behind = "after 9000 tokens, int8"
    assert acceptance.verdicts(rows) == [
        f"{behind}: mass with 1024 (0.900) beats recent with 4096 (0.800)",
        f"{behind}: mass with 4096 (0.950) reaches 0.92",
    ]
    rows += [row("recent", 4096, 98, "docs"), row("mass", 1024, 80, "docs"), row("mass", 4096, 85, "docs", "b")]
    assert acceptance.verdicts(rows) == [
        f"{behind}: mass with 1024 (0.850) does not beat recent with 4096 (0.890)",
        f"{behind}: mass with 4096 (0.900) does not reach 0.92",
        "docs after 9000 tokens: THE SETTINGS WROTE DIFFERENT TEXTS",
    ]


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    flags = ["--workloads", "docs", "--lengths", "300", "--new", "40", "--weights", "bf16"]
    return runner(acceptance, tiny_folder, tmp_path, monkeypatch, *flags, "--kept", str(tmp_path / "kv"))


def test_every_setting_drafts_the_same_text_by_policies_that_have_seen_its_end(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    observe, propose, views = H2O.observe, Partial.propose, set()

    def watched(self: H2O, rows: Committed) -> None:
        seen.append((rows.start, rows.rows))
        observe(self, rows)

    def proposed(self: Partial, *given: Any) -> Any:
        tree = yield from propose(self, *given)
        views.add(self.explain()["view_pages"])
        assert tree.is_chain
        return tree

    monkeypatch.setattr(H2O, "observe", watched)
    monkeypatch.setattr(Partial, "propose", proposed)
    rows = run("--policies", "recent,h2o", "--views", "64,192", "--seen", "120")
    assert [(row["policy"], row["view"]) for row in rows] == [
        ("recent", 64), ("recent", 192), ("h2o", 64), ("h2o", 192)
    ]  # fmt: skip
    assert len({row["text"] for row in rows}) == 1
    assert all(0 < row["right"] < row["tested"] <= 39 for row in rows)
    assert views == {1, 3}
    taught = [(180, 64), (244, 300 - SEEN_ROWS - 244)]
    starts = [place for place, call in enumerate(seen) if call == (300 - SEEN_ROWS, SEEN_ROWS)]
    assert seen[:2] == taught and len(starts) == 2, "taught once, both settings go on from there"
    for first, stop in zip(starts, [*starts[1:], len(seen)], strict=True):
        position = 300 - SEEN_ROWS
        for start, count in seen[first:stop]:
            assert start == position
            position += count
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    count = len(seen)
    assert run("--policies", "h2o", "--views", "64", "--seen", "120") == rows[2:3], "finished cells are read back"
    assert len(seen) == count


def test_what_cannot_be_measured_is_refused(run: Any) -> None:
    for flags, says in [
        (["--policies", "oldest"], "draft_policy: 'oldest' is not allowed"),
        (["--views", "256"], "views: 256 is not allowed"),
        (["--views", "64", "--seen", "8"], "seen: 8 is not allowed"),
        (["--workloads", "story"], "workloads: 'story' is not allowed"),
    ]:
        with pytest.raises(UserError, match=says):
            run("--views", "64", *flags)
