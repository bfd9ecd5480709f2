"""Makes journals that end where a process might have been killed."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenswift_py.runs import journal
from tokenswift_py.runs.journal import Journal


def cut_short(folder: Path, count: int) -> None:
    """Leaves the record of `count` tokens, as if the process had been killed there."""
    record = journal.read(folder)
    shutil.rmtree(folder)
    again = Journal.create(folder, {k: v for k, v in record.header.items() if k != "version"})
    for token, forced in zip(record.tokens[:count], record.forced, strict=False):
        again._pending.append((token, forced))
    again.close()
