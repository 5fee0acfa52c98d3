"""Headless Chromium, and pages that note what a page of ours must not do."""

import shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

DESKTOP = {"width": 1360, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextmanager
def chromium():
    """Debian's Chromium. While it is open, its thread can run no other event loop."""
    path = shutil.which("chromium")
    assert path, "chromium is missing (Debian: apt install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(browser, url, **options):
    """A page in a context of its own: asks no other origin, logs nothing, leaves no exception.

    The browser itself logs answers with an error status; a test that provokes some says so in
    ``page.expected_errors`` (pieces of text).
    """
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    page = context.new_page()
    requests, logged, page.expected_errors = [], [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: logged.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: logged.append(f"exception: {error}"))
    page.goto(url)
    yield page
    foreign = [asked for asked in requests if urlsplit(asked)[:2] != urlsplit(url)[:2]]
    context.close()
    assert not foreign, foreign
    unexpected = [
        text for text in logged if not any(piece in text for piece in page.expected_errors)
    ]
    assert not unexpected, unexpected
