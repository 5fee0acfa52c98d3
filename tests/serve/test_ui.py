"""The page in a browser, over the real control API, access layer and router, without engines."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi.testclient import TestClient
from ray import serve

from sere_ray.serve import control_api, keys
from sere_ray.serve.ui import FILES, FOLDER, PAGE, PATHS
from tests.browser import DESKTOP, PHONE, chromium, watched
from tests.serve.deployment import ADMIN, API_KEY, wait_for
from tests.serve.site import Engine, Site

pytestmark = pytest.mark.timeout(120)
UNAUTHORIZED, FORBIDDEN, REFUSED = "status of 401", "status of 403", "status of 422"
NOTHING = "\N{EN DASH}"
TEXT = ("text", "muted", "accent", "bad")
"""Colours of text on cards and on the page."""


@pytest.fixture
def make_site(tmp_path, monkeypatch):
    running = []

    def make(has_keys=True, auto=None):
        site = Site(tmp_path, has_keys, auto)
        monkeypatch.setattr(control_api, "find_router", site.find_router)
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
        server = uvicorn.Server(
            uvicorn.Config(
                site.app, port=site.port, log_level="warning", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_for(lambda: server.started, 10, "the server")
        return site

    yield make
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, site):
    """Connected, after the first interval."""
    with watched(browser, site.url) as page:
        page.expected_errors.append(UNAUTHORIZED)  # the first question, without a token
        page.clock.install()
        connect(page, ADMIN)
        page.locator("#tiles").wait_for()
        poll(page)
        yield page


def connect(page, token):
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Connect").click()


def poll(page):
    """Let the page look at the counters now, not in two seconds."""
    page.wait_for_timeout(100)  # the timer is set only when the last answer has been shown
    with page.expect_response("**/sere/stats"):
        page.clock.fast_forward(2100)
    page.wait_for_timeout(50)


def text(page, selector):
    return page.locator(selector).inner_text()


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def client(site):
    return TestClient(site.app, base_url="http://127.0.0.1", follow_redirects=False)


def test_every_file_is_served_to_anybody_with_headers_that_keep_it_to_itself(client):
    for path in PATHS - {"/sere/ui/"}:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/sere/ui/").headers["location"] == "../ui"


def test_the_folder_holds_what_is_served_and_a_licence():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {*FILES, PAGE, "uPlot.LICENSE.txt"}
    assert sum((FOLDER / name).stat().st_size for name in names) < 200_000


def test_nothing_else_is_open(client):
    for path in (
        "/sere/ui/__init__.py",
        "/sere/ui/other.js",
        "/sere/ui/app.js/",
        "/sere/ui/../policy",
        "/sere/ui/%2e%2e/policy",
        "/sere/ui/..%2fpolicy",
        "/sere/ui//app.js",
        "/sere/UI",
        "/sere/policy",
        "/sere/openapi.json",
    ):
        assert client.get(path).status_code == 401, path
    assert client.request("PUT", "/sere/ui", json={}).status_code == 401


def test_a_path_that_is_no_file_of_the_page_is_not_found(client):
    token = {"authorization": f"Bearer {ADMIN}"}
    for name in ("__init__.py", "other.js", "%2e%2e/ui/__init__.py", "..%2f__init__.py"):
        assert client.get(f"/sere/ui/{name}", headers=token).status_code == 404


# --- in a browser ---------------------------------------------------------------------------------


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


def test_numbers_are_those_of_the_counters(page):
    assert text(page, "#tile-saved") == "5.00 → 2.50"
    assert text(page, "#tile-saved-note") == "50 % fewer; a layer has 8"
    # 8 and 4 slots of two ranks with 4 rows each, of K = 4
    assert text(page, "#tile-rerouted") == "38 %"
    assert text(page, "#tile-time") == "7.50 ms"
    assert text(page, "#tile-rows") == "8.00"
    assert page.locator("#experts-chart .u-value").all_inner_texts()[1:] == ["5.00", "2.50"]
    page.get_by_text("Layers in numbers").click()
    layer = text(page, "#layers tbody tr:nth-child(1)").split()
    assert layer == ["0", "6.00", "3.00", "16.0", "0.00"]
    rank = text(page, "#ranks tbody tr:nth-child(2)").split()
    assert rank == ["1", "4.00", "10.0", "38", "%", "0"]
    assert text(page, "#ranks-note") == (
        "Rank 1 is 100 % slower than the fastest of its gang. The busiest rank reads 2.50 → 2.50 "
        "experts a layer. Ranks send each other 1.50 kB a step."
    )


def test_the_heat_map_shows_layers_and_hatches_what_is_not_known(page):
    page.expected_errors.append("Canvas2D")  # that pixels are read
    box = page.locator("#heat-chart .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] - 5)
    page.locator("#heat-cell", has_text="Layer 1").wait_for()
    assert "4.00 experts before, 2.00 after the rule" in text(page, "#heat-cell")
    after = heat_pixels(page)
    page.get_by_label("before", exact=True).check(force=True)
    before = heat_pixels(page)
    assert len(after) == len(before) == 2, "two layers, two colours"
    assert before[0] != after[0]


def heat_pixels(page):
    """Colours of the newest column, top and bottom."""
    return page.evaluate("""() => {
        const over = document.querySelector("#heat-chart .u-over");
        const canvas = document.querySelector("#heat-chart canvas");
        const ratio = devicePixelRatio, pen = canvas.getContext("2d");
        const left = (over.offsetLeft + over.clientWidth - 4) * ratio;
        return [0.25, 0.75].map((part) => {
            const top = (over.offsetTop + over.clientHeight * part) * ratio;
            return String(pen.getImageData(left, top, 1, 1).data);
        });
    }""")


def test_a_policy_change(page, site):
    field = page.get_by_label("select_top_k")
    assert field.input_value() == "2"
    apply = page.get_by_role("button", name="Apply")
    assert apply.is_disabled()
    field.fill("1")
    page.get_by_label("observe").check(force=True)
    assert text(page, "#policy > .note") == "select_top_k 2 → 1, mode on → observe"
    poll(page)
    assert field.input_value() == "1", "a poll must not undo what is being edited"
    apply.click()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert site.router._versions[-1]["policy"]["select_top_k"] == 1
    assert apply.is_disabled()
    poll(page)
    poll(page)
    assert text(page, "#audit li:first-child b") == "ops"
    assert "select_top_k 2 → 1, mode on → observe" in text(page, "#audit li:first-child")
    assert "mode on would save 50 %" in text(page, "#tile-saved-note")
    assert "Mode observe" in text(page, "#notice")
    page.get_by_role("button", name="Load version 0 into the policy form").click()
    assert field.input_value() == "2"
    assert text(page, "#policy > .note") == "select_top_k 1 → 2, mode observe → on"


def test_the_form_has_the_keys_of_the_chosen_rule(page, site):
    """And takes back what another rule had."""
    page.expected_errors.append(REFUSED)
    page.get_by_label("threshold").fill("0.5")
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert page.get_by_label("experts", exact=True).is_hidden()
    page.get_by_label("rule", exact=True).select_option("lynx")
    assert page.get_by_label("threshold").is_hidden()
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("policy.experts is missing").wait_for()
    for name, value in {"experts": "6", "alpha": "1", "base": "2", "depth": "3"}.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Version 2 runs on all 2 ranks.").wait_for()
    policy = site.router._versions[-1]["policy"]
    assert (policy["rule"], policy["experts"], policy["threshold"]) == ("lynx", 6, None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("select_top_k", "9", "policy.select_top_k = 9: this model chooses K = 4"),
        ("select_top_k", "", "policy.select_top_k is missing: give it"),
        ("threshold", "a lot", "policy.threshold = 'a lot': input should be a valid number"),
    ],
)
def test_a_refused_change_is_explained_at_its_field(page, site, name, value, words):
    page.expected_errors.append(REFUSED)
    page.get_by_label(name).fill(value)
    page.get_by_label("observe").check(force=True)
    page.get_by_label(name).press("Enter")
    page.locator(f"#policy-{name}-error", has_text=words).wait_for()
    assert page.get_by_label(name).get_attribute("aria-invalid") == "true"
    assert page.get_by_label(name).input_value() == value, "what was typed stays"
    assert page.get_by_label("observe").is_checked()
    assert site.router._versions[-1]["version"] == 0
    page.get_by_role("button", name="Undo edits").click()
    assert page.get_by_label("on", exact=True).is_checked()


def test_a_change_that_not_all_ranks_follow_yet(page, site):
    page.expected_errors.append("net::ERR")
    hang = threading.Event()
    site.engines[1].silent = True

    async def stuck(*args, **kwargs):
        while not hang.is_set():
            await asyncio.sleep(0.05)
        return await Engine.step(site.engines[1], *args, **kwargs)

    site.engines[1].step = stuck
    poll(page)  # frees the rank from its long poll; now it hangs
    page.get_by_label("select_top_k").fill("1")
    page.get_by_role("button", name="Apply").click()
    page.locator("#settled", has_text="version 1 on 0 of 2 ranks").wait_for()
    assert page.locator("#settling").is_visible()
    site.engines[1].silent = False
    hang.set()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    assert page.locator("#settling").is_hidden()


def test_strings_of_users_are_text(page, site):
    page.expected_errors.append(REFUSED)
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    change = f"fetch('policy', {{method: 'PUT', headers: {{authorization: 'Bearer {ADMIN}'}}, "
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
    page.locator("#trouble", has_text="The router actor is restarting.").wait_for()
    site.has_router = True
    poll(page)
    assert page.locator("#trouble").is_hidden()
    assert text(page, "#connection") == "live"


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


def test_without_traffic_it_says_so(page, site):
    for engine in site.engines:
        engine.idle = True
    poll(page)
    assert "No traffic" in text(page, "#notice")
    assert text(page, "#tile-saved") == NOTHING


def test_in_mode_off_nothing_is_made_up(page, site):
    page.get_by_label("off", exact=True).check(force=True)
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Version 1 runs on all 2 ranks.").wait_for()
    poll(page)
    poll(page)
    assert text(page, "#tile-saved") == NOTHING
    assert text(page, "#tile-saved-note") == "not counted while off"
    assert text(page, "#tile-rerouted") == "0 %"
    assert text(page, "#tile-time") == "7.50 ms"


def test_mode_auto_shows_its_level_and_why(browser, make_site):
    levels = [{"select_top_k": 2}, {"select_top_k": 1}]
    site = make_site(auto={"tpot_ms": 0.1, "interval_s": 0.5, "patience": 1, "levels": levels})
    with watched(browser, site.url) as page:
        page.expected_errors.append(UNAUTHORIZED)
        connect(page, ADMIN)
        page.get_by_label("auto", exact=True).check(force=True)
        page.get_by_role("button", name="Apply").click()
        page.locator("#notice", has_text="Mode auto at level 2 of 2 (0 = exact): p90").wait_for()
        assert page.get_by_label("auto", exact=True).is_checked()
        assert page.get_by_label("select_top_k").input_value() == "1"
        assert page.get_by_role("button", name="Apply").is_disabled()
        page.locator("#audit li", has_text="level 2: ").wait_for()
        assert "level 2: p90 0.2 ms > 0.1 ms." in text(page, "#audit li:first-child")


def test_a_rank_that_does_not_answer_is_named_and_its_return_is_no_peak(page, site):
    site.engines[1].silent = True
    page.clock.fast_forward(2100)
    page.locator("#notice", has_text="1 of 2 ranks did not answer").wait_for()
    assert "no answer" in text(page, "#ranks")
    site.engines[1].silent = False
    for _ in range(2):
        poll(page)
    assert text(page, "#tile-rows") == "8.00"
    peaks = page.locator("#batch-chart .u-legend .u-value").last.inner_text()
    assert peaks == "8.00"


def test_restarted_engines_count_from_zero(page, site):
    for engine in site.engines:
        engine.restart()
    poll(page)
    assert text(page, "#tile-saved") == "5.00 → 2.50"
    assert text(page, "#tile-time") == "7.50 ms"


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
        assert site.router._versions[-1]["policy"]["mode"] == "observe"


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
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        charts = page.evaluate("[...document.querySelectorAll('.uplot')].map((c) => c.clientWidth)")
        assert len(charts) == 4
        assert all(150 < chart < width for chart in charts)
