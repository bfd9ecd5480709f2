"""The pages of docs/ can be relied on: links lead somewhere, fields are documented, recipes run."""

import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenswift_py import TokenSwift
from tokenswift_py.cli import extend_context
from tokenswift_py.cli.flags import reference
from toys import save_tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists() and there.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(there), link


def test_every_page_is_reached_from_the_readme() -> None:
    found, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page not in found and page.suffix == ".md":
            found.add(page)
            links = (link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")))
            left += [(page.parent / link).resolve() for link in links if link and not link.startswith("http")]
    assert set((ROOT / "docs").glob("*.md")) <= found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TokenSwift:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return TokenSwift.from_pretrained(str(folder), dtype="fp32", engine="torch")


def test_every_field_of_the_report_is_documented(tiny: TokenSwift) -> None:
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "report.md").read_text(encoding="utf-8")))
    documented |= {f"distinct_{n}" for n in (2, 3)}  # "`distinct_1` ... `distinct_4`"
    assert set(tiny.generate("the cat", max_new_tokens=4).report) <= documented


def test_the_page_of_options_is_that_of_the_options() -> None:
    """python -m tokenswift_py.cli.flags > docs/options.md"""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == reference()


def test_the_flags_of_extend_context_are_on_its_page() -> None:
    """python -m tokenswift_py.cli.extend_context"""
    assert extend_context.reference() in (ROOT / "docs" / "extend-context.md").read_text(encoding="utf-8")


def code_under(page: str, heading: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.+?)```", text, flags=re.DOTALL)
    return str(code)


@pytest.mark.parametrize(
    ("heading", "package", "settings"),
    [
        ("A drafter", "tokenswift_py.drafters", {"drafter": "recipe", "draft_tokens": 3}),
        ("A page policy", "tokenswift_py.kvcache.policies", {"drafter": "partial", "draft_policy": "recipe"}),
    ],
)
def test_the_recipes_run(
    tiny: TokenSwift, heading: str, package: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """A new file in the folder is all it takes, and it changes no token."""
    (tmp_path / "recipe.py").write_text(code_under("adding.md", heading), encoding="utf-8")
    module = importlib.import_module(package)
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
    sampling: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.8, "seed": 3}
    drafted = tiny.generate("the cat sat on the", **settings, **sampling)
    assert drafted.tokens == tiny.generate("the cat sat on the", drafter="none", **sampling).tokens
    assert drafted.stats.num_draft_tokens > 0


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.name)
def test_the_examples_run(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    folder = [str(tmp_path / "run")] if script.name in ("batch.py", "resume.py") else []
    monkeypatch.setattr(sys, "argv", [str(script), *folder, str(tmp_path / "model")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes that they start
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(script), run_name="__main__")
    said = capfd.readouterr().out
    assert len(said) > 20 and "identical: False" not in said and "proven: False" not in said
    assert len(script.read_text(encoding="utf-8").splitlines()) < 35
