"""A page of headless Chromium for tests."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def chromium_page(**options: Any) -> Iterator[Any]:
    """Yield a page of a new browser, or skip the test; `options` are those of Playwright's `new_page`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if _CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**options)
        page.set_default_timeout(120_000)
        yield page
        browser.close()
