"""Jobs in a process that can be killed at any moment. `Nursery` starts such processes without importing anything again.

Run as a program: reads lines `MODEL DATA CONTEXT RUNNING`, forks a child that loads the model and goes on with the jobs
of DATA until all are over, writes the child's id, and at its end its exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Nursery:
    """A process without threads, which forks children."""

    def __init__(self, model: Path, context: int, running: int):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
        self._settings = f"{context} {running}"
        self._model = model
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, data: Path) -> int:
        """Starts a child and returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._model} {data} {self._settings}\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Waits for the end of the child. Returns its exit code, negative for a signal."""
        return int(self._line())

    def kill_at(self, data: Path, child: int, size: int) -> int:
        """Kills the child when the journals of all jobs have so many bytes more. Returns the exit code."""
        began = total(data)
        deadline = time.monotonic() + 60
        while total(data) < began + size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def total(data: Path) -> int:
    return sum(path.stat().st_size for path in data.glob("*/journal.bin"))


def write_all(model: str, data: str, context: int, running: int) -> None:
    import torch

    from tokenswift_py import TokenSwift
    from tokenswift_py.serving.engine import Engine
    from tokenswift_py.serving.jobs.jobs import Jobs

    torch.set_num_threads(1)
    swift = TokenSwift.from_pretrained(model, dtype="fp32", threads=1)
    engine = Engine(swift, context, most_running=running)
    jobs = Jobs(engine, data)
    while not all(job.over for job in jobs.list()):
        time.sleep(0.01)
    jobs.close()
    engine.close()


def main() -> None:
    import tokenswift_py.api
    import tokenswift_py.serving.jobs.jobs  # noqa: F401

    for line in sys.stdin:
        model, data, context, running = line.split()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write_all(model, data, int(context), int(running))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
