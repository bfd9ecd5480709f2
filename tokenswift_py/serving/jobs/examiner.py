"""The thread that examines the texts of jobs that are over. It proves them, and says how well they read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tokenswift_py.serving.engine import Busy, Engine
from tokenswift_py.serving.jobs.job import Job, told
from tokenswift_py.serving.jobs.proof import audited
from tokenswift_py.serving.jobs.reading import read_windows

logger = logging.getLogger("tokenswift")

# Examines the folder of a job and calls the function with the share that is done. Returns the findings, for JSON.
Examination = Callable[[Job, Callable[[float], None]], dict[str, Any]]


class Examiner:
    """Audits and reads jobs, one at a time, in the order in which they were asked for.

    lock: the lock of the jobs. It is held while findings are put into a job, and into its file.
    """

    def __init__(self, engine: Engine, lock: threading.RLock):
        self._engine, self._lock = engine, lock
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "tokenswift-examiner")

    def audit(self, job: Job, sample: int) -> None:
        """Begins an audit. `Job.auditing` is the share that is done. `Kept.audit` gets the findings."""
        job.auditing = 0.0
        work: Examination = lambda job, progress: audited(self._engine, job.folder, sample, progress)  # noqa: E731
        self._thread.submit(self._examine, job, "auditing", "audit", work)

    def read(self, job: Job) -> None:
        """Begins to read the windows. `Job.reading` is the share that is done. `Kept.quality` gets the figures."""
        job.reading = 0.0
        work: Examination = lambda job, progress: read_windows(self._engine, job.folder, progress)  # noqa: E731
        self._thread.submit(self._examine, job, "reading", "quality", work)

    def close(self) -> None:
        """Stops the work that runs, and waits until it has stopped."""
        self._closing = True
        self._thread.shutdown(cancel_futures=True)

    def _examine(self, job: Job, share: str, kept: str, work: Examination) -> None:
        try:
            found = work(job, partial(self._progress, job, share))
        except Exception as error:
            found = {"passed": None, "conclusion": f"it broke off and says nothing of the text: {told(error)}"}
        with self._lock:
            if not self._closing:
                setattr(job.kept, kept, {**found, "at": round(time.time(), 3)})
                try:
                    job.save()
                except OSError as failure:
                    logger.error("job %s: the findings could not be kept: %s", job.id, failure)
            setattr(job, share, None)
        job.tell()

    def _progress(self, job: Job, share: str, done: float) -> None:
        if self._closing:
            raise Busy("the server is stopping")
        setattr(job, share, min(1.0, done))
        job.tell()
