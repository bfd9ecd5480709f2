"""A real Chromium, driven by Playwright, where both are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts a browser. Skips, with the reason, where there is none: neither one of this machine's nor Playwright's
    own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tokenswift-py[dev]'")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program)
        except sync_api.Error as error:
            if program is not None and "Executable doesn't exist" not in str(error):
                raise
            pytest.skip("needs Chromium: `apt-get install chromium` or `playwright install chromium`")
        yield browser
        browser.close()
