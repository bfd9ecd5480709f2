"""The gate before the application. It decides who may ask, by which name of the server, and how much may be sent."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenswift_py.errors import shown
from tokenswift_py.serving.http.refusals import Refusal
from tokenswift_py.serving.limits import MIB

OPEN = ("/health", "/")  # paths that need no key, for they tell nothing; they take no body
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DROPPED = 64 * MIB  # the most bytes that are read and dropped
BODY_SECONDS = 60.0  # seconds in which a request's body must arrive


class Gate:
    """An ASGI application before another one.

    key:      the key without which only /health is answered. None asks for no key.
    hosts:    the names by which the server may be called. None allows any name. Without a key and with any name, a
              browser's page from elsewhere could reach a server on this machine: its own name could lead here (DNS
              rebinding).
    origins:  the origins of other servers' pages that may ask, too. Where no key is asked for, any page that a browser
              has open could otherwise send a request here, though it could not read the answer.
    body_mib: the MiB that a request may send. The application gets the body as a whole, so it never waits for a slow
              sender.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: Collection[str] | None, body_mib: int,
        origins: Collection[str] = (),
    ):  # fmt: skip
        self.app, self.hosts, self.origins = app, hosts, origins
        self._key = None if key is None else key.encode()
        self._most = body_mib * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self.check_host(headers)
            self.check_origin(headers, scope["method"])
            if scope["path"] in OPEN:
                body: bytes | None = b""  # nobody has shown a key, so nothing of theirs is kept
            else:
                self.check_key(headers)
                body = await self.body(headers, receive)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, replay(body, receive), send)

    def check_host(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        try:
            name = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            name = None
        if name not in self.hosts:
            raise Refusal(403, f"host: this server is not called so; it is {' or '.join(sorted(self.hosts))}", "host")

    def check_origin(self, headers: Headers, method: str) -> None:
        """Refuses what another server's page asks to be done. A page cannot send a key without asking for leave first
        (CORS), so this is for servers without one."""
        origin = headers.get("origin")
        if self._key is not None or origin is None or method in ("GET", "HEAD", "OPTIONS") or origin in self.origins:
            return
        try:
            there, here = urlsplit(origin), urlsplit(f"//{headers.get('host', '')}")
            known = there.hostname == here.hostname or there.hostname in (self.hosts or ())
            same = known and there.port == here.port
        except ValueError:
            same = False
        if not same:
            told = f"origin: pages of {shown(origin)} may not ask; --cors names those that may"
            raise Refusal(403, told, "origin", "origin_not_allowed")

    def check_key(self, headers: Headers) -> None:
        """Checks the key. The time that this takes does not depend on what was sent."""
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not same:
            told = "no API key, or a wrong one; send it as Authorization: Bearer KEY"
            raise Refusal(401, told, code="invalid_api_key")

    async def body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Returns all of the body, or None if the client left before its end. If the body is too large, some of it is
        read and dropped: a client that still sends when the connection is closed does not see the answer."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 18 or int(declared) > self._most + DROPPED:
            raise self.too_large()
        try:
            # asyncio.wait_for loses a cancellation that comes with the message (before Python 3.12).
            with anyio.fail_after(BODY_SECONDS):
                return await self._received(receive)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {BODY_SECONDS:g} s") from None

    async def _received(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= self._most + DROPPED:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self._most:
                parts.append(part)
            else:
                parts.clear()
        if size > self._most:
            raise self.too_large()
        return b"".join(parts)

    def too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._most // MIB} MiB", code="body_too_large")


def replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body, and then what comes after it: that the client leaves."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
