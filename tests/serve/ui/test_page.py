"""Tokens, lost servers, hostile strings; keyboard, contrast, small screens."""

import pytest

from sere_ray.serve.gateway import keys
from tests.browser import DESKTOP, PHONE, watched
from tests.serve.deployment import ADMIN, API_KEY, wait_for
from tests.serve.ui.actions import FORBIDDEN, REFUSED, UNAUTHORIZED, connect, poll, text

pytestmark = pytest.mark.timeout(120)
TEXT = ("text", "muted", "accent", "bad")
"""Colours of text on cards and on the page."""


def test_asks_for_a_token_and_says_when_it_is_wrong(browser, site):
    with watched(browser, site.url) as page:
        page.expected_errors += [UNAUTHORIZED, FORBIDDEN]
        page.get_by_label("Admin token").wait_for()
        assert text(page, "#token-error") == ""
        assert page.locator("#picture").is_hidden()
        for token, words in ((f"{ADMIN}x", "Missing or wrong key"), (API_KEY, "use the admin's")):
            connect(page, token)
            page.locator("#token-error", has_text=words).wait_for()
            assert page.get_by_label("Admin token").input_value() == token
        connect(page, "münze")
        page.locator("#token-error", has_text="outside ASCII").wait_for()
        connect(page, ADMIN)
        page.locator("#connection", has_text="live").wait_for()
        assert page.url == site.url
        kept = "[localStorage.length, document.cookie, Object.values(sessionStorage)]"
        assert page.evaluate(kept) == [0, "", [ADMIN]]
        page.get_by_role("button", name="Forget token").click()
        page.get_by_label("Admin token").wait_for()
        assert page.evaluate("sessionStorage.length") == 0


def test_a_server_without_keys_is_shown_at_once(browser, make_site):
    with watched(browser, make_site(has_keys=False).url) as page:
        page.locator("#connection", has_text="live").wait_for()
        assert page.locator("#connect").is_hidden()


def test_a_token_that_is_no_longer_valid_keeps_picture_and_edits(page, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "RELOAD_SECONDS", 0)
    page.get_by_label("threshold").fill("0.5")
    content = (tmp_path / "keys.yaml").read_text()
    (tmp_path / "keys.yaml").write_text(
        "keys: []\nadmin: [{name: new, sha256: '" + "0" * 64 + "'}]"
    )
    page.clock.fast_forward(2100)
    page.locator("#token-error", has_text="Missing or wrong key").wait_for()
    assert text(page, "#tile-saved") == "5.00 → 2.50"
    (tmp_path / "keys.yaml").write_text(content)
    connect(page, ADMIN)
    page.locator("#connection", has_text="live").wait_for()
    assert page.get_by_label("threshold").input_value() == "0.5"


def test_the_last_picture_stays_when_the_server_is_gone(page, site):
    page.expected_errors += ["net::ERR", "status of 503"]
    page.context.set_offline(True)
    page.clock.fast_forward(2100)
    page.locator("#trouble", has_text="not reachable. Shown is what came until").wait_for()
    assert text(page, "#tile-saved") == "5.00 → 2.50"
    assert text(page, "#connection") == "no answer"
    page.context.set_offline(False)
    site.has_router = False
    page.wait_for_timeout(100)
    page.clock.fast_forward(2100)
    page.locator("#trouble", has_text="The policy actor restarts or has no engine yet.").wait_for()
    site.has_router = True
    poll(page)
    assert page.locator("#trouble").is_hidden()
    assert text(page, "#connection") == "live"


def test_strings_of_users_are_text(page, site):
    page.expected_errors.append(REFUSED)
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    change = f"fetch('policy', {{method: 'PUT', headers: {{authorization: 'Bearer {ADMIN}', "
    change += "'content-type': 'application/json'}, "
    page.evaluate(change + f"body: JSON.stringify({{[{evil!r}]: 1}})}})")
    page.clock.fast_forward(15_000)
    page.locator("#audit li.refused").wait_for()
    assert evil in text(page, "#audit li.refused")
    assert page.locator("#audit img, #audit script").count() == 0


def test_the_browser_is_told_to_load_and_run_nothing_else(browser, site):
    page = browser.new_page()  # not watched: it shall be blocked
    page.goto(site.url)
    blocked = page.evaluate("""async () => {
        const seen = [];
        const note = (event) => seen.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", note);
        const script = document.createElement("script");
        await fetch("https://example.org/").catch(() => {});
        document.body.append(Object.assign(new Image(), {src: "https://example.org/a.png"}));
        for (const attempt of [
            () => { document.body.innerHTML = "<p>"; },
            () => document.body.setAttribute("onclick", "window.ran = 1"),
            () => setTimeout("window.ran = 1"),
            () => { script.text = "window.ran = 1"; },
        ]) try { attempt(); } catch (error) { seen.push(error.name); }
        await new Promise((resolve) => setTimeout(resolve, 50));
        return [seen, window.ran ?? null];
    }""")
    assert blocked[1] is None
    assert {"connect-src", "img-src", "TypeError"} <= set(blocked[0])
    page.close()


def test_keyboard_alone(browser, site):
    with watched(browser, site.url) as page:
        page.expected_errors.append(UNAUTHORIZED)
        page.get_by_label("Admin token").wait_for()
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        page.locator("#policy").wait_for()
        page.locator("#connection", has_text="live").wait_for()
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.name") == "mode":
                break
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")  # past the list of rules: there Enter opens it
        page.keyboard.press("Enter")
        page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
        assert site.newest["policy"]["mode"] == "observe"


def test_every_control_has_a_name(page):
    nameless = page.evaluate("""() => [
            ...document.querySelectorAll("button, input, summary, canvas, [tabindex]")]
        .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()
            || e.getAttribute("aria-labelledby") || e.closest("[aria-label], [aria-hidden]")))
        .map((e) => e.outerHTML)""")
    assert nameless == []


def test_text_can_be_read_in_light_and_dark(page):
    """Contrast of 4.5 and more (WCAG 2.2, AA)."""
    pairs = [(ink, paper) for ink in TEXT for paper in ("card", "page")]
    pairs += [
        ("bad", "bad-back"),
        ("good", "good-back"),
        ("muted", "edit"),
        ("on-accent", "accent"),
    ]
    value = "(n) => getComputedStyle(document.documentElement).getPropertyValue('--' + n)"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for pair in pairs:
            low, high = sorted(luminance(page.evaluate(value, name)) for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, pair)


def luminance(colour):
    """Relative luminance of ``#rgb`` or ``#rrggbb`` (WCAG 2.2)."""
    digits = colour.strip().lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nothing_is_wider_than_the_screen(page):
    for width in (DESKTOP["width"], 800, PHONE["width"], 320):
        page.set_viewport_size({"width": width, "height": 800})
        wait_for(lambda width=width: fits(page, width), 10, f"fits {width} pixels")


def fits(page, width):
    charts = page.evaluate("[...document.querySelectorAll('.uplot')].map((c) => c.clientWidth)")
    wide = page.evaluate("document.documentElement.scrollWidth")
    return wide <= width and len(charts) == 4 and all(150 < chart < width for chart in charts)
