"""Models from a hub: repositories of safetensors and of GGUF files, from a stand-in of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from gguf_writer import gguf_config, write_gguf
from tokenswift_py.checkpoints.finding import HUB_ID, gguf_of, locate
from tokenswift_py.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Publishers name their files so.
FILES = [
    "README.md", "config.json", "imatrix.gguf", "mmproj-model-F16.gguf", "model-Q4_K_M.gguf", "model-Q4_K_S.gguf",
    "model-UD-Q4_K_XL.gguf", "model-IQ4_XS.gguf", "model.q8_0.gguf", "model-F16.gguf",
    "BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf",
]  # fmt: skip


def named(model: str, files: list[str] = FILES) -> list[str]:
    found = HUB_ID.fullmatch(model)
    assert found is not None
    return gguf_of(model, found, files)


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        (":Q4_K_M", ["model-Q4_K_M.gguf"]),
        (":q4_k_s", ["model-Q4_K_S.gguf"]),
        (":Q8_0", ["model.q8_0.gguf"]),
        (":Q4_K_XL", ["model-UD-Q4_K_XL.gguf"]),
        (":F16", ["model-F16.gguf"]),
        (":BF16", ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
        ("/model-IQ4_XS.gguf", ["model-IQ4_XS.gguf"]),
        ("/BF16/model-BF16-00002-of-00002.gguf",
         ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_a_quantisation_or_a_file_is_named(behind: str, wanted: list[str]) -> None:
    assert named(f"org/name{behind}") == wanted


@pytest.mark.parametrize(
    ("model", "files", "told"),
    [
        ("org/name:Q4_K", FILES, "org/name:Q4_K' is not allowed; org/name has BF16/model-BF16-00001-of-00002.gguf, "),
        ("org/name/model-Q5_0.gguf", FILES, "org/name has BF16"),
        ("org/name", FILES, "it stands for several; name one as org/name/FILE: "),
        ("org/name:Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "it stands for several; .*: a-Q8_0.gguf, b-Q8_0.gguf"),
        ("org/name", ["pytorch_model.bin"], r"a repository with \*.safetensors or .gguf files"),
        ("org/name:Q8_0", [f"{n}-Q4_0.gguf" for n in range(30)], "and 18 more"),
    ],
)
def test_what_is_not_found_is_told_in_a_line(model: str, files: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        named(model, files)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model",
    ["mine.gguf", "./here/there/mine.gguf", "/here/there/mine.gguf", "../a/b", "org/name:", "org/name:a/b", "a:b/c"],
)
def test_no_other_name_asks_the_hub(model: str) -> None:
    with pytest.raises(UserError, match="model: "):
        locate(model)


# The hub


class Hub(BaseHTTPRequestHandler):
    """A hub that answers what huggingface_hub asks for: a repository's files, and each of them."""

    repos: dict[str, Path] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_GET

    def answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        folder = self.repos.get(repo)
        if folder is None:
            self.send(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        if rest[:1] == ["resolve"]:
            path = files.get("/".join(rest[2:]))
            data = path.read_bytes() if path else b""
            tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(data, 200, tag) if path else self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        elif rest[:1] == ["tree"]:
            found = [{"type": "file", "path": name, "size": path.stat().st_size,
                      "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for name, path in files.items()]  # fmt: skip
            self.send(json.dumps(found).encode())
        else:
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False}
            self.send(json.dumps(about).encode())

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# Opens each model of a list and writes the weights' names, or the line that is told. Then without a hub once more.
OPEN = """
import json, sys
from tokenswift_py.checkpoints.loading import open_checkpoint
from tokenswift_py.errors import UserError
found = {}
for model in json.loads(sys.argv[1]):
    try:
        found[model] = [path.name for path in open_checkpoint(model).weight_files]
    except UserError as error:
        found[model] = str(error)
print(json.dumps(found))
"""


def opened(models: list[str], **environment: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(models)], env=env, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def test_models_come_from_a_hub(hub: str, tiny_folder: Path, tmp_path: Path) -> None:
    quants = tmp_path / "quants"
    quants.mkdir()
    config = gguf_config("llama")
    for kind in ("F16", "Q8_0"):
        write_gguf(quants / f"tiny-{kind}.gguf", config, {}, kind)
    one = tmp_path / "one"
    one.mkdir()
    write_gguf(one / "tiny-F16.gguf", config, {}, "F16", parts=2)
    Hub.repos = {"org/plain": tiny_folder, "org/quants": quants, "org/one": one}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub}
    models = ["org/plain", "org/quants:Q8_0", "org/quants/tiny-F16.gguf", "org/one", "org/quants", "org/none",
              "org/none:Q8_0", "org/quants:Q2_K"]  # fmt: skip
    found = opened(models, **home)
    assert found["org/plain"] == sorted(path.name for path in tiny_folder.glob("*.safetensors"))
    assert found["org/quants:Q8_0"] == ["tiny-Q8_0.gguf"]
    assert found["org/quants/tiny-F16.gguf"] == ["tiny-F16.gguf"]
    assert found["org/one"] == ["tiny-F16-00001-of-00002.gguf", "tiny-F16-00002-of-00002.gguf"]
    assert found["org/quants"].endswith("name one as org/quants/FILE: tiny-F16.gguf, tiny-Q8_0.gguf")
    assert found["org/quants:Q2_K"].endswith("org/quants has tiny-F16.gguf, tiny-Q8_0.gguf")
    for model in ("org/none", "org/none:Q8_0"):
        assert found[model].startswith(f"model: {model} is neither here nor to be had from the hub (")
    again = opened(models[:4], **home, HF_HUB_OFFLINE="1")
    assert again == {model: found[model] for model in models[:4]}
