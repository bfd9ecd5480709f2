"""The ways to have the package: a wheel, an editable install, a plain checkout; with the C++ engine and without.

Each is tried in an environment of its own, which sees this one's dependencies after its own site-packages but runs
none of its .pth files, so that an editable install here cannot be what makes a test pass.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import nanobind
import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from tokenswift_py.registry import SHARED

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokenswift_py", "drafters", "kvcache", "kernels")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
HAVE_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None

ENGINE_CMAKE = """
Python_add_library(_native MODULE WITH_SOABI _native.cpp)
install(TARGETS _native LIBRARY DESTINATION tokenswift_py/kernels/cpu)
"""
ENGINE_CPP = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "scratch engine", -1, nullptr};
PyMODINIT_FUNC PyInit__native(void) {
    PyObject* m = PyModule_Create(&module);
    PyModule_AddIntConstant(m, "answer", 42);
    return m;
}
"""

IMPORT_ALL = """
import importlib, importlib.util, sys
optional = {"triton", "flash_attn", "xformers", "matplotlib", "llama_cpp"} | {
    "fastapi", "prometheus_client", "pydantic", "sse_starlette", "starlette", "uvicorn"
}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            raise
ours = {n: m.__file__ for n, m in sys.modules.items() if n.startswith("tokenswift_py") and getattr(m, "__file__", None)}
assert len(set(ours.values())) == len(ours), "a file was imported twice"
for name, file in ours.items():
    print("module", name, file)
for name in ("drafters", "kernels", "kvcache"):
    # transformers looks for a package "kernels", and may meet the folder, out of which it takes nothing
    below = [n for n in sys.modules if n.startswith(f"{name}.")]
    assert not below, f"{below} were imported by their root name"
for finder in sys.meta_path:
    print("finder", type(finder).__name__)
"""


PAGE = "tokenswift_py/serving/jobs/page.html"


def run(command, cwd, **variables):
    """stdout and stderr of a command that must succeed."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "TOKENSWIFT_STRICT_BUILD")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    env = {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout[-6000:]}")
    return done.stdout


def build_wheel(tree, out, *options, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, *options]
    said = run([*command, tree], out.parent, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel, said


def modules(tree):
    """{module: file} for what lies in the package's folders."""
    found = {}
    for path in (p for folder in FOLDERS for p in (tree / folder).rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        parts = parts if parts[0] == "tokenswift_py" else ("tokenswift_py", *parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(python, names, cwd):
    """({module: file}, finders) after importing what is named."""
    lines = run([python, "-c", IMPORT_ALL, *names], cwd).splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return {r[1]: Path(r[2]) for r in rows if r[0] == "module"}, {r[1] for r in rows if r[0] == "finder"}


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new, empty environment, dependencies appended."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    lines = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site_packages(python) / "dependencies.pth").write_text("\n".join(lines))
    return python


def site_packages(python):
    (found,) = python.parent.parent.glob("lib/python*/site-packages")
    return found


def pip_install(python, *what):
    # --ignore-installed: the package may be installed in the environment behind this one, which stays as it is
    options = ["--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    return run([python, "-m", "pip", "install", *options, *what], python.parent)


@pytest.fixture
def checkout(tmp_path):
    """A copy of this checkout, with a scratch engine in the place of the C++ one."""
    tree = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "cpu")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    shutil.copytree(ROOT / "licenses", tree / "licenses")
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "generate.py", ".gitignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    cpu = tree / "kernels" / "cpu"
    cpu.mkdir()
    (cpu / "CMakeLists.txt").write_text(ENGINE_CMAKE)
    (cpu / "_native.cpp").write_text(ENGINE_CPP)
    return tree


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout; what `make` compiled is not compiled again."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel") / "out", TOKENSWIFT_STRICT_BUILD="1")[0]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = "tokenswift_py-0.1.0.dist-info"
    stub = "tokenswift_py/kernels/cpu/_native.pyi"
    engine = {n for n in names if n.startswith("tokenswift_py/kernels/cpu/_native.")} - {stub}
    sources = {p.relative_to(ROOT).as_posix() for p in modules(ROOT).values()}
    expected = {n if n.startswith("tokenswift_py/") else f"tokenswift_py/{n}" for n in sources}
    data = {f"tokenswift_py/drafters/data/{p.name}" for p in (ROOT / "drafters" / "data").iterdir()}
    assert "tokenswift_py/drafters/data/prompts.json" in data
    assert {n for n in names if not n.startswith(info)} - engine == expected | data | {
        "tokenswift_py/py.typed",
        stub,
        PAGE,
    }
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/licenses/nanobind.txt"} <= names
    assert len(engine) == (HAVE_COMPILER and (ROOT / "kernels/cpu/CMakeLists.txt").exists())


def test_wheel_in_an_empty_environment(wheel, python, tmp_path):
    pip_install(python, wheel)
    has_engine = any("_native" in name for name in zipfile.ZipFile(wheel).namelist())
    engine = ["tokenswift_py.kernels.cpu._native"] if has_engine else []
    files, finders = imported(python, [*modules(ROOT), *engine], tmp_path)
    site = site_packages(python)
    assert {*engine, "tokenswift_py", "tokenswift_py.kernels.base"} <= set(files)
    assert {name for name, file in files.items() if site not in file.parents} == set()
    assert not {name for name in finders if "Redirecting" in name}
    names = "from tokenswift_py import registry; print(*registry.names('tokenswift_py.drafters'))"
    here = {p.stem for p in (ROOT / "drafters").glob("[!_]*.py")} - set(SHARED)
    assert here
    assert set(run([python, "-c", names], tmp_path).split()) == here
    for command in ([python.parent / "tokenswift"], [python, "-m", "tokenswift_py"]):
        assert "usage: tokenswift audit " in run([*command, "audit", "--help"], tmp_path)


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler")
def test_editable_install(python, checkout, tmp_path):
    nanobind_dir = f"cmake.define.nanobind_DIR={nanobind.cmake_dir()}"  # pip has -C since 23.1 only
    said = pip_install(python, "-v", f"--config-settings={nanobind_dir}", "-e", checkout)
    cpu = checkout / "kernels" / "cpu"
    assert (cpu / f"_native{SUFFIX}").is_file(), said[-4000:]
    assert list(site_packages(python).rglob("_native*")) == []
    (checkout / "drafters" / "added_later.py").write_text("")
    engine = "import tokenswift_py.kernels.cpu._native as n; print(n.answer, n.__file__)"
    for cwd in (tmp_path, checkout):
        files, finders = imported(python, modules(checkout), cwd)
        assert "ScikitBuildRedirectingFinder" in finders
        assert files == {name: file for name, file in modules(checkout).items() if name in files}
        assert {"tokenswift_py", "tokenswift_py.kernels.base", "tokenswift_py.drafters.added_later"} <= set(files)
        assert run([python, "-c", engine], cwd).split() == ["42", str(cpu / f"_native{SUFFIX}")]


def test_plain_checkout(python, checkout):
    files, finders = imported(python, modules(checkout), checkout)
    assert not {name for name in finders if "Redirecting" in name}
    assert files == {name: file for name, file in modules(checkout).items() if name in files}
    assert {"tokenswift_py", "tokenswift_py.kernels.base", "tokenswift_py.kvcache.cache"} <= set(files)
    assert "--max-new-tokens" in run([python, "generate.py", "--help"], checkout)


def test_beside_a_package_named_kernels(python, checkout):
    """Hugging Face has one, and transformers imports it; the folder kernels/ of a checkout must not be taken for it."""
    site = site_packages(python)
    (site / "kernels").mkdir()
    # a class for whatever transformers wants from it
    (site / "kernels" / "__init__.py").write_text("def __getattr__(name):\n    return type(name, (), {})\n")
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = """
import transformers, transformers.integrations.hub_kernels, kernels, tokenswift_py.kernels.base as ours
print(transformers.utils.import_utils.is_kernels_available(), kernels.__file__, ours.__file__)
"""
    there = [str(site / "kernels" / "__init__.py"), str(checkout / "kernels" / "base.py")]
    assert run([python, "-c", code], checkout).split() == ["True", *there]


def without_sources(tree):
    shutil.rmtree(tree / "kernels" / "cpu")
    return {"TOKENSWIFT_STRICT_BUILD": "1"}  # what is missing is no error, not even for `make`


def without_compiler(tree):
    return {"TOKENSWIFT_STRICT_BUILD": "1", "CXX": str(tree / "no-such-compiler")}


def with_an_error(tree):
    (tree / "kernels" / "cpu" / "_native.cpp").write_text("#error does not compile\n")
    return {}


@pytest.mark.parametrize("spoil", [without_sources, without_compiler, with_an_error])
def test_the_engine_is_optional(spoil, checkout, tmp_path):
    wheel, said = build_wheel(checkout, tmp_path / "out", **spoil(checkout))
    names = zipfile.ZipFile(wheel).namelist()
    assert "tokenswift_py/kernels/base.py" in names
    assert not [n for n in names if "_native" in n]
    assert "the C++ engine" in said
    assert "left out" in said


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler")
def test_a_strict_build_stops_at_an_error(checkout, tmp_path):
    """`make` builds so: an engine that stopped compiling is not silently left out."""
    with_an_error(checkout)
    with pytest.raises(AssertionError, match="does not compile"):
        build_wheel(checkout, tmp_path / "out", TOKENSWIFT_STRICT_BUILD="1")
