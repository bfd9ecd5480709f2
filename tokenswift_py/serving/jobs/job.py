"""One long text that outlives the server: its folder, its state, and its text from any place on."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenswift_py.errors import UserError, check, files, one_line
from tokenswift_py.runs import journal
from tokenswift_py.runs.folder import sync_folder
from tokenswift_py.runs.journal import JournalError
from tokenswift_py.runs.result import Piece
from tokenswift_py.serving.engine import Busy
from tokenswift_py.serving.jobs.pace import Pace
from tokenswift_py.serving.texts import Text

logger = logging.getLogger("tokenswift")

NAME = "job.json"
ID = re.compile(r"[0-9a-f]{24}")
GONE = "deleted-"  # the beginning of the name of a folder whose job was deleted
VERSION = 1
OPEN = "open"  # the word in a job's file until the job is finished, cancelled or failed
STATES = ("waiting", "running", "finished", "failed", "cancelled", "interrupted")  # the words of a job's status


@dataclass
class Kept:
    """The contents of a job's file.

    created, ended:   the times, in seconds since 1970.
    prompt, settings: the arguments of `Engine.submit`, with the seed filled in.
    asked:            the request in its own words, to be shown.
    state:            the word open, finished, cancelled or failed. A server that starts goes on with jobs that are
                      open.
    tokens:           the number of tokens that the model chose, at the end.
    characters:       the number of characters of the text.
    curve, figures:   the speed of the text, see `Pace`.
    loops:            the places that repeat, see `report.json`.
    audit:            the findings of the latest audit.
    quality:          the figures of the text's windows, see `reading.read_windows`.
    """

    created: float
    title: str
    priority: float
    prompt: Any
    settings: dict[str, Any]
    asked: Any = None
    state: str = OPEN
    error: str | None = None
    ended: float | None = None
    ending: str | None = None
    tokens: int = 0
    characters: int = 0
    curve: list[list[float]] = field(default_factory=list)
    loops: list[dict[str, int]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    version: int = VERSION


class Job:
    """A text that is kept in a folder. `Jobs` decides what happens to it.

    state:     the job's state, one of STATES.
    wanted:    the number of tokens that the text may have at most.
    text:      the text in the engine, while it is there.
    cancelled: whether the text shall end.
    auditing:  the share of the text that an audit has checked. It is None if no audit runs.
    reading:   the share of the text that was read. It is None if no reading runs.
    """

    def __init__(self, folder: Path, kept: Kept):
        self.id, self.folder, self.kept = folder.name, folder, kept
        self.state = "waiting" if kept.state == OPEN else kept.state
        self.text: Text | None = None
        self.cancelled = False
        self.auditing: float | None = None
        self.reading: float | None = None
        self.pace = Pace(kept.tokens)
        self.pace.curve = list(kept.curve)
        self._written: str | None = None  # the text so far, while it is in the engine
        self._parts: list[str] = []
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Reads a job from its folder. Raises UserError if the file is not the file of a job."""
        path = folder / NAME
        with files("job", path, "a job's folder has one"), one_line(f"job: {path} is not whole"):
            kept = Kept(**json.loads(path.read_text(encoding="utf-8")))
        check(kept.version == VERSION, "job version", kept.version, f"this program reads version {VERSION}")
        job = cls(folder, kept)
        if kept.state == OPEN:
            job.count_recorded()
        return job

    def save(self) -> None:
        """Replaces the job's file as a whole, on the disk. After a kill or a power cut there is never half of a
        file."""
        fresh = self.folder / f"{NAME}.new"
        with fresh.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self.kept), indent=1))  # ASCII: a title may hold half of a surrogate pair
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.folder / NAME)
        sync_folder(self.folder)

    def count_recorded(self) -> None:
        """Counts the tokens of the journal, for a job that is not in the engine."""
        try:
            self.pace.tokens = journal.read(self.folder).chosen
        except UserError:  # there is no journal yet, or it is damaged; then resuming says so
            self.pace.tokens = 0

    @property
    def began(self) -> bool:
        """Returns whether there is a journal to go on with. If a power cut left its header torn, it holds nothing and
        is removed."""
        path = self.folder / journal.NAME
        if not path.exists():
            return False
        data = path.read_bytes()
        torn = journal.whole_frame(data, len(journal.MAGIC), 0) is None
        if torn and data.find(journal.MARKER, len(journal.MAGIC) + 1) < 0:
            path.unlink()
            return False
        return True

    @property
    def wanted(self) -> int:
        return int(self.kept.settings["max_new_tokens"])

    @property
    def over(self) -> bool:
        """Returns whether nothing more comes unless somebody resumes the job."""
        return self.state not in ("waiting", "running")

    @property
    def examined(self) -> bool:
        """Returns whether an audit or a reading runs, or waits for its turn."""
        return self.auditing is not None or self.reading is not None

    # The text

    def follow(self, text: Text) -> None:
        """Notes that the text is in the engine from now on."""
        self.pace = Pace(text.stream.stats.new_tokens)
        self.pace.curve = list(self.kept.curve)
        with self._lock:
            self.text, self._written, self._parts = text, text.before, []

    def hear(self, piece: Piece) -> None:
        """Takes a piece, in the engine's thread."""
        with self._lock:
            self._parts.append(piece.text)
        if piece.tokens and self.text is not None:
            self.pace.hear(len(piece.tokens), self.text.stream)
        self.tell()

    def leave(self, state: str) -> None:
        """Notes that the text is no longer in the engine."""
        with self._lock:
            self.state, self.text, self._written, self._parts, self.cancelled = state, None, None, [], False
        self.tell()

    def written(self) -> str:
        """Returns the text that is certain so far."""
        with self._lock:
            if self._written is not None:
                if self._parts:
                    self._written, self._parts = self._written + "".join(self._parts), []
                return self._written
        try:
            return (self.folder / "text.txt").read_bytes().decode()
        except FileNotFoundError:
            return ""

    @property
    def characters(self) -> int:
        return self.kept.characters if self._written is None else len(self.written())

    # Those who watch

    @contextmanager
    def watching(self, tell: Callable[[], None]) -> Iterator[None]:
        """Calls `tell` at every change, from any thread."""
        self._watchers.append(tell)
        try:
            yield
        finally:
            self._watchers.remove(tell)

    def tell(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def status(self) -> dict[str, Any]:
        """Returns what is told about a job."""
        kept, text = self.kept, self.text
        loops = [asdict(loop) for loop in list(text.stream.loop.stops.loops.loops)] if text else kept.loops
        more = {"loops": loops, "curve": list(self.pace.curve), "audit": kept.audit, "quality": kept.quality}
        return {**self.brief(), **more, "files": self.files()}

    def brief(self) -> dict[str, Any]:
        """Returns what a list of many jobs tells about one."""
        kept, text = self.kept, self.text
        live = text is not None and self.state == "running"
        tokens = self.pace.tokens
        figures = self.pace.figures(self.wanted) if live else {**dict.fromkeys(FIGURES), **kept.figures}
        return {
            "id": self.id, "object": "job", "title": kept.title, "created": kept.created, "ended": kept.ended,
            "priority": kept.priority, "state": self.state, "ending": kept.ending if self.over else None,
            "error": kept.error, "tokens": tokens, "characters": self.characters, "max_tokens": self.wanted,
            "percent": round(100 * tokens / self.wanted, 2), **figures, "auditing": self.auditing,
            "reading": self.reading,
        }  # fmt: skip

    def files(self) -> list[str]:
        return [name for name in FILES if (self.folder / name).is_file()]


FIGURES = ("tokens_per_s", "plain_tokens_per_s", "speedup", "tokens_per_pass", "eta_s")
FILES = ("text.txt", "tokens.npy", "report.json", "journal.bin")


def kept_jobs(folder: Path) -> Iterator[Job]:
    """Yields the jobs of a data folder. Removes what is left of deleted jobs. Everything else is left alone."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(GONE):
            shutil.rmtree(path, ignore_errors=True)
        elif ID.fullmatch(path.name) and path.is_dir():
            try:
                yield Job.read(path)
            except (UserError, OSError) as error:
                logger.warning("a folder is left out: %s", error)


def titled(asked: Any) -> str:
    """Returns the beginning of what is asked for."""
    said = asked.get("messages") or asked.get("prompt") if isinstance(asked, dict) else asked
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content")
    text = " ".join(said.split()) if isinstance(said, str) else ""
    return text if len(text) <= 80 else f"{text[:79]}…"


def told(error: BaseException) -> str:
    """Returns one line about an error. If users can mend it, the line has its words. Otherwise it has the kind of the
    error."""
    known = isinstance(error, (UserError, JournalError, Busy, OSError))
    return " ".join(str(error).split()) if known else f"{type(error).__name__}; the server's log has more"
