"""What the workers of one engine counted becomes one report."""

from sere_ray.engine.control import gates_of, of_engine

STEPS = {"steps": 3, "decode_rows": 9}


def report(stage, experts, seconds):
    kind = {**STEPS, "experts_after": experts, "experts_before": None, "forward_seconds": seconds}
    return {"layers": [0, 1, 2, 3], "stage": stage, "decode_only": kind, "mixed": kind}


def test_layers_of_stages_are_added_up_and_tensor_ranks_counted_once():
    first, second = report(0, [4, 5, 0, 0], 1.0), report(1, [0, 0, 6, 7], 0.5)
    merged = of_engine([first, first, second, second])
    assert merged["layers"] == [0, 1, 2, 3]
    assert "stage" not in merged
    for kind in ("decode_only", "mixed"):
        assert merged[kind] == {
            **STEPS,
            "experts_after": [4, 5, 6, 7],
            "experts_before": None,
            "forward_seconds": 1.5,
        }
    assert first["decode_only"]["experts_after"] == [4, 5, 0, 0]


def test_seconds_that_were_not_measured_stay_so():
    merged = of_engine([report(0, [1] * 4, None), report(1, [1] * 4, None)])
    assert merged["decode_only"]["forward_seconds"] is None
    assert of_engine([report(0, [1] * 4, 2.0)])["mixed"]["forward_seconds"] == 2.0


def test_gates_of_all_stages_count():
    first = {"unknown": None, "odd": 3, "hashed": None}
    second = {"unknown": (7, "a table"), "odd": 5, "hashed": None}
    assert gates_of([first, second]) == {"unknown": (7, "a table"), "odd": 3, "hashed": None}


def test_slots_of_workers_that_share_an_engines_rows_are_added_up():
    def of_worker(slots):
        kind = {
            "steps": 3,
            "decode_rows": 9,
            "experts_after": [4, 5],
            "experts_max_rank_after": None,
        }
        kind |= {"slots_rerouted": slots, "slots_merged": [1, 0]}
        return {"stage": 0, "shards": 2, "decode_only": kind, "mixed": kind}

    first = of_worker([1, 2])
    merged = of_engine([first, of_worker([10, 20])])
    assert merged.keys() == {"decode_only", "mixed"}
    for kind in merged.values():
        assert (kind["slots_rerouted"], kind["slots_merged"]) == ([11, 22], [2, 0])
        assert (kind["steps"], kind["decode_rows"], kind["experts_after"]) == (3, 9, [4, 5])
    assert first["decode_only"]["slots_rerouted"] == [1, 2]
