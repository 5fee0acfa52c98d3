"""The page of a real deployment under a little load; its pictures are those of the docs.

``python -m pytest tests/live/test_page.py --write-pictures`` renews them.
"""

import itertools
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import DESKTOP, PHONE, chromium, watched
from tests.serve.deployment import ADMIN

pytestmark = pytest.mark.engine
PICTURES = Path(__file__).parents[2] / "docs/pictures"
LEAST_INTERVALS = 3
"""Of two seconds, that each load and policy of the picture is looked at."""


class Load:
    """Streams, each of which asks for one answer after the other; every request is another."""

    def __init__(self, live):
        self._live, self._over, self._threads = live, threading.Event(), []
        self._numbers = itertools.count()
        self.statuses = set()

    def more(self, streams):
        for _ in range(streams):
            thread = threading.Thread(target=self._ask, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _ask(self):
        while not self._over.is_set():
            prompt = f"Work out {next(self._numbers)} + 48 - 17."
            self.statuses.add(self._live.complete(prompt, max_tokens=100)[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._over.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def pictures(request, tmp_path):
    """Folder for the pictures."""
    return PICTURES if request.config.getoption("--write-pictures") else tmp_path


@pytest.fixture
def as_before(live):
    """Puts the policy back."""
    keys = ("mode", "select_top_k")
    policy = live.sere("policy")["policy"]
    yield
    live.sere("policy", {key: policy[key] for key in keys})


def watch(page, intervals):
    for _ in range(intervals):
        page.wait_for_event("response", lambda response: response.url.endswith("/sere/stats"))
    page.wait_for_timeout(100)


def test_the_page_shows_and_changes_a_running_deployment(live, as_before, pictures):
    with chromium() as browser, Load(live) as load, watched(browser, f"{live.url}/sere/ui") as page:
        page.expected_errors += ["status of 401", "status of 422"]
        load.more(4)
        page.get_by_label("Admin token").fill("token-of-somebody")
        page.keyboard.press("Enter")
        page.locator("#token-error", has_text="Missing or wrong key").wait_for()
        page.get_by_label("Admin token").fill(ADMIN)
        page.keyboard.press("Enter")
        page.locator("#connection", has_text="live").wait_for()
        watch(page, LEAST_INTERVALS)
        check_numbers(page)
        load.more(12)
        watch(page, LEAST_INTERVALS)
        change_policy(page, live)
        watch(page, LEAST_INTERVALS)
        take_pictures(page, pictures)
    assert load.statuses == {200}
    assert page.url == f"{live.url}/sere/ui"


def check_numbers(page):
    """Live, and of this deployment: the demo model's 48 experts, four layers, two ranks."""
    before, after = map(float, page.locator("#tile-saved").inner_text().split(" → "))
    assert 4 <= after <= before <= 48
    assert "a layer has 48" in page.locator("#tile-saved-note").inner_text()
    assert float(page.locator("#tile-rows").inner_text()) > 1
    assert page.locator("#ranks tbody tr").count() == 2
    assert page.locator("#layers tbody tr").count() == 4
    assert page.locator("#notice").is_hidden()


def change_policy(page, live):
    field = page.get_by_label("select_top_k")
    field.fill("99")
    field.press("Enter")
    page.locator("#policy-select_top_k-error", has_text="1..4 is allowed").wait_for()
    field.fill("2")
    field.press("Enter")
    page.get_by_text("runs on all 2 ranks.").wait_for()
    assert live.sere("policy")["policy"]["select_top_k"] == 2
    page.locator("#audit li", has_text="select_top_k 1 → 2").first.wait_for()


def take_pictures(page, folder):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(DESKTOP)
        save(page, folder / f"page-desktop-{scheme}.png", full_page=True)
        page.set_viewport_size(PHONE)
        if scheme == "dark":
            page.locator("#policy-title").scroll_into_view_if_needed()
        save(page, folder / f"page-phone-{scheme}.png")


def save(page, path, **options):
    page.wait_for_timeout(200)  # charts follow the width
    page.screenshot(path=path, **options)
    picture = Image.open(path).convert("RGB")  # a third of the bytes, no colour off by much
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path)
    assert path.stat().st_size < 150_000
