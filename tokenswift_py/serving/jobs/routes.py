"""Jobs over HTTP, and the page that shows them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from tokenswift_py.errors import check
from tokenswift_py.serving.engine import Busy
from tokenswift_py.serving.http.answers import Events
from tokenswift_py.serving.http.asked import Server
from tokenswift_py.serving.http.own import OwnParameters
from tokenswift_py.serving.http.protocol import Count, Messages, ResponseFormat, TokenIds
from tokenswift_py.serving.http.refusals import DESCRIBED, RETRY_AFTER, ErrorBody, Refusal
from tokenswift_py.serving.jobs.job import Job
from tokenswift_py.serving.jobs.jobs import PRIORITY, Jobs, NoSuchJob, WrongState
from tokenswift_py.serving.jobs.page import page
from tokenswift_py.serving.limits import Limits
from tokenswift_py.serving.shapes import jobs as shapes
from tokenswift_py.serving.shapes.document import described, stream_of
from tokenswift_py.text import Prompt

logger = logging.getLogger("tokenswift")

STATUS_SECONDS = 1.0  # seconds between two statuses in a stream of events
GATHER_SECONDS = 0.05  # seconds in which pieces are gathered into one event
TYPES = {"text.txt": "text/plain; charset=utf-8", "report.json": "application/json"}
OTHER = "application/octet-stream"
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

Offset = Annotated[int, Query(ge=0, lt=2**53, description="characters of the text to leave out")]


class JobRequest(OwnParameters):
    """A long text to be written. A request has either prompt or messages.

    raw:      whether the prompt is the beginning of the text, without a chat template.
    priority: the urgency of the text. Texts of higher priority are served sooner. Without one it is -1, so that answers
              somebody waits for (0) come before it.
    """

    prompt: str | TokenIds | None = None
    messages: Messages | None = None
    raw: bool | None = None
    max_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    priority: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None
    title: Annotated[str, Field(max_length=200)] | None = None
    model: str | None = None
    sample: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class AuditRequest(BaseModel):
    """The settings of an audit.

    sample: the number of windows of the text that are also decoded token by token.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    sample: Annotated[int, Field(ge=0, le=1000)] = 0


def job_routes(jobs: Jobs, limits: Limits, check_model: Callable[[str | None], None]) -> APIRouter:
    """Returns the routes of `jobs`, for an application that tells `UserError` and `Refusal` as `refusals.install` does.

    limits:      the limits of one text. They are the same as for texts that are answered at once.
    check_model: raises Refusal for a model that is not here.
    """
    router = APIRouter()
    server = Server(jobs.engine.loaded, jobs.engine.context, limits)
    errors: dict[int | str, dict[str, Any]] = {
        **{status: DESCRIBED[status] for status in (400, 401, 404, 429, 503) if status in DESCRIBED},
        409: {"model": ErrorBody, "description": "not in the state that the job is in"},
        "default": {"model": ErrorBody},
    }
    job_of = described(shapes.JobWhole)
    events_of = {"description": "the text as it comes", "content": stream_of(shapes.JobEvent)}
    kinds = {kind.split(";")[0] for kind in (*TYPES.values(), OTHER)}
    file_of = {"description": "the file", "content": {kind: {} for kind in sorted(kinds)}}

    def found(name: str) -> Job:
        try:
            return jobs.get(name)
        except NoSuchJob:
            raise no_job(name) from None

    async def done(name: str, what: Any, *arguments: Any) -> Any:
        """Does what is asked for outside of the event loop, and turns errors into refusals."""
        try:
            return await run_in_threadpool(what, *arguments)
        except NoSuchJob:
            raise no_job(name) from None
        except WrongState as error:
            raise Refusal(409, str(error), None, "wrong_state") from error
        except Busy as error:
            raise Refusal(429, str(error), None, "too_many_jobs", RETRY_AFTER) from error
        except OSError as error:
            logger.error("a job could not be kept: %s", error)
            raise Refusal(503, f"the server's disk: {error.strerror}", None, "not_kept") from error

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def home() -> Response:
        return page()

    @router.post("/v1/jobs", status_code=201, responses={**errors, 201: job_of}, response_class=Response)
    async def create(body: JobRequest) -> Response:
        """Takes a text. It is on the disk when this answers, and is written whatever happens to the server."""

        check_model(body.model)

        def make() -> dict[str, Any]:
            prompt, settings, priority = plain(server, body)
            asked = body.model_dump(exclude_none=True, by_alias=True)
            job = jobs.create(prompt, priority=priority, title=body.title or "", asked=asked, **settings)
            return whole(job)

        return answer(await done("", make), 201)

    @router.get("/v1/jobs", responses={**errors, 200: described(shapes.JobList)}, response_class=Response)
    async def every() -> Response:
        """Lists all jobs, the newest first. Leaves out the fields that only one job tells: curve, loops, audit,
        files."""
        told = await run_in_threadpool(lambda: [job.brief() for job in jobs.list()])
        return answer({"object": "list", "data": told})

    @router.get("/v1/jobs/{job}", responses={**errors, 200: job_of}, response_class=Response)
    async def one(job: str) -> Response:
        """Returns the state of a job, and what was asked for."""
        return answer(await run_in_threadpool(whole, found(job)))

    @router.get("/v1/jobs/{job}/text", responses={**errors, 200: described(shapes.JobText)}, response_class=Response)
    async def text(job: str, offset: Offset = 0) -> Response:
        """Returns the text so far, from a character on."""
        it = found(job)
        written = await run_in_threadpool(it.written)
        rest = written[offset:]
        state = it.state
        return answer({"id": it.id, "offset": offset, "text": rest, "next_offset": offset + len(rest), "state": state})

    @router.get("/v1/jobs/{job}/events", responses={**errors, 200: events_of}, response_class=EventSourceResponse)
    async def events(
        job: str, offset: Offset = 0, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> Response:
        """Streams the text as it comes, as server-sent events, from a character on. There are `text` events, whose id
        is the number of characters so far, `status` events, and an `end` event. Last-Event-ID is used rather than
        offset."""
        it = found(job)
        if last_event_id:
            fine = last_event_id.isascii() and last_event_id.isdecimal()
            check(fine, "Last-Event-ID", last_event_id, "the id of an event")
            offset = int(last_event_id)
        return Events(told(it, offset), limits.stall, headers=SAFE)

    @router.post("/v1/jobs/{job}/cancel", responses={**errors, 200: job_of}, response_class=Response)
    async def cancel(job: str) -> Response:
        """Ends a text. What is written stays, and the text can be resumed."""
        return answer(whole(await done(job, jobs.cancel, job)))

    @router.post("/v1/jobs/{job}/resume", responses={**errors, 200: job_of}, response_class=Response)
    async def resume(job: str) -> Response:
        """Goes on with a text that was cancelled, interrupted or failed."""
        return answer(whole(await done(job, jobs.resume, job)))

    @router.post("/v1/jobs/{job}/audit", status_code=202, responses={**errors, 202: job_of}, response_class=Response)
    async def audit(job: str, body: AuditRequest | None = None) -> Response:
        """Begins to prove that plain decoding writes this text. The job's status will have the findings."""
        return answer(whole(await done(job, jobs.audit, job, body.sample if body else 0)), 202)

    @router.post("/v1/jobs/{job}/quality", status_code=202, responses={**errors, 202: job_of}, response_class=Response)
    async def quality(job: str) -> Response:
        """Begins to read this text, window by window, without knowing what comes before each window. The job's status
        will have the perplexity of every window."""
        return answer(whole(await done(job, jobs.read, job)), 202)

    @router.get("/v1/jobs/{job}/files/{name}", responses={**errors, 200: file_of}, response_class=FileResponse)
    async def file(job: str, name: Literal["text.txt", "tokens.npy", "report.json", "journal.bin"]) -> Response:
        """Returns a file of a job's folder, as the command line writes it."""
        path = found(job).folder / name
        if not path.is_file():
            raise Refusal(404, f"{name}: the job has no such file yet", "name", "no_such_file")
        return FileResponse(path, media_type=TYPES.get(name, OTHER), filename=name, headers=SAFE)

    @router.delete("/v1/jobs/{job}", responses={**errors, 200: described(shapes.JobDeleted)}, response_class=Response)
    async def delete(job: str) -> Response:
        """Removes a job and its files. A job that is being written must be cancelled first."""
        await done(job, jobs.delete, job)
        return answer({"id": job, "object": "job", "deleted": True})

    return router


def plain(server: Server, body: JobRequest) -> tuple[list[int], dict[str, Any], float]:
    """Returns the prompt's token ids, the settings and the priority of a request. Raises UserError and Refusal."""
    check((body.prompt is None) != (body.messages is None), "prompt", body.prompt, "either prompt or messages")
    settings = server.settings(body, body.response_format, None)
    settings |= {"raw": True} if body.raw else {}
    said: Prompt = [message.plain() for message in body.messages or ()] if body.prompt is None else body.prompt
    named = "messages" if body.prompt is None else "prompt"
    asked = server.asked(body, settings, [(named, said)], body.max_tokens, "max_tokens", 1)
    (prompt, sample), *_ = asked.choices
    priority = PRIORITY if body.priority is None else body.priority
    return asked.prompts[prompt], {**asked.settings, "stream": sample}, priority


def whole(job: Job) -> dict[str, Any]:
    """Returns all of a job's status."""
    return {**job.status(), "asked": job.kept.asked, "seed": job.kept.settings["seed"]}


async def told(job: Job, offset: int) -> AsyncIterator[dict[str, Any]]:
    """Yields the events of a job from a character on. A client may know more of the text than a server that was killed.
    It then hears nothing until the server has written the same bytes again, and more."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()
    due, examined = 0.0, None

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    with job.watching(tell):
        while True:
            changed.clear()
            over = job.over and not job.examined
            written = await run_in_threadpool(job.written)
            if len(written) > offset:
                part, offset = written[offset:], len(written)
                yield {"event": "text", "id": str(offset), "data": dumped({"text": part, "tokens": job.pace.tokens})}
            if over:
                yield {"event": "end", "data": dumped(job.status())}
                return
            now = time.monotonic()
            if now >= due or examined != (job.auditing, job.reading):
                due, examined = now + STATUS_SECONDS, (job.auditing, job.reading)
                yield {"event": "status", "data": dumped(job.status())}
            # asyncio.wait_for can miss that a client left (before Python 3.12).
            alarm = loop.call_later(STATUS_SECONDS, changed.set)
            try:
                await changed.wait()
            finally:
                alarm.cancel()
            await asyncio.sleep(GATHER_SECONDS)


def no_job(name: str) -> Refusal:
    return Refusal(404, f"job: there is no {name[:64]!r}", "job", "no_such_job")


def dumped(value: Any) -> str:
    """Returns JSON in ASCII. The request may hold half of a surrogate pair."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def answer(value: Any, status: int = 200) -> Response:
    return Response(dumped(value), status, SAFE, "application/json")
