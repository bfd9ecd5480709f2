"""Models for whole runs, servers and commands, loaded once for all tests; `conftest` makes them known as fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenswift_py import TokenSwift
from toys import save_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
LONG_CONTEXT = 16384  # enough that a text is not over before a test has seen it


@pytest.fixture(scope="session")
def tiny_swift(tiny_folder: Path) -> TokenSwift:
    """The model of `tiny_folder`, in fp32 on the default engine."""
    return TokenSwift.from_pretrained(str(tiny_folder), dtype="fp32", threads=1)


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like that of `tiny_folder`, with positions for texts that last."""
    folder = tmp_path_factory.mktemp("long") / "tiny"
    save_tiny(folder, max_position_embeddings=LONG_CONTEXT)
    return folder


@pytest.fixture(scope="session")
def long_swift(long_folder: Path) -> TokenSwift:
    return TokenSwift.from_pretrained(str(long_folder), dtype="fp32", threads=1)


def surroundings() -> dict[str, str]:
    """The environment of a program that imports what the tests import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}


def text_of(answer: dict[str, Any]) -> str:
    """The text in an answer of a batch, from whichever endpoint it is."""
    body = answer["response"]["body"]
    if body["object"] == "response":
        return str(body["output"][0]["content"][0]["text"])
    choice = body["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])
