"""The command line: help to live on, one-line errors, exit code 2, nothing half-written."""

import json
import re
import socket
import sys
import threading

import pytest
import torch
import typer
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.cli.main import app
from sere_ray.serve.gateway.keys import KeyFile, digest
from sere_ray.util.files import file_sha256
from tests.commands import every_command
from tests.models import build_checkpoint

run = CliRunner().invoke


@pytest.fixture
def artifact(tmp_path):
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).fill_diagonal_(1.0)
    metadata = ArtifactMetadata(
        model_id="tiny",
        architecture="Qwen3MoeForCausalLM",
        num_experts=8,
        top_k=2,
        metric="frobenius",
        tokens=1000,
        date="2026-11-22",
    )
    path = tmp_path / "tiny.safetensors"
    SimilarityArtifact({0: matrix, 1: matrix.T.contiguous()}, metadata).save(path)
    return path


def test_help_shows_the_first_steps():
    result = run(app, ["--help"])
    assert result.exit_code == 0
    for word in ("sere-ray demo", "sere-ray calibrate", "--additional-config", "select_top_k"):
        assert word in result.output


def test_help_shows_a_newcomer_the_way_first():
    output = run(app, ["--help"]).output
    panels = re.findall(r"─ ([A-Z][\w ,]+) ─", output)
    assert panels == [
        "Options",
        "First steps, in this order",
        "A running deployment",
        "Measure",
        "Watch",
    ]
    shown = re.findall(r"^│ ([a-z][a-z-]+) ", output, re.MULTILINE)
    assert shown[:6] == ["demo", "calibrate", "tune", "advise", "serve", "examples"]
    assert set(shown) == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", list(every_command()), ids=" ".join)
def test_every_command_has_an_example(command):
    result = run(app, [*command, "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    names = {"sweep": "ab"}  # one command under two names
    words = " ".join(names.get(word, word) for word in command)
    assert re.search(rf"Example: (\w+=\S+ )?sere-ray {words}\b", text)


def test_version():
    from sere_ray import __version__

    assert run(app, ["--version"]).output.strip() == __version__


@pytest.mark.parametrize("command", ["run", "ab", "soak"])
def test_a_load_test_without_its_packages_says_how_to_get_them(monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "gevent", None)  # as if it were not there
    options = ["--pid", "1"] if command == "soak" else []
    result = run(app, ["loadtest", command, "--out", str(tmp_path / "x.json"), *options])
    assert result.exit_code == 2
    assert "'sere-ray[loadtest]'" in result.output


def test_other_systems_are_told_at_once(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    result = run(app, ["demo"])
    assert result.exit_code == 2
    assert "container or WSL2" in result.output


def test_inspect_prints_and_draws(artifact):
    result = run(app, ["artifact", "inspect", str(artifact)], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for word in ("tiny", "Qwen3MoeForCausalLM", "frobenius", "sha256", "median"):
        assert word in result.output
    picture = artifact.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_synthetic(tmp_path):
    config = assets.MODEL / "config.json"
    out = tmp_path / "random.safetensors"
    result = run(app, ["artifact", "synthetic", "--config", str(config), "--out", str(out)])
    assert result.exit_code == 0
    loaded = SimilarityArtifact.load(out)
    assert loaded.metadata.synthetic
    assert sorted(loaded.layers) == [0, 1, 2, 3]
    assert loaded.metadata.num_experts == 48


def test_import_of_the_published_format(tmp_path):
    model = build_checkpoint("qwen3_moe", tmp_path / "model")
    torch.save({i: torch.rand(16, 16) for i in range(4)}, tmp_path / "similarity_matrices.pt")
    out = tmp_path / "imported.safetensors"
    arguments = [str(tmp_path / "similarity_matrices.pt"), "--model", str(model), "--out", str(out)]
    result = run(app, ["artifact", "import", *arguments])
    assert result.exit_code == 0, result.output
    loaded = SimilarityArtifact.load(out)
    assert sorted(loaded.layers) == [0, 1, 2, 3]
    assert sorted(loaded.metadata.router_fingerprint) == [0, 1, 2, 3]


def test_calibrate_writes_an_artifact(tmp_path):
    out = tmp_path / "demo.safetensors"
    options = ["--data", str(assets.CALIBRATION), "--out", str(out), "--sequences", "4"]
    result = run(app, ["calibrate", str(assets.MODEL), *options, "--length", "32"])
    assert result.exit_code == 0, result.output
    assert SimilarityArtifact.load(out).metadata.tokens == 128
    assert f"sha256 {file_sha256(out)}" in result.output


@pytest.mark.parametrize("name", ["team-a", "123", "no", "1e3"])
def test_the_line_of_a_key_is_one_of_a_key_file(tmp_path, name):
    result = run(app, ["key", name])
    value, line = (text for text in result.stdout.splitlines() if "sk-sere-" in text or "{" in text)
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{line}\n")
    (key,) = KeyFile.load(path).keys
    assert (key.name, key.sha256) == (name, digest(value.strip()))


@pytest.mark.parametrize("name", ["team a", "alice@example.com", "", "a" * 65, "a\n"])
def test_a_name_that_no_key_file_takes_is_refused(name):
    result = run(app, ["key", name])
    assert_refused(result, ["NAME", repr(name), "letters"])
    assert "sk-sere-" not in result.output


@pytest.mark.parametrize("pair", ["tau=[0.1", "threshold=: :"])
def test_a_value_that_is_not_yaml(pair):
    assert_refused(run(app, ["policy", "set", pair]), [pair, "YAML"])


def test_a_token_is_never_printed(monkeypatch):
    monkeypatch.setenv("SERE_ADMIN_TOKEN", "xyzzy\nplugh")
    result = run(app, ["policy", "get", "--url", "http://127.0.0.1:9"])
    assert_refused(result, ["SERE_ADMIN_TOKEN", "set it anew"])
    assert "xyzzy" not in result.output
    assert "plugh" not in result.output


def test_a_server_that_hangs_up(monkeypatch):
    monkeypatch.setenv("SERE_ADMIN_TOKEN", "with-a-newline\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            connection, _ = listener.accept()
            assert b"Bearer with-a-newline\r\n" in connection.recv(10_000)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = run(app, ["policy", "get", "--url", url])
        thread.join()
    assert_refused(result, [url, "is the deployment up"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "2"], ["--workers", "add it"]),
        (["--ray", "--layer-streamed"], ["--layer-streamed", "leave out --ray"]),
        (["--publish", "http://127.0.0.1:9"], ["127.0.0.1:9", "is the deployment up"]),
    ],
)
def test_calibrate_options_that_do_not_go_together(tmp_path, options, words):
    command = ["calibrate", str(assets.MODEL), "--data", str(assets.CALIBRATION)]
    assert_refused(run(app, [*command, "--out", str(tmp_path / "a"), *options]), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ["no-such-data"]),
        (b"", ["no text"]),
        (json.dumps({"body": "words"}).encode(), ["text", "body"]),
    ],
)
def test_bad_data_is_one_line_exit_2_and_leaves_nothing(tmp_path, data, words):
    path = tmp_path / "data.jsonl"
    if data is None:
        path = tmp_path / "no-such-data.jsonl"
    else:
        path.write_bytes(data)
    out = tmp_path / "out.safetensors"
    before = set(tmp_path.iterdir())
    result = run(app, ["calibrate", str(assets.MODEL), "--data", str(path), "--out", str(out)])
    assert_refused(result, [path.name, *words])
    assert set(tmp_path.iterdir()) == before


def damage(path, kind):
    """Rewrite a sound artifact as one that must be refused."""
    from safetensors.torch import load_file, save_file

    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle":
        torch.save({0: torch.eye(8)}, path)
    elif kind == "missing":
        path.unlink()
    else:
        tensors = load_file(path)
        metadata = SimilarityArtifact.load(path).metadata
        if kind == "NaN":
            tensors["layers.1.similarity"][0, 1] = float("nan")
        if kind == "size":
            tensors["layers.1.similarity"] = torch.eye(7)
        if kind == "newer":
            metadata = metadata.model_copy(update={"format_version": 3})
        save_file(tensors, path, metadata={"sere_ray": metadata.model_dump_json()})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ["not a readable safetensors file"]),
        ("pickle", ["pickle files are never loaded", "sere-ray artifact import"]),
        ("NaN", ["layer 1", "NaN"]),
        ("size", ["layer 1", "(7, 7)", "(8, 8)"]),
        ("newer", ["format_version = 3", "update sere-ray"]),
        ("missing", ["no such file", "sere-ray calibrate"]),
    ],
)
def test_bad_artifacts_are_one_line_exit_2_and_leave_nothing(artifact, kind, words):
    damage(artifact, kind)
    before = set(artifact.parent.iterdir())
    assert_refused(run(app, ["artifact", "inspect", str(artifact)]), [artifact.name, *words])
    assert set(artifact.parent.iterdir()) == before


def test_missing_folder_for_the_output(tmp_path):
    out = tmp_path / "nowhere" / "out.safetensors"
    data = ["--data", str(assets.CALIBRATION), "--out", str(out)]
    assert_refused(run(app, ["calibrate", str(assets.MODEL), *data]), ["nowhere"])


def test_a_taken_port(monkeypatch):
    import socket

    from sere_ray.demo import run as demo

    monkeypatch.setattr(demo, "_installed", lambda module: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(run(app, ["demo", "--port", str(port)]), [f"port = {port}", "--port"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--router", "uneven"], ["--router", "'uneven'", "uniform, skewed"]),
        (["--arms", "S=7", "--model", "demo"], ["--arms", "'S=7'", "S=4, S=2, S=1"]),
        (["--batches", "0,x"], ["--batches"]),
    ],
)
def test_bench_refuses_before_it_starts(tmp_path, options, words):
    out = tmp_path / "out.json"
    assert_refused(run(app, ["bench", "step-time", "--out", str(out), *options]), words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "2,9"], ["--ranks", "2,9"]),
        (["--ranks", "8"], ["--rows-per-rank = 8", "8 ranks need 64", "there are 32"]),
        (["--similarity", "/nowhere/a.safetensors"], ["/nowhere/a.safetensors"]),
    ],
)
def test_bench_dispatch_refuses_before_it_starts(tmp_path, options, words):
    out = tmp_path / "out.json"
    assert_refused(run(app, ["bench", "dispatch", "--out", str(out), *options]), words)
    assert not out.exists()


def test_bench_plot_of_no_result(tmp_path):
    arguments = [str(tmp_path / "none.json"), str(tmp_path / "picture.png")]
    assert_refused(run(app, ["bench", "plot", *arguments]), ["none.json"])


def assert_refused(result, words):
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
