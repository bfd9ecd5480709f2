"""The limits of a request to the server, and the values of fields that a request does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenswift_py.errors import check

MIB = 2**20
STOP_LENGTH = 256  # the most characters of a stop string
ITEMS = {
    "stop": 16,
    "logit_bias": 1024,
    "dry_breakers": 64,
}  # the most entries of a list or of a table; for any other list or table:
MOST_ITEMS = 1024
MOST_DRAFTS = 32  # of a round
MOST_DEPTH = 64  # lists and tables within one another


@dataclass(frozen=True)
class Limits:
    """The limits of one request. Each is a flag of `tokenswift serve`.

    body_mib:       the MiB of a request's body.
    prompt_tokens:  the tokens of one prompt. None is what the context holds.
    max_tokens:     the tokens that one text may have. None is what the context holds.
    default_tokens: the most tokens of a text if the request does not say it, and the context holds as many.
    choices:        the texts of one request, which are prompts times `n`.
    timeout:        the seconds from a request's arrival to the end of its texts, which are then cut. 0 is no limit.
    stall:          the seconds for which a client may leave a stream unread, before it is taken for gone. 0 is no
                    limit.
    """

    body_mib: int = 16
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    default_tokens: int = 2048
    choices: int = 16
    timeout: float = 3600.0
    stall: float = 60.0

    def __post_init__(self) -> None:
        for name in ("body_mib", "prompt_tokens", "max_tokens", "default_tokens", "choices"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1")
        for name in ("timeout", "stall"):
            check(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "seconds; 0 is without end")


def check_size(name: str, value: Any) -> None:
    """Refuses lists, tables and stop strings that are larger than anyone needs. They are looked through at every
    token. Refuses more draft tokens than any text is sped up by: other texts wait for the passes that they take."""
    if name == "draft_tokens" and isinstance(value, int):
        check(value <= MOST_DRAFTS, name, value, f"at most {MOST_DRAFTS} on a server")
    if isinstance(value, (list, tuple, dict)):
        most = ITEMS.get(name, MOST_ITEMS)
        check(len(value) <= most, name, f"{len(value)} entries", f"at most {most}")
    check_depth(name, value)
    for text in value if name == "stop" and isinstance(value, list) else ():
        if isinstance(text, str):
            check(len(text) <= STOP_LENGTH, name, text, f"texts of at most {STOP_LENGTH} characters")


def check_depth(name: str, value: Any) -> None:
    """Refuses lists and tables that lie deeper within one another than Python's stack may hold."""
    inner, depth = [value], 0
    while inner := [item for part in inner if isinstance(part, (list, tuple, dict)) for item in items_of(part)]:
        depth += 1
        check(depth <= MOST_DEPTH, name, f"{depth} levels", f"lists and tables within one another {MOST_DEPTH} times")


def items_of(part: Any) -> Any:
    return part.values() if isinstance(part, dict) else part
