"""The files of experiments: rows, table and picture, and cells that need not be measured twice."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import results
from results import Results, add_flags, cpu_name, parts, read_journal, start, table
from tokenswift_py.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "memory_bandwidth", lambda threads: 5e10)


def flags(folder: Path, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="1,2")
    parser.add_argument("--new", type=int, default=8)
    add_flags(parser)
    return parser.parse_args([*given, "--results", str(folder)])


def run(folder: Path, *given: str, measured: list[int] | None = None, fail: int | None = None) -> Results:
    """A cell a length; `measured` gets those that were computed."""
    args = flags(folder, *given)
    found = Results("toy", "How long?", args, guarantees={"tokens": "bitwise"}, axes=("lengths",))
    for length in map(int, args.lengths.split(",")):

        def compute(length: int = length) -> dict[str, Any]:
            if length == fail:
                raise KeyboardInterrupt
            if measured is not None:
                measured.append(length)
            return {"ms": length / 3, "same": True, "peer": None}

        found.cell({"length": length}, compute)
    return found


def test_json_table_and_picture_are_written(tmp_path: Path) -> None:
    def plot(figure: Any, rows: list[dict[str, Any]]) -> None:
        figure.subplots().plot([row["length"] for row in rows], [row["ms"] for row in rows])

    run(tmp_path).save(plot)
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["schema"] == 1 and record["question"] == "How long?" and record["guarantees"] == {"tokens": "bitwise"}
    assert record["rows"] == [
        {"length": 1, "ms": 0.33333, "same": True, "peer": None},
        {"length": 2, "ms": 0.66667, "same": True, "peer": None},
    ]
    assert record["settings"] == {"lengths": "1,2", "new": 8}
    assert record["machine"]["memory_bandwidth_gb_s"] == 50 and record["machine"]["cpu"] == cpu_name()
    assert {"tokenswift_py", "torch", "transformers"} <= set(record["versions"])
    assert len(record["cells"]) == 2 and record["command"].startswith("python experiments/")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "toy.md").read_text()
    assert table(record["rows"]) in page and "![toy](toy.png)" in page and "tokens: bitwise" in page


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    measured: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, measured=measured, fail=2)
    found = run(tmp_path, "--lengths", "1,2,3", measured=measured)  # other lengths, but the first cell is the same
    assert measured == [1, 2, 3] and [row["length"] for row in found.rows] == [1, 2, 3]
    run(tmp_path, "--again", measured=measured)
    assert measured == [1, 2, 3, 1, 2]


def test_other_settings_machine_or_code_measure_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    run(tmp_path, measured=measured)
    run(tmp_path, "--new", "9", measured=measured)
    assert measured == [1, 2, 1, 2]
    monkeypatch.setattr(results, "cpu_name", lambda: "another")
    run(tmp_path, measured=measured)
    assert measured == [1, 2] * 3
    run(tmp_path, measured=measured)
    assert measured == [1, 2] * 3
    monkeypatch.setattr(results, "code_digest", lambda: "changed")
    run(tmp_path, measured=measured)
    assert measured == [1, 2] * 4


def test_the_code_is_the_engine_and_what_the_script_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in results.ENGINE:
        (tmp_path / folder).mkdir()
    (here := tmp_path / "experiments").mkdir()
    (here / "script.py").write_text("1")
    (here / "other.py").write_text("2")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "HERE", here)
    script = argparse.Namespace(__file__=str(here / "script.py"))
    monkeypatch.setitem(sys.modules, "script_under_test", script)  # type: ignore[arg-type]
    seen = [results.code_digest()]
    (here / "other.py").write_text("3")  # not imported
    assert results.code_digest() == seen[0]
    for path in (here / "script.py", tmp_path / "kernels" / "new.cpp", tmp_path / "drafters" / "new.py"):
        path.write_text("changed")
        seen.append(results.code_digest())
    assert len(set(seen)) == 4


def test_a_torn_journal_loses_its_last_cell_only(tmp_path: Path) -> None:
    run(tmp_path)
    journal = tmp_path / "toy.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert len(list(read_journal(journal))) == 1
    measured: list[int] = []
    run(tmp_path, measured=measured)
    assert measured == [2] and len(list(read_journal(journal))) == 2


def test_rows_that_no_table_can_hold_are_refused(tmp_path: Path) -> None:
    found = run(tmp_path)
    with pytest.raises(ValueError, match="each cell needs one of its own"):
        found.cell({"length": 1}, dict)
    with pytest.raises(ValueError, match="list: \\[1\\] is not allowed"):
        found.cell({"length": 3}, lambda: {"list": [1]})
    with pytest.raises(ValueError, match="JSON compliant"):
        found.cell({"length": 4}, lambda: {"ms": float("nan")})
    assert len(found.rows) == 2 and len(list(read_journal(tmp_path / "toy.jsonl"))) == 2


def test_a_table_is_padded_and_has_every_column() -> None:
    rows = [{"name": "a|b", "ms": 10.5}, {"name": "c", "ms": None, "same": False}]
    assert table(rows).splitlines() == [
        "| name |   ms | same |",
        "| ---- | ---: | ---- |",
        "| a\\|b | 10.5 | –    |",
        "| c    |    – | no   |",
    ]


def test_rows_of_other_columns_get_a_table_of_their_own() -> None:
    rows = [{"part": "a", "ms": 1}, {"part": "b", "p": 0.5}, {"part": "a", "ms": 2}]
    assert parts(rows) == [[rows[0], rows[2]], [rows[1]]]


def test_without_matplotlib_the_extra_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'tokenswift-py\[experiments\]'"):
        run(tmp_path)


def test_wrong_input_ends_a_script_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise UserError("lengths: 9 is not allowed; fewer")

    monkeypatch.setattr(sys, "argv", ["experiments/toy.py"])
    with pytest.raises(SystemExit, match=r"^toy\.py: lengths: 9 is not allowed; fewer$"):
        start(main)


def test_the_command_names_no_places() -> None:
    flags = "--new 8 --kept /data/kept --again --results=/data --text"
    argv = ["/home/me/experiments/x.py", *flags.split(), "a b"]
    assert results.command(argv) == "python experiments/x.py --new 8 --text 'a b'"
