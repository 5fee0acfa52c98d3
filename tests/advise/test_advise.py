"""`sere-ray advise`: a small run on the demo model, going on, bad input, times from a curve."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.advise import advise as flow
from sere_ray.advise.advise import strongest
from sere_ray.advise.step_curve import read_curve
from sere_ray.cli.main import app
from sere_ray.policy.policy import Policy
from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result

HELD_OUT = str(assets.CALIBRATION.with_name("heldout.jsonl"))
SMALL = ["--batch", "8", "--sequences", "16", "--calibration-sequences", "16"]
SMALL += ["--tasks", "copying", "--most-items", "200", "--device", "cpu"]


def run(out, *options, data=HELD_OUT):
    chosen = ["advise", str(assets.MODEL), "--data", data, "--out", str(out), *SMALL, *options]
    return CliRunner().invoke(app, chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("advice")
    done = run(out, "--loss", "60%")
    assert done.exit_code == 0, done.output
    return out


def test_what_it_writes_can_be_served(folder):
    document = load_result(folder / "advise.json")
    chosen = document["rows"][-1]
    assert [row["loss"] for row in document["rows"]] == [0.005, 0.01, 0.03, 0.6]
    policy = yaml.safe_load((folder / "policy.yaml").read_text())
    assert Policy.parse(policy).rule == chosen["rule"]
    assert {"rule": chosen["rule"], **chosen["settings"]}.items() <= policy.items()
    served = yaml.safe_load((folder / "serve.yaml").read_text())["applications"][0]["args"]
    assert served["sere"] == str(folder / "policy.yaml")
    page = (folder / "advice.html").read_text()
    assert f"Switch on {chosen['rule']}: {chosen['experts_share']:.0%} of the experts" in page
    assert "not measured" in page


def test_the_choice_follows_from_what_was_asked(folder):
    document = load_result(folder / "advise.json")
    reads = [row["experts_read_mean"] for row in document["compared"]]
    kl = [row["kl_mean"] for row in document["compared"]]
    assert reads == sorted(reads)
    assert kl == sorted(kl, reverse=True)
    asked = {str(row["settings"]): row for row in document["asked"]}
    assert len(asked) == len(document["asked"]) == len(reads)  # one task
    of_reads = [asked[str(row["settings"])] for row in document["compared"]]
    keeps = [row for row in of_reads if row["relative_loss_95"][1] <= 0.6]
    assert len({row["items"] for row in keeps}) == 1, "all were asked the same"
    chosen = document["rows"][-1]
    assert chosen["settings"] == keeps[0]["settings"]
    assert chosen["task_loss"] == keeps[0]["relative_loss"]
    assert chosen["checked_loss"] != chosen["task_loss"], "the second text is another one"


def test_a_run_goes_on_where_it_was_cut_off(folder, monkeypatch):
    """Nothing is measured again; another question is."""
    before = load_result(folder / "advise.json")["rows"]

    def fail(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(flow, "Evaluator", fail)
    monkeypatch.setattr(flow, "calibrate", fail)
    assert run(folder, "--loss", "60%").exit_code == 0
    assert load_result(folder / "advise.json")["rows"] == before
    (folder / "steps" / "choose-copying.json").write_text('{"key"')  # no whole file
    assert "measured again" in str(run(folder, "--loss", "60%").exception)


def test_an_artifact_that_is_gone_is_made_anew(folder):
    before = load_result(folder / "advise.json")["rows"]
    (folder / "similarity.safetensors").unlink()
    assert run(folder, "--loss", "60%").exit_code == 0
    assert (folder / "similarity.safetensors").exists()
    assert load_result(folder / "advise.json")["rows"] == before


def test_where_nothing_keeps_the_loss_there_is_a_page_and_no_policy(tmp_path, has_words):
    done = run(tmp_path, "--loss", "0.2%", "--rules", "sere,margin")
    assert done.exit_code == 2
    has_words(" ".join(done.output.split()), "--loss = 0.2%", "advice.html", "more text")
    assert "No setting was shown to keep 0.2%" in (tmp_path / "advice.html").read_text()
    assert not (tmp_path / "policy.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "0"], ["--loss = 0", "0.1%"]),
        (["--loss", "much"], ["--loss = 'much'", "1%"]),
        (["--rules", "lynx"], ["'lynx'", "sere-ray evaluate"]),
        (["--tasks", "cloze,chess"], ["'chess'", "cloze"]),
        (["--sequences", "12"], ["--sequences = 12", "--batch = 8"]),
        (["--step-times", "nowhere.json"], ["nowhere.json"]),
        (["--check", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    ],
)
def test_refuses(tmp_path, has_words, options, words):
    done = run(tmp_path, *options)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    has_words(" ".join(done.output.split()), *words)


def test_one_document_cannot_be_cut_in_two(tmp_path, has_words):
    (tmp_path / "one.txt").write_text("word " * 5000)
    done = run(tmp_path / "out", data=str(tmp_path / "one.txt"))
    assert done.exit_code == 2
    has_words(" ".join(done.output.split()), "one.txt", "--check")


def asked(settings, low, high):
    return {
        **{"rule": "margin", "settings": settings, "batch": 8, "task": "cloze"},
        **{"items": 9, "items_needed": 9, "relative_loss": low, "relative_loss_95": [low, high]},
    }


def test_the_first_setting_that_keeps_the_loss_is_taken():
    compared = [{"rule": "margin", "settings": {"tau": tau}} for tau in (0.3, 0.2, 0.1)]
    rows = [asked({"tau": tau}, 0.0, end) for tau, end in ((0.3, 0.05), (0.2, 0.02), (0.1, 0.001))]
    assert strongest(compared, rows, 0.03)["settings"] == {"tau": 0.2}
    assert strongest(compared, rows, 0.0001) is None
    rows.append({**asked({"tau": 0.2}, 0.0, 0.04), "task": "copying"})
    assert strongest(compared, rows, 0.03)["settings"] == {"tau": 0.1}


def test_speed_from_a_curve(tmp_path, has_words):
    """2 ms and 0.1 ms an expert: exact steps read 80."""
    rows = [
        {"model": "m", "router": "skewed", "batch": batch, "mode": "on", "arm": f"{reads}"}
        | {"experts_read": reads, "step_ms": (2 + 0.1 * reads) * (1 if batch == 16 else 9)}
        for batch in (16, 64)
        for reads in (80, 40, 20)
    ]
    rows.append({**rows[0], "arm": "stock", "mode": None, "step_ms": 99.0})
    path = tmp_path / "steps.json"
    origin = {"command": "x", "machine": {"gpu": "X"}}
    path.write_text(json.dumps({**origin, "rows": rows}))
    curve = read_curve(path, 12)
    assert (curve.batch, curve.gpu) == (16, "X")
    assert curve.speedup(0.5) == pytest.approx(10 / 6)
    assert curve.speedup(1.0) == pytest.approx(1.0)
    path.write_text(json.dumps({**origin, "rows": rows[:2]}))
    with pytest.raises(SereError) as caught:
        read_curve(path, 16)
    has_words(str(caught.value), "steps.json", "fewer than 3", "--arms")
