"""What the overhead benchmark computes and writes; servers run in the command only."""

import pytest

from sere_ray.bench.models import get_model
from sere_ray.bench.serving_overhead import BARE, Block, make_plan, rows


def test_rows_pair_each_repeat_with_the_bare_server_of_its_round():
    blocks = {
        (BARE, 1): [Block(5, 100, {"engine": 1.0}), Block(6, 200, {"engine": 1.0})],
        ("default", 1): [Block(7, 90, {"engine": 0.5}), Block(9, 190, {"proxy": 0.5})],
    }
    (row,) = rows(blocks, ["default"])
    assert (row["proxy"], row["concurrency"], row["repeats"]) == ("default", 1, 2)
    assert (row["ttft_ms"], row["ttft_ms_min"], row["ttft_ms_max"]) == (8, 7, 9)
    assert (row["tokens_per_s"], row["bare_tokens_per_s"]) == (140, 150)
    assert row["tokens_per_s_ratio"] == pytest.approx((0.9 + 0.95) / 2)
    assert row["cores"] == {"engine": 0.25, "proxy": 0.25}


def test_shapes_get_a_tokenizer_that_knows_every_token(tmp_path):
    from transformers import AutoTokenizer

    plan = make_plan(get_model("demo"), tmp_path, streams=4, tokens=8, compiled=False)
    tokenizer = AutoTokenizer.from_pretrained(plan.folder)
    size = plan.model.config["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Work out 23 + 48.")) == "Work out 23 + 48."
    assert len(tokenizer) == size
    body = plan.body()
    assert all(2 <= token < size for token in body["prompt"])
    assert (body["max_tokens"], body["stream"]) == (8, True)
