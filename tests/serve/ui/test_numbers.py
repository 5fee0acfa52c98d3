"""What the page shows of the counters, and what it does not make up."""

import pytest

from sere_ray.observe.score import TokenScore
from tests.serve.ui.actions import NOTHING, poll, text

pytestmark = pytest.mark.timeout(120)


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


def test_the_score_is_that_of_this_version_over_all_ranks(page, site):
    assert text(page, "#tile-score") == NOTHING
    assert text(page, "#tile-score-note") == "no answer scored yet"
    for engine, losses in zip(site.engines, ([0.1, 0.2], [0.3]), strict=True):
        engine.scores.add(0, "exact", [TokenScore(-1.0, -9.0, False)])
        engine.scores.add(7, "default", [TokenScore(-1.0, -9.0, False)])
        engine.scores.add(0, "default", [TokenScore(-1.0, -1.0 - x, x < 0.3) for x in losses])
    poll(page)
    assert text(page, "#tile-score") == "0.200 ± 0.067"
    assert text(page, "#tile-score-note") == (
        "nats a token, of 2 answers; same likeliest token 67 %"
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
