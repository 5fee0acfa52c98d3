"""Pictures of the committed kinds of result over ranks."""

import pytest

from sere_ray.bench.plot import draw, draw_step_time, of_model
from sere_ray.bench.scale import SHAPES, simulate
from sere_ray.util.errors import SereError


def test_scale(tmp_path):
    rows = [row for count in (1, 4) for row in simulate(SHAPES[0], "skewed", 8, count)]
    draw({"rows": rows}, tmp_path / "scale.svg")
    text = (tmp_path / "scale.svg").read_text()
    assert "<svg" in text
    draw({"rows": rows}, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SereError, match="not a result of"):
        draw({"rows": [{"ranks": 8}]}, tmp_path / "other.png")
    with pytest.raises(SereError, match=r"\.png or \.svg"):
        draw({"rows": rows}, tmp_path / "scale.pdf")


def test_expert_parallel_steps(tmp_path):
    row = {"model": "m", "router": "uniform", "data_parallel_size": 2, "speedup_min": 1.0}
    row |= {"speedup_max": 2.0, "speedup": 1.5, "step_ms": 4.0}
    rows = [
        {**row, "rows_per_rank": count, "union": union, "arm": arm}
        for count in (8, 16)
        for union, arm in ((None, "stock"), ("global", "S=1"), ("local", "S=1"))
    ]
    draw({"machine": {"gpu": "a GPU"}, "rows": rows}, tmp_path / "ranks.svg")
    assert "<svg" in (tmp_path / "ranks.svg").read_text()


def test_models_side_by_side_or_one_of_them(tmp_path):
    """Panels wrap; what is drawn of one model is that model's."""
    row = {"arm": "S=1", "speedup": 1.5, "speedup_min": 1, "speedup_max": 2, "step_ms": 4.0}
    rows = [
        {**row, "model": f"{name}: some layers", "router": "uniform", "batch": batch}
        for name in ("alpha", "beta", "gamma")
        for batch in (1, 16)
    ]
    document = {"machine": {"gpu": "a GPU"}, "rows": rows}
    figure = draw_step_time(document)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.partition(":")[0] for title in titles if title] == ["alpha", "beta", "gamma"]
    assert len(figure.axes) == 6
    assert of_model(document, "beta")["rows"] == rows[2:4]
    with pytest.raises(SereError, match="alpha, beta, gamma"):
        of_model(document, "delta")
