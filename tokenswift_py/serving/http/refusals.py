"""Errors in the form that OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}`. The status makes
the client raise the right exception."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tokenswift_py.errors import UserError, shown

logger = logging.getLogger("tokenswift")

WRONG = "invalid_request_error"
TYPES = {400: WRONG, 401: WRONG, 403: WRONG, 404: WRONG, 405: WRONG, 408: WRONG, 413: WRONG, 429: "rate_limit_error",
         503: "service_unavailable_error"}  # fmt: skip
RETRY_AFTER = 1  # seconds after which a request may be sent again when the queue is full


class Refusal(Exception):
    """A request that is not answered.

    param:       the field that is wrong.
    code:        the word by which programs tell errors apart.
    retry_after: the seconds after which the request may be sent again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Returns the error alone. A stream may have to send it, too."""
        kind = TYPES.get(self.status, WRONG if self.status < 500 else "server_error")
        message = self.message.encode(errors="replace").decode()  # a client may have sent half of a surrogate pair
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The shape of every error, for the OpenAPI document."""

    error: ErrorDetail


DESCRIBED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "a wrong value; param names its field",
        401: "no key, or a wrong one",
        403: "a host name that this server does not have",
        404: "no such model, or no such thing",
        408: "the body did not come in time",
        413: "the body is too large",
        429: "too many texts wait; Retry-After says when to try again",
        500: "the text could not be written",
        503: "the server is stopping, or a text had no turn in time",
    }.items()
}


def of_user_error(error: UserError, names: dict[str, str] | None = None) -> Refusal:
    """Returns the refusal for an error of the user.

    names: the request's names for our parameters, where they differ.
    """
    found = re.match(r"([a-z_]+)(?= ?[\w./-]*:)", str(error))
    field, message = found.group() if found else None, str(error)
    asked = (names or {}).get(field or "", field)
    if field and asked != field:
        message = f"{asked}{message[len(field) :]}"
    return Refusal(400, message, asked)


# a part of an error's place: the shape, one of several, that the value was checked against
TAG = re.compile(r"str|int|float|bool|\w+\[.*")


def of_validation(error: RequestValidationError) -> Refusal:
    """Returns the error that is deepest in the body, with its place. The client most likely meant this shape."""
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    place = [str(part) for part in found["loc"] if part != "body" and not TAG.fullmatch(str(part))]
    param = ".".join(place) or None
    if found["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if found["type"] == "extra_forbidden":
        return Refusal(400, f"{param}: no such parameter here", param, "unknown_parameter")
    if found["type"] == "missing":
        return Refusal(400, f"{param or 'body'}: it is missing", param, "missing_required_parameter")
    reason = found["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param or 'body'}: {shown(found.get('input'))} is not allowed; {reason}", param)


def of_failure(error: BaseException) -> Refusal:
    """Returns the refusal for the error that ended a text. If it is not the client's fault, the server's log has all of
    it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError):
        return of_user_error(error)
    logger.error("a text failed: %s: %s", type(error).__name__, error, exc_info=error)
    return Refusal(500, f"the text could not be written ({type(error).__name__})", code="internal_error")


def install(app: FastAPI) -> None:
    """Gives OpenAI's shape to every error that leaves the application."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error.response()

    async def wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return of_user_error(error).response()

    async def misshapen(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error).response()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return of_failure(error).response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(UserError, wrong)
    app.add_exception_handler(RequestValidationError, misshapen)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)
