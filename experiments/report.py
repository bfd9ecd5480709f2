"""Makes one page of everything in results/: tables, pictures, machine, commit, settings, and which figures are bitwise
and which are measured.

    python experiments/report.py            (make report)

`results/report.html` stands alone: pictures are inside, no script runs, nothing is fetched. It begins with the long
runs and one table of speed-ups. Experiments come from `results/*.json` (see results.py), whole runs from
`results/NAME/report.json`, which `generate.py --out` writes, with the pictures, the `sample.txt` and longrun.py's
figures beside it.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from results import ROOT, SCHEMA, Row, host_line, now, numeric, parts, replace, shown, start
from tokenswift_py.errors import check
from tokenswift_py.runs.report import summary

STYLE = """
:root { color-scheme: light dark; --line: #d7dbe0; --soft: #f4f6f8; --text: #1b1f24; --mild: #59636e; --page: #fff;
  --link: #0b63c5; --good: #17713a; --fair: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --line: #39414a; --soft: #1d2329; --text: #e4e8ec; --mild: #9da7b1;
  --page: #12161a; --link: #78b4ff; --good: #62cf8b; --fair: #e6b450; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; } nav li { padding: .15rem 0; }
section { border-top: 1px solid var(--line); padding-top: 1.2rem; margin-top: 1.8rem; }
.mild { color: var(--mild); font-size: .9rem; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--soft); } td.n, th.n { text-align: right; }
td.wide { white-space: normal; min-width: 16rem; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:nth-child(even) { background: var(--soft); }
.scroll:has(img) { max-height: none; } img { display: block; width: 100%; min-width: 40rem; background: #fff; }
pre, code { font: .85rem/1.45 ui-monospace, monospace; } code { background: var(--soft); padding: .1rem .3rem; }
pre { white-space: pre-wrap; background: var(--soft); padding: .7rem; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .9rem; margin: .6rem 0; }
dt { color: var(--mild); } dd { margin: 0; } summary { cursor: pointer; padding: .3rem 0; }
.bitwise { color: var(--good); } .measured { color: var(--fair); } .lossy { color: var(--bad); }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # forbids a browser to fetch anything
LONG = 48  # the most characters of a text in a table that may not break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    args = parser.parse_args()
    replace(args.results / "report.html", build(args.results).encode())
    print(args.results / "report.html")


def build(folder: Path) -> str:
    """Builds the page. Raises UserError for results of another schema, and where there are none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for record in records:
        known = record.get("schema") if isinstance(record, dict) else None
        check(known == SCHEMA, "results: schema", known, f"{SCHEMA} is read; is each .json of results.py's?")
    cards = [record for record in records if "steps" in record]
    records = [record for record in records if "steps" not in record]
    runs = sorted(folder.glob("*/report.json"))
    check(bool(records or cards or runs), "results", folder.name, "there is nothing in it: run an experiment first")
    sections = [headline(records, folder), *(experiment(record, folder) for record in records), *map(card, cards)]
    sections += map(run, runs)
    contents = [(record["name"], record["question"]) for record in [*records, *cards]]
    contents += [(path.parent.name, "A whole run, its report and a sample.") for path in runs]
    links = "".join(f'<li><a href="#{escape(name)}">{escape(name)}</a>: {escape(text)}</li>' for name, text in contents)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>tokenswift-py: results</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>tokenswift-py: results</h1>\n<p class=mild>Built {now()}, a section an experiment.</p>",
            f"<nav><ul>{links}</ul></nav>",
            *filter(None, sections),
            "</body>\n</html>\n",
        ]
    )


def headline(records: Iterable[Mapping[str, Any]], folder: Path) -> str:
    """Builds the section of long runs and of `auto`'s speed-ups by workload and length, with the figures of law 7."""
    paths = sorted(folder.glob("*/longrun.json"))
    runs = [{"run": path.parent.name, **long_run(json.loads(path.read_text(encoding="utf-8")))} for path in paths]
    raced = [
        {"experiment": record["name"], **{name: row[name] for name in RACED}, "as of": record.get("note") and "stale"}
        for record in records
        for row in record["rows"]
        if row.get("drafter") == "auto" and all(name in row for name in RACED)
    ]
    if not (runs or raced):
        return ""
    return section(
        "headline",
        "<h3>Texts written whole</h3>" + table(runs, "long runs") if runs else "",
        "<h3>Drafting over plain decoding, by what stands before</h3>" + table(raced, "speed-ups") if raced else "",
    )


RACED = ("workload", "length", "speedup", "identical", "tokens_a_pass", "distinct_4", "looping")


def long_run(figures: Mapping[str, Any]) -> Row:
    spots = figures["spots"]
    return {
        "new tokens": figures["new_tokens"],
        "minutes": figures["wall_minutes"],
        "plain minutes": figures["plain_minutes"],
        "speed-up": figures["speedup"],
        "plain's share of the memory limit": round(sum(s["share_of_memory_limit"] for s in spots) / len(spots), 2),
        "windows identical": f"{sum(figures['spots_identical'])} of {len(spots)}",
        "distinct-4 median": figures["distinct_4_median"],
        "looping windows": figures["looping_windows"],
        "window perplexity, median": (figures.get("window_perplexity") or {}).get("median"),
        "worst": (figures.get("window_perplexity") or {}).get("worst"),
        "numerics": figures["numerics"],
    }


def experiment(record: Mapping[str, Any], folder: Path) -> str:
    name = record["name"]
    changed = " with uncommitted changes" if record["dirty"] else ""
    facts = {
        "command": f"<code>{escape(record['command'])}</code>",
        "when": escape(record["created"]),
        "commit": f"<code>{escape((record['commit'] or 'unknown')[:12])}</code>{changed}",
        "machine": escape(host_line(record["machine"])),
        "versions": escape(", ".join(f"{package} {version}" for package, version in record["versions"].items())),
    }
    older = sorted({str(cell["commit"])[:12] for cell in record["cells"]} - {str(record["commit"])[:12]})
    if older:  # they ran the same code, which results.py compares
        facts["cells measured at"] = ", ".join(f"<code>{escape(commit)}</code>" for commit in older)
    told = {what: f"<span class={rank(text)}>{escape(text)}</span>" for what, text in record["guarantees"].items()}
    settings = pairs({flag: escape(str(value)) for flag, value in record["settings"].items()})
    return section(
        name,
        f"<p>{escape(record['question'])}</p>",
        f"<p class=measured>{escape(record['note'])}</p>" if record.get("note") else "",
        picture(folder / f"{name}.png"),
        *(table(rows, name) for rows in parts(record["rows"])),
        f"<h3>What the numbers rest on</h3>{pairs(told)}",
        pairs(facts),
        f"<details><summary>Settings</summary>{settings}</details>",
    )


def card(record: Mapping[str, Any]) -> str:
    """Builds the section of a check of a GPU (`gpu_check.py`)."""
    steps = [{name: step[name] for name in ("title", "verdict", "seconds")} for step in record["steps"].values()]
    facts = {"card": record["card"]["name"], "when": record["created"], "commit": str(record["commit"])[:12]}
    return section(
        record["name"],
        f"<p>{escape(record['question'])}</p>",
        table(steps, record["name"]),
        *(
            f"<h3>{escape(step['title'])}</h3>{table(rows, step['title'])}"
            for step in record["steps"].values()
            for rows in parts(step["rows"])
        ),
        pairs({name: escape(str(value)) for name, value in facts.items()}),
    )


def run(path: Path) -> str:
    """Builds the section of a run: its own report, the pictures beside it and a sample of its text."""
    sample = path.parent / "sample.txt"
    text = sample.read_text(encoding="utf-8") if sample.exists() else ""
    return section(
        path.parent.name,
        f"<pre>{escape(summary(json.loads(path.read_text(encoding='utf-8'))))}</pre>",
        *map(picture, sorted(path.parent.glob("*.png"))),
        f"<details><summary>A sample of the text</summary><pre>{escape(text)}</pre></details>" if text else "",
    )


def section(name: str, *inside: str) -> str:
    return "\n".join([f'<section id="{escape(name)}">\n<h2>{escape(name)}</h2>', *filter(None, inside), "</section>"])


def rank(guarantee: str) -> str:
    """Returns the CSS class for the colour of a guarantee."""
    return next((word for word in ("bitwise", "measured", "lossy") if guarantee.startswith(word)), "mild")


def picture(path: Path) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return box(path.stem, f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">')


def pairs(values: Mapping[str, str]) -> str:
    """Builds a list of names and values. Values are HTML."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in values.items()) + "</dl>"


def table(rows: list[Row], label: str) -> str:
    """Builds a table. Numbers are aligned to the right, and long texts may break."""
    right = {name: all(numeric(row[name]) for row in rows) for name in rows[0]}

    def line(tag: str, cells: Iterable[tuple[str, str]]) -> str:
        return "<tr>" + "".join(f"<{tag}{kind(name, text)}>{escape(text)}</{tag}>" for name, text in cells) + "</tr>"

    def kind(name: str, text: str) -> str:
        return " class=n" if right[name] else " class=wide" if len(text) > LONG else ""

    head = line("th", ((name, name.replace("_", " ")) for name in rows[0]))
    body = "\n".join(line("td", ((name, shown(value)) for name, value in row.items())) for row in rows)
    return box(f"{label}, table", f"<table><thead>{head}</thead><tbody>\n{body}</tbody></table>")


def box(label: str, inside: str) -> str:
    """Builds a box that scrolls by touch and by keyboard, so that the page itself never scrolls sideways."""
    return f'<div class=scroll tabindex=0 role=region aria-label="{escape(label)}">{inside}</div>'


if __name__ == "__main__":
    start(main)
