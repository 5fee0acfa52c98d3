"""`sere-ray evaluate` and `tune`: numbers by hand, a small run, and what they refuse."""

import json
from typing import get_args

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.cli.main import app
from sere_ray.evaluation.comparison import Frontier, Point, compare
from sere_ray.evaluation.decode_batches import Measured
from sere_ray.evaluation.frontier import best_rows
from sere_ray.evaluation.settings import Setting, looks_at_ranks
from sere_ray.evaluation.statistics import draws
from sere_ray.evaluation.tune import _plain, joined, ranges_between
from sere_ray.policy.policy import RULE_NAMES, Policy
from sere_ray.rules import RULES
from sere_ray.util.results import load_result

DATA = str(assets.CALIBRATION)
HELD_OUT = str(assets.CALIBRATION.with_name("heldout.jsonl"))
SMALL = ["--sequences", "16", "--length", "24", "--prompt", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """An artifact with all statistics."""
    path = tmp_path_factory.mktemp("frontier") / "full.safetensors"
    groups = ("stand_ins", "directed", "novices")
    calibrate(str(assets.MODEL), data=DATA, out=path, sequences=16, device="cpu", statistics=groups)
    return str(path)


def run(command, *arguments):
    return CliRunner().invoke(app, [command, str(assets.MODEL), *map(str, arguments)])


# --- by hand -----------------------------------------------------------------------------------


def test_frontier_leaves_out_what_another_setting_beats():
    frontier = Frontier(np.array([4.0, 8.0, 6.0, 7.0]), np.array([1.0, 0.01, 0.1, 0.5]))
    assert frontier.reads.tolist() == [4, 6, 8]
    assert frontier.kl_at(5) == pytest.approx(np.sqrt(0.1)), "linear in the logarithm"
    assert frontier.reads_at(np.sqrt(0.1)) == pytest.approx(5)
    assert np.isnan(frontier.kl_at(8.5))
    assert np.isnan(frontier.reads_at(0.001))
    assert frontier.kl_at(8.05) == pytest.approx(0.01), "an edge is not a knife's"


def test_comparison_at_equal_experts_and_at_equal_kl():
    """OEA is exp(-reads), SERE twice that, ours a quarter: 1.386 experts to the left."""
    texts = 8

    def measured(reads, factor):
        kl = np.full((texts, 4), factor * np.exp(-reads), dtype=np.float32)
        ones = np.ones((texts, 4), dtype=np.float32)
        experts = np.full(texts, reads, dtype=np.float32)
        return Measured(
            kl,
            ones,
            ones[:, 1:],
            0 * ones[:, 1:],
            experts,
            ones[:, 0],
            {1: experts, 2: experts / 2},
        )

    points, found = [Point("exact", {}, 4)], [measured(9.0, 0.0)]
    for rule, factor in (("sere", 2.0), ("oea", 1.0), ("margin", 0.25)):
        for reads in (1.0, 3.0, 6.0):
            found.append(measured(reads, factor))
            points.append(Point(rule, {"select_top_k": int(reads)}, 4))
    rows = {row["at"]: row for row in compare(points, found, draws(texts))}
    row = rows["experts of SERE S=3"]
    assert (row["batch"], row["best_peer"], row["experts"]) == (4, "oea", 3.0)
    assert row["kl_to_sere"] == pytest.approx(1 / 8, rel=1e-3)
    assert row["kl_to_best_peer"] == pytest.approx(1 / 4, rel=1e-3)
    expected = (3 - np.log(4)) / 3
    assert row["experts_to_best_peer_at_its_kl"] == pytest.approx(expected, rel=1e-3)
    assert row["kl_to_sere_95"] == [row["kl_to_sere"]] * 2, "texts do not differ"
    assert rows["worst anywhere"]["kl_to_best_peer"] == pytest.approx(1 / 4, rel=1e-3)
    assert compare(points[:4], found[:4], draws(texts)) == [], "ours is not among them"

    points.append(Point("oea", {"select_top_k": 9}, 4, ranks=2))
    found.append(measured(3.0, 0.5))
    of_ranks = compare(points, found, draws(texts), ranks=(1, 2))
    first = {row["ranks"]: row for row in of_ranks if row["at"] == "experts of SERE S=3"}
    assert first[1] == row, "a setting for two ranks has no part in what one rank does"
    assert (first[2]["experts"], first[2]["best_peer"]) == (1.5, "oea")
    assert first[2]["kl_to_best_peer"] == pytest.approx(1 / 2, rel=1e-3)


def test_rows_that_another_one_beats_are_left_out():
    def row(rule, reads, kl, **settings):
        fields = {"rule": rule, "batch": 4, "ranks": 1, "settings": settings}
        return {**fields, "experts_read_max_rank": reads, "kl_mean": kl}

    good = [row("oea", 5, 0.2), row("oea", 7, 0.1), row("sere", 5, 0.9, select_top_k=1)]
    beaten = [row("oea", 7, 0.2), row("oea", 8, 0.15), row("sere", 6, 1.0, threshold=0.3)]
    beaten += [row("oea", 9, 0.0)]  # changes nothing
    compared_at = [row("sere", 6, 0.95, select_top_k=2)]
    assert best_rows(good + beaten + compared_at) == good + compared_at
    assert best_rows([row("oea", 7, 0.2) | {"batch": 8}, *good]) != good, "another batch size"


def test_settings_of_ranges_are_joined_as_they_were_tried():
    """A key that only the last range gives is null in an entry, not taken over."""
    strict = {"rule": "sere", "select_top_k": 1, "threshold": 0.3}
    plain = {"rule": "sere", "select_top_k": 1, "threshold": None, "min_primary_experts": 0}
    keys = _plain(joined({2: plain, 8: strict, 16: strict}))
    policy = Policy.parse({"similarity": "-", **keys}).for_model(top_k=4)
    of_sizes = [policy.for_rows(rows) for rows in (2, 8, 16, 64)]
    assert [of.threshold for of in of_sizes] == [None, 0.3, 0.3, 0.3]
    assert [of.min_primary_experts for of in of_sizes] == [0, 4, 4, 4]
    assert [entry["up_to"] for entry in keys["by_rows"]] == [2]
    assert joined({16: strict}) == strict


def test_ranges_between_batch_sizes():
    assert ranges_between((16, 4, 8)) == [(4,), (4, 8), (8, 16)]
    assert ranges_between((8,)) == [(8,)]


# --- a small run -------------------------------------------------------------------------------


def test_evaluate(similarity, tmp_path):
    out, page, picture = (tmp_path / name for name in ("f.json", "f.html", "f.png"))
    done = run(
        *("evaluate", "--similarity", similarity, "--data", HELD_OUT, "--out", out),
        *("--html", page, "--batches", "1,8", "--ranks", "1,4", "--rules", "sere,xshare,margin"),
        *SMALL,
    )
    assert done.exit_code == 0, done.output
    document = load_result(out)
    assert (document["model"], document["data"]) == ("model", "heldout.jsonl")
    rows = document["rows"]
    for rule in ("sere", "xshare", "margin"):
        own = [row for row in rows if (row["rule"], row["batch"], row["ranks"]) == (rule, 8, 1)]
        assert len({str(row["settings"]) for row in own}) == len(own) >= 8
        assert document["settings_tried"][rule] == sum(row["rule"] == rule for row in rows)
    assert {row["ranks"] for row in rows if looks_at_ranks(row["settings"])} == {4}
    fields = {"rule", "settings", "batch", "ranks", "experts_read_mean", "experts_read_max_rank"}
    fields |= {"kl_mean", "kl_p99", "top1_agreement", "perplexity"}
    further = {"kl_median", "kl_p999", "kl_max", "delta_p_rms"}
    for row in rows:
        assert fields | further <= row.keys()
        assert 0 <= row["kl_median"] <= row["kl_p99"] + 1e-4
        assert row["kl_p99"] <= row["kl_p999"] <= row["kl_max"]
        assert (row["delta_p_rms"] > 0) == (row["kl_max"] > 0)
        for name in fields - {"rule", "settings", "batch", "ranks"}:
            low, high = row[f"{name}_95"]
            assert low - 1e-3 <= row[name] <= high + 1e-3
        if row["rule"] in ("exact", "margin") and row["batch"] == 1:
            assert (row["kl_mean"], row["experts_read_mean"]) == (0.0, 4.0)
        if row["ranks"] == 1:
            assert row["experts_read_max_rank"] == row["experts_read_mean"]
    assert {(row["batch"], row["ranks"]) for row in document["comparison"]} == {(8, 1), (8, 4)}
    assert "99.9 %" in done.output, "the numbers of llama.cpp's tool"
    text = page.read_text()
    assert "margin against the others" in text
    assert 'src="http' not in text
    assert "href" not in text.split("<svg")[0]
    assert CliRunner().invoke(app, ["bench", "plot", str(out), str(picture)]).exit_code == 0
    assert picture.stat().st_size > 10_000


def test_evaluate_tunes_every_rule_alike(full, tmp_path):
    """All that the artifact allows, repaired and tuned on a second text, the best rows kept."""
    out = tmp_path / "f.json"
    done = run(
        *("evaluate", "--similarity", full, "--data", HELD_OUT, "--tune-data", DATA),
        *("--tune-sequences", "8", "--out", out, "--batches", "8", "--ranks", "1", "--best-only"),
        *("--rules", "sere,topk,xshare,exfold,margin", *SMALL[:2], "--length", "16"),
        *("--prompt", "8", "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    document = load_result(out)
    assert [row["rule"] for row in document["tuned"]] == ["xshare", "exfold", "margin"]
    for row in document["tuned"]:
        assert 10 < row["attempts"] < 50
        knob = "tau" if row["rule"] == "margin" else "experts"
        assert row["settings"][knob]
        assert row["max_kl"] == document["tuned"][0]["max_kl"], "one budget for all"
    tried = document["settings_tried"]
    assert tried["topk"] == 2 * 3, "with and without a repair"
    of_topk = [row["settings"] for row in document["rows"] if row["rule"] == "topk"]
    assert any(settings.get("lda") for settings in of_topk)
    kept = sum(row["rule"] == "sere" for row in document["rows"])
    assert kept < tried["sere"]
    assert {row["at"] for row in document["comparison"]} > {"worst anywhere"}


def test_evaluate_takes_every_rule_that_the_artifact_allows(similarity, full, tmp_path):
    chosen, out = tmp_path / "s.yaml", tmp_path / "f.json"
    chosen.write_text(
        "- {rule: exfold, experts: [9, 12, 9, 12]}\n- {rule: mone, experts: 20}\n"
        "- {rule: ace, tau: 0.2, rcr_scale: 1.0}\n"
        "- {rule: k1k2, select_top_k: 2, normalise_over: 8}\n"
    )
    common = ("evaluate", "--data", HELD_OUT, "--out", out, "--settings", chosen, *SMALL)
    done = run(*common, "--similarity", full, "--batches", "8", "--ranks", "1")
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["rule"] for row in rows] == ["exact", "exfold", "mone", "ace", "k1k2"]
    assert rows[1]["experts_read_mean"] <= 10.5
    assert all(row["experts_read_mean"] < rows[0]["experts_read_mean"] for row in rows[1:])
    assert all(row["kl_mean"] > 0 for row in rows[1:])


def test_evaluate_chosen_settings(similarity, tmp_path):
    chosen, out = tmp_path / "s.yaml", tmp_path / "f.json"
    chosen.write_text("- {rule: xshare, experts: 9}\n- {rule: margin, tau: [0.1, 0, 0.1, 0]}\n")
    done = run(
        *("evaluate", "--similarity", similarity, "--data", HELD_OUT, "--out", out),
        *("--settings", chosen, "--batches", "4", "--ranks", "1"),
        *SMALL,
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["settings"] for row in rows] == [{}, {"experts": 9}, {"tau": [0.1, 0, 0.1, 0]}]


def test_evaluate_appends_other_batch_sizes(similarity, tmp_path, has_words):
    out = tmp_path / "f.json"
    common = ("evaluate", "--similarity", similarity, "--data", HELD_OUT, "--out", out, "--append")
    common += ("--rules", "oea", "--ranks", "1", *SMALL)
    for batch in (4, 8):
        assert run(*common, "--batches", batch).exit_code == 0
    document = load_result(out)
    assert [row["batch"] for row in document["rows"]] == [4] * 4 + [8] * 4
    assert document["command"].count("&&") == 1
    for options, words in ((["8"], ["[8] already"]), (["2", "--sequences", "8"], ["sequences"])):
        done = run(*common, "--batches", *options)
        assert done.exit_code == 2
        has_words(done.output, "--append", *words)
    assert load_result(out) == document


def test_tune_writes_a_policy_that_keeps_its_budget(similarity, tmp_path):
    out, report = tmp_path / "policy.yaml", tmp_path / "report.json"
    done = run(
        *("tune", "--similarity", similarity, "--data", DATA, "--check", HELD_OUT, "--out", out),
        *("--report", report, "--max-kl", "0.1", "--batches", "8", "--rules", "sere,margin"),
        *SMALL,
    )
    assert done.exit_code == 0, done.output
    policy = Policy.parse(yaml.safe_load(out.read_text()))
    assert policy.similarity == similarity
    found = json.loads(report.read_text())
    assert found["policy"] == yaml.safe_load(out.read_text())
    assert {row["rule"] for row in found["tried"]} == {"sere", "margin"}
    (predicted,), (checked,) = found["predicted"], found["checked"]
    assert predicted["kl_mean_95"][1] <= 0.1
    assert predicted["experts_to_exact_95"][1] < 0.95
    assert 0 < checked["kl_mean"] < 0.5
    best = min(row["experts_read_mean"] for row in found["tried"] if row["experts_read_mean"])
    assert predicted["experts_read_mean"] == pytest.approx(best, abs=0.01)
    assert "second text" in done.output


def test_tune_by_the_rows_of_a_step(similarity, tmp_path):
    out, report = tmp_path / "policy.yaml", tmp_path / "report.json"
    common = ("tune", "--similarity", similarity, "--data", DATA, "--check", HELD_OUT, "--out", out)
    common += ("--report", report, "--max-kl", "0.1", "--batches", "16,2", "--rules", "sere")
    done = run(*common, *SMALL)
    assert done.exit_code == 0, done.output
    ranges = json.loads(report.read_text())
    policy = Policy.parse(yaml.safe_load(out.read_text()))
    (entry,) = policy.by_rows
    assert entry.up_to == 2
    smaller, larger = (policy.for_model(top_k=4).for_rows(rows) for rows in (2, 3))
    assert smaller != larger
    assert [row["batch"] for row in ranges["predicted"]] == [16, 2]
    assert all(row["kl_mean_95"][1] <= 0.1 for row in ranges["predicted"])
    assert "up to 2 rows: S=" in done.output
    done = run(*common, *SMALL, "--one-setting")
    assert done.exit_code == 0, done.output
    assert Policy.parse(yaml.safe_load(out.read_text())).by_rows is None
    of_one = json.loads(report.read_text())
    reads = [sum(r["experts_read_mean"] for r in f["predicted"]) for f in (ranges, of_one)]
    assert reads[0] < reads[1]


def test_settings_know_every_rule_and_engines_some_of_them():
    assert set(get_args(Setting.model_fields["rule"].annotation)) == set(RULES) > set(RULE_NAMES)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rules", "sere,oae"], ["--rules: 'oae'", "oea"]),
        (["--tune-rules", "sere,oae"], ["--tune-rules: 'oae'", "oea"]),
        (["--batches", "0"], ["--batches = '0'"]),
        (["--ranks", "9"], ["--ranks = '9'"]),
        (["--sequences", "20", "--batches", "16"], ["--sequences = 20", "multiple", "16"]),
        (["--batches", "3,8"], ["--sequences", "3, 8"]),
        (["--length", "64", "--prompt", "63"], ["--prompt = 63", "1..62"]),
        (["--data", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        (["--text-column", "body"], ["no column 'body'", "'text'"]),
        (["--sequences", "4096", "--length", "512"], ["windows of up to 512", "4096"]),
        (["--sequences", "104", "--length", "512"], ["heldout.jsonl", "whole windows", "104"]),
        (["--similarity", "nowhere.safetensors"], ["nowhere.safetensors", "calibrate"]),
        (["--settings", "nowhere.yaml"], ["--settings = nowhere.yaml"]),
        (
            ["--rules", "sere,exfold"],
            ["'exfold'", "stand_in_loss", "sere-ray calibrate", "--statistics stand_ins"],
        ),
        (["--tune-data", DATA, "--tune-sequences", "12"], ["--tune-sequences = 12", "(8)"]),
        (["--tune-data", "missing.jsonl"], ["missing.jsonl", "no such file"]),
    ],
)
def test_evaluate_refuses(similarity, tmp_path, has_words, options, words):
    out = tmp_path / "f.json"
    done = run(
        *("evaluate", "--similarity", similarity, "--data", HELD_OUT, "--out", out),
        *("--batches", "8", *SMALL, *options),
    )
    assert done.exit_code == 2
    assert not out.exists()
    assert "Traceback" not in done.output
    has_words(" ".join(done.output.split()), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rule: oea", ["must be a list"]),
        ("- {rule: oea, tau: 0.1}", ["[0].select_top_k is missing"]),
        ("- {rule: margin, tau: [0.1, 0.2]}", ["2 numbers", "4 MoE layers"]),
        ("- {rule: oea, select_top_k: 5}", ["select_top_k = 5", "K = 4"]),
        ("- {rule: xshare, experts: [9, 9]}", ["experts = [9, 9]", "2 numbers", "4 MoE layers"]),
        ("- {rule: xshare, experts: [9, 0]}", ["experts = [9, 0]", "above 0"]),
        ("- {rule: topk, select_top_k: 2, lda: true}", ["lda = True", "--tune-data"]),
        ("- {rule: k1k2, select_top_k: 2}", ["normalise_over is missing"]),
        ("- {rule: mone, experts: 9}", ["'mone'", "--statistics novices"]),
    ],
)
def test_evaluate_refuses_settings(similarity, tmp_path, has_words, content, words):
    chosen = tmp_path / "s.yaml"
    chosen.write_text(content)
    done = run(
        *("evaluate", "--similarity", similarity, "--data", HELD_OUT, "--out", tmp_path / "f"),
        *("--settings", chosen, "--batches", "8", *SMALL),
    )
    assert done.exit_code == 2
    has_words(" ".join(done.output.split()), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--max-kl, --min-agreement: give one"]),
        (["--max-kl", "0"], ["--max-kl = 0"]),
        (["--min-agreement", "1.5"], ["--min-agreement = 1.5"]),
        (["--max-kl", "0.1", "--min-agreement", "0.9"], ["give one of the two"]),
        (
            ["--max-kl", "0.1", "--batches", ",".join(map(str, range(1, 19)))],
            ["--batches: 18 sizes", "at most 16 entries", "--one-setting"],
        ),
        (["--min-agreement", "0.9999", "--rules", "sere"], ["no setting of sere", "allow more"]),
        (["--rules", "sere,oea"], ["--rules: 'oea'", "`sere-ray evaluate` only"]),
    ],
)
def test_tune_refuses(similarity, tmp_path, has_words, options, words):
    out = tmp_path / "policy.yaml"
    done = run(
        *("tune", "--similarity", similarity, "--data", DATA, "--check", HELD_OUT, "--out", out),
        *("--batches", "8", *SMALL, *options),
    )
    assert done.exit_code == 2
    assert not out.exists()
    has_words(" ".join(done.output.split()), *words)
