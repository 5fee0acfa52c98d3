"""The demo's words and table, of made-up numbers."""

from rich.console import Console

from sere_ray.demo.measure import Quality
from sere_ray.demo.report import comparison, print_table, summary
from sere_ray.demo.speed import Speed

NAMES = ("stock", "margin 0.01", "margin 0.025", "S=2")
QUALITY = [
    Quality(name, 16, reads, same, kl)
    for name, reads, same, kl in zip(
        NAMES,
        (35.3, 21.8, 18.3, 22.4),
        (1, 0.952, 0.926, 0.924),
        (0, 0.009, 0.021, 0.022),
        strict=True,
    )
]


def speeds(lowest: float) -> list[Speed]:
    return [Speed(name, None, 20, 50, 1.5, lowest, 1.9, 7) for name in NAMES]


def test_words_say_what_was_gained_at_what_cost(has_words):
    words = ("margin 0.01", "22 of 35 experts", "1.50 times as fast;", "95% of", "S=2", "92%")
    has_words(summary(QUALITY, speeds(1.2)), *words)


def test_words_say_where_the_gain_is_not_sure(has_words):
    has_words(summary(QUALITY, speeds(0.9)), "not sure: 0.90 to 1.90")


def test_only_the_largest_batch_has_a_speed_and_a_line_fits_a_terminal():
    small = [Quality(name, 4, 9.9, 1, 0) for name in NAMES]
    cells = comparison([*small, *QUALITY], speeds(1.2))
    assert [bool(row[-1]) for row in cells[1]] == [False] * 4 + [True] * 4
    console = Console(width=80, record=True)
    print_table("title", cells, console)
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
    assert any("1.50 (1.2-1.9)" in line and "0.025" in line for line in lines)
