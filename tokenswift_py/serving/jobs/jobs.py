"""Long texts that outlive the server. Each is written into a folder, and a server that starts goes on with them."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tokenswift_py.errors import UserError, check, files
from tokenswift_py.parallel.ranks import RanksError
from tokenswift_py.runs.folder import lock, save_report, save_text, save_tokens, sync_folder
from tokenswift_py.runs.journal import JournalError
from tokenswift_py.serving.engine import Busy, Engine
from tokenswift_py.serving.jobs.examiner import Examiner
from tokenswift_py.serving.jobs.job import GONE, ID, OPEN, Job, Kept, kept_jobs, titled, told
from tokenswift_py.serving.texts import Text
from tokenswift_py.text import Prompt

logger = logging.getLogger("tokenswift")

SEED_BITS = 53  # the size of a seed that is drawn here; JSON numbers of every language hold it
TITLE_LENGTH = 200  # the most characters of a title
REQUEST_BYTES = 4 * 2**20  # the most bytes that a request may have as JSON
PRIORITY = -1.0  # of a job that asks for none: those who wait for an answer come first
RETRY_SECONDS = 1.0  # seconds between two attempts to hand a text to an engine that is full


class NoSuchJob(LookupError):
    """The error of an id that no job has."""


class WrongState(RuntimeError):
    """The error of a job that cannot do this now."""


class Jobs:
    """The jobs of a data folder, which belongs to one process at a time.

    Jobs wait here, so that they never fill the engine's own line. At most `most_running` are in the engine (unless
    given, all of its places but one). One more is there if it is more urgent than all of them. One thread hands them
    over and writes their files when they end.

    folder:    the data folder. It is made if needed, and nobody else may read it.
    most_jobs: the number of jobs that are kept, finished ones included. One more is refused.
    """

    def __init__(self, engine: Engine, folder: str | Path, *, most_running: int | None = None, most_jobs: int = 1000):
        check(most_jobs >= 1, "most_jobs", most_jobs, "at least 1")
        self.engine, self.folder, self.most_jobs = engine, Path(folder), most_jobs
        self.most_running = most_running or max(1, engine.most_running - 1)
        with files("data", folder, "a folder that can be written"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self._lock_file = (self.folder / "lock").open("ab")
        lock(self._lock_file, "data", self.folder, "a folder that no other server has")
        self._lock = threading.RLock()
        self._jobs = {job.id: job for job in kept_jobs(self.folder)}
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closing = False
        self._examiner = Examiner(engine, self._lock)
        self._thread = threading.Thread(target=self._work, name="tokenswift-jobs", daemon=True)
        self._thread.start()

    # Requests of callers

    def create(
        self, prompt: Prompt, *, priority: float = PRIORITY, title: str = "", asked: Any = None, **settings: Any
    ) -> Job:
        """Takes a text. It is on the disk when this returns.

        Raises UserError for a text that cannot be written, Busy if too many jobs are kept, and OSError, leaving
        nothing, where the disk is full.

        asked: the request in its own words, to be shown. None shows the prompt.
        """
        check(len(title) <= TITLE_LENGTH, "title", title, f"at most {TITLE_LENGTH} characters")
        settings = {"seed": secrets.randbits(SEED_BITS), **settings}
        run = self.engine.plan(prompt, **settings)
        settings["max_new_tokens"] = run.options.max_new_tokens
        asked = {"prompt": prompt} if asked is None else asked
        kept = Kept(round(time.time(), 3), title or titled(asked), priority, prompt, settings, asked)
        try:
            size = len(json.dumps(asdict(kept)))
        except (TypeError, ValueError) as error:
            raise UserError(f"settings: they cannot be kept in a file ({error})") from error
        check(size <= REQUEST_BYTES, "request", f"{size} bytes", f"at most {REQUEST_BYTES} bytes")
        with self._lock:
            if self._closing:
                raise Busy("the server is stopping")
            if len(self._jobs) >= self.most_jobs:
                raise Busy(f"{len(self._jobs)} jobs are kept, as many as may be: delete some")
            folder = self.folder / secrets.token_hex(12)
            try:
                folder.mkdir(mode=0o700)
                job = Job(folder, kept)
                job.save()
                sync_folder(self.folder)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._jobs[job.id] = job
        self._todo.put(self._nothing)
        return job

    def list(self) -> list[Job]:
        """Returns all jobs, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (-job.kept.created, job.id))

    def get(self, name: str) -> Job:
        """Returns a job. Raises NoSuchJob. Only an id can ever become a path."""
        job = self._jobs.get(name) if ID.fullmatch(name) else None  # no lock: it is held while files are written
        if job is None:
            raise NoSuchJob(name)
        return job

    def cancel(self, name: str) -> Job:
        """Ends a job's text. What is written stays. A job that is over stays as it is. Raises OSError where the disk is
        full: then a job that waits goes on waiting."""
        job = self.get(name)
        with self._lock:
            if job.state == "waiting":
                self._keep(job, state="cancelled", ended=round(time.time(), 3))
                job.leave("cancelled")
            elif job.state == "running":
                job.cancelled = True
                if job.text is not None:
                    job.text.cancel()
        return job

    def resume(self, name: str) -> Job:
        """Goes on with a job that was cancelled, interrupted or failed. Raises WrongState for others, and OSError where
        the disk is full: then the job stays as it was."""
        job = self.get(name)
        with self._lock:
            if job.state not in ("cancelled", "interrupted", "failed"):
                raise WrongState(f"the job is {job.state}; what is cancelled, interrupted or failed can go on")
            self._check_free(job)
            self._keep(job, state=OPEN, error=None, ended=None)
            job.state = "waiting"
        self._todo.put(self._nothing)
        return job

    def _keep(self, job: Job, **changes: Any) -> None:
        """Changes a job on the disk. If the disk is full, raises OSError and leaves the job as it was."""
        before = job.kept
        job.kept = replace(before, **changes)
        try:
            job.save()
        except OSError:
            job.kept = before
            raise

    def audit(self, name: str, sample: int = 0) -> Job:
        """Begins to prove a job's text. The findings will be in its status. One audit runs at a time.

        Raises WrongState for a job whose text is being written, or that is being audited.

        sample: the number of windows that are also decoded token by token.
        """
        check(0 <= sample <= 1000, "sample", sample, "0 to 1000")
        return self._examine(name, lambda job: self._examiner.audit(job, sample))

    def read(self, name: str) -> Job:
        """Begins to read a job's text, window by window (`tokenswift_py.quality`). The figures will be in its status.
        Raises WrongState as `audit` does."""
        return self._examine(name, self._examiner.read)

    def _examine(self, name: str, begin: Callable[[Job], None]) -> Job:
        job = self.get(name)
        with self._lock:
            if not job.over or not job.began:
                raise WrongState(f"the job is {job.state}; a text that is over, and has begun, can be audited and read")
            self._check_free(job)
            begin(job)
        return job

    def _check_free(self, job: Job) -> None:
        """Raises WrongState for a job that is being examined, and Busy while the server stops."""
        if job.examined:
            raise WrongState(f"the job is being {'audited' if job.reading is None else 'read'}")
        if self._closing:
            raise Busy("the server is stopping")

    def delete(self, name: str) -> None:
        """Removes a job and its files. Raises WrongState for one whose text is being written."""
        job = self.get(name)
        with self._lock:
            if job.state == "running":
                raise WrongState("the job is running: cancel it first")
            if job.examined:
                raise WrongState("the job is being audited or read")
            job.leave("cancelled")
            del self._jobs[job.id]
            gone = job.folder.with_name(f"{GONE}{job.id}")
            job.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def close(self) -> None:
        """Stops all jobs where they are, and waits until their files are written. A server that starts goes on with
        them. Close the engine after this."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for job in self._jobs.values():
                if job.state == "waiting":
                    job.leave("interrupted")
                elif job.text is not None:
                    job.text.cancel()
        self._todo.put(None)
        self._examiner.close()
        self._thread.join()
        self._lock_file.close()

    # These run in the jobs' thread.

    def _work(self) -> None:
        stopping = False
        while not stopping or any(job.state == "running" for job in self._jobs.values()):
            try:
                todo = self._todo.get(timeout=RETRY_SECONDS)
            except Empty:
                todo = self._nothing
            if todo is None:
                stopping = True
                continue
            try:
                todo()
                self._hand_over()
            except Exception:  # whatever the error is, the other jobs go on
                logger.exception("a job failed")

    def _nothing(self) -> None:
        """Does nothing. It is the work when only the line has changed."""

    def _hand_over(self) -> None:
        """Hands the most urgent jobs to the engine, as many as it may have."""
        while True:
            with self._lock:
                waiting = [job for job in self._jobs.values() if job.state == "waiting"]
                inside = [job.kept.priority for job in self._jobs.values() if job.state == "running"]
                if self._closing or not waiting:
                    return
                job = min(waiting, key=lambda job: (-job.kept.priority, job.kept.created, job.id))
                full = len(inside) >= self.most_running
                if full and (len(inside) > self.most_running or job.kept.priority <= max(inside)):
                    return
                job.state = "running"
            try:
                text = self._begin(job)
            except Busy:
                with self._lock:
                    if job.cancelled:
                        self._settle(job, "cancelled")
                    else:
                        job.leave("waiting" if not self._closing else "interrupted")
                return
            except Exception as error:
                logger.warning("job %s: %s", job.id, error)
                known = isinstance(error, (UserError, JournalError, OSError))
                self._settle(job, "interrupted" if known else "failed", told(error))
                continue
            with self._lock:
                job.follow(text)
                # These files are of an earlier session. New ones are written at the end.
                for name in ("text.txt", "tokens.npy", "report.json"):
                    (job.folder / name).unlink(missing_ok=True)
                if job.cancelled or self._closing:
                    text.cancel()
            text.listen(lambda piece, job=job, text=text: self._hear(job, text, piece))  # type: ignore[misc]

    def _begin(self, job: Job) -> Text:
        if job.began:
            text = self.engine.resume(job.folder, priority=job.kept.priority)
        else:
            kept = job.kept
            text = self.engine.submit(kept.prompt, priority=kept.priority, out=job.folder, **kept.settings)
        return text

    def _hear(self, job: Job, text: Text, piece: Any) -> None:
        """Takes a piece, in the engine's thread."""
        if piece is None:
            self._todo.put(lambda: self._ended(job, text))
        else:
            job.hear(piece)

    def _ended(self, job: Job, text: Text) -> None:
        """Writes the same files as the command line, then the job's own."""
        error, kept = text.error, job.kept
        try:
            result = text.stream.result()
        except Exception as failure:
            self._settle(job, "failed", told(error or failure))
            return
        try:
            save_text(job.folder, result.text)
            if not isinstance(error, JournalError):
                save_tokens(job.folder, result.tokens)
                save_report(job.folder, result.report)
        except OSError as failure:
            error = error or failure
        kept.ended, kept.ending = round(time.time(), 3), result.ending
        kept.tokens = job.pace.tokens = len(result.chosen)
        kept.characters = len(result.text)
        kept.curve, kept.loops = list(job.pace.curve), result.report["loops"]
        kept.figures = job.pace.summary(result.stats)
        # A full disk, or a stage of the pipeline that is gone: the job goes on when there is room, or a new server.
        if isinstance(error, (JournalError, OSError, RanksError)):
            self._settle(job, "interrupted", told(error))
        elif error is not None:
            logger.error("job %s failed: %s", job.id, error, exc_info=error)
            self._settle(job, "failed", told(error))
        elif result.ending != "interrupted":
            self._settle(job, "finished")
        elif job.cancelled:
            self._settle(job, "cancelled")
        else:
            self._settle(job, "interrupted")

    def _settle(self, job: Job, state: str, error: str | None = None) -> None:
        """Puts the new state of a job on the disk, then tells it. A job that was interrupted stays open."""
        with self._lock:
            job.kept.state, job.kept.error = OPEN if state == "interrupted" else state, error
            if state != "interrupted":
                job.kept.ended = job.kept.ended or round(time.time(), 3)
            try:
                job.save()
            except OSError as failure:
                logger.error("job %s: its state could not be kept: %s", job.id, failure)
            job.leave(state)
