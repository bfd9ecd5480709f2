"""Answers of the endpoints of jobs, and the events of a job's stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, RootModel

from tokenswift_py.serving.shapes.document import Shape

State = Literal["waiting", "running", "finished", "failed", "cancelled", "interrupted"]


class JobLine(Shape):
    """A job in a list of many. Times are in seconds since 1970. Shares go from 0 to 1."""

    id: str
    object: Literal["job"]
    title: str
    created: float
    ended: float | None
    priority: float
    state: State
    ending: str | None
    error: str | None
    tokens: int
    characters: int
    max_tokens: int
    percent: float
    tokens_per_s: float | None
    plain_tokens_per_s: float | None
    speedup: float | None
    tokens_per_pass: float | None
    eta_s: float | None
    auditing: float | None
    reading: float | None


class JobList(Shape):
    object: Literal["list"]
    data: list[JobLine]


class LoopPlace(Shape):
    """A block of `period` tokens that is repeated over and over, from token `start` to `stop`."""

    start: int
    stop: int
    period: int


class Findings(Shape):
    """The findings of an audit. `passed` is null if the audit was stopped."""

    model_config = ConfigDict(extra="allow")
    passed: bool | None
    conclusion: str
    at: float


class ReadWindow(Shape):
    """A window and its figures. A figure is null if it is not a finite number."""

    start: int
    stop: int
    perplexity: float | None
    bits_per_byte: float | None
    distinct_4: float | None
    looping: bool


class Readings(Shape):
    """The figures of all windows. They are null if there is no window, or if they are not finite numbers."""

    median: float | None
    worst: float | None
    bits_per_byte_median: float | None
    bits_per_byte_worst: float | None
    windows: int
    window: int
    judge: str
    per_window: list[ReadWindow]
    at: float


class JobStatus(JobLine):
    """All of a job. `curve` has the tokens a pass along the text, as pairs of the tokens by then and the mean."""

    loops: list[LoopPlace]
    curve: list[list[float]]
    audit: Findings | None
    quality: Readings | Findings | None
    files: list[str]


class JobWhole(JobStatus):
    """All of a job, and what was asked for. `asked` is the request in its own words."""

    asked: Any
    seed: int


class JobText(Shape):
    id: str
    offset: int
    text: str
    next_offset: int
    state: State


class JobDeleted(Shape):
    id: str
    object: Literal["job"]
    deleted: Literal[True]


class JobPiece(Shape):
    """A `text` event. `tokens` is the number of tokens of the text so far."""

    text: str
    tokens: int


class JobEvent(RootModel[JobPiece | JobStatus]):
    """The data of a `text` event, or of a `status` or `end` event."""


ALL = (JobList, JobWhole, JobText, JobDeleted, JobEvent)
