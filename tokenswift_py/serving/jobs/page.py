"""The page at `/`. It is one file, and may load nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response


@cache
def contents() -> tuple[bytes, str]:
    """Returns the page and its Content-Security-Policy. That allows its own script and style, and requests to this
    server."""
    html = files("tokenswift_py.serving.jobs").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (hashed(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def hashed(html: str, tag: str) -> str:
    """Returns the hashes of all elements of this kind."""
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def page() -> Response:
    html, policy = contents()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)
