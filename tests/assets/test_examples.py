"""Examples for an installation without a clone: listed, copied, and running from the copy."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.assets.examples import copy_examples, example_files
from sere_ray.cli.main import app
from sere_ray.util.errors import SereError

ROOT = Path(__file__).parents[2]


def run(*words):
    return CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})


def test_they_are_the_files_of_the_repository():
    files = [*(ROOT / "constraints").glob("*.txt"), *(ROOT / "deploy").glob("*.yaml")]
    assert {str(path.relative_to(ROOT)) for path in files} == set(example_files())


def test_the_list_says_what_each_is():
    result = run("examples")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines() if "/" in line)
    assert {*example_files(), "demo/model", "demo/data"} <= set(lines)
    assert "all experts" in lines["deploy/one-gpu.yaml"]
    assert str(assets.MODEL) in lines["demo/model"]


def test_a_copy_names_the_copied_model(tmp_path):
    result = run("examples", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0
    copies = sorted((tmp_path / "new" / "deploy").glob("*.yaml"))
    assert [path.name for path in copies] == [p.name for p in sorted(ROOT.glob("deploy/*.yaml"))]
    models = {
        application["args"]["model"]
        for path in copies
        for application in yaml.safe_load(path.read_text())["applications"]
    }
    assert models == {"demo/model", "./model"}
    assert not [path for path in copies if "sere_ray/assets" in path.read_text()]
    assert sorted(p.name for p in (tmp_path / "new" / "demo" / "model").iterdir()) == sorted(
        p.name for p in assets.MODEL.iterdir()
    )
    for name in ("cpu.txt", "gpu.txt", "gpu-033.txt"):
        copy = tmp_path / "new" / "constraints" / name
        assert copy.read_bytes() == (ROOT / "constraints" / name).read_bytes()


def test_the_copied_model_is_calibrated_by_the_command_in_the_copied_file(tmp_path, monkeypatch):
    copy_examples(tmp_path)
    text = (tmp_path / "deploy" / "demo-cpu.yaml").read_text()
    (command,) = (line.split()[1:] for line in text.splitlines() if "sere-ray calibrate" in line)
    monkeypatch.chdir(tmp_path)
    result = run(*command[1:], "--sequences", "4", "--length", "32")
    assert result.exit_code == 0, result.output
    from sere_ray.serve.deployment_file import load_file

    load_file(tmp_path / "deploy" / "demo-cpu.yaml")


@pytest.mark.parametrize("taken", ["deploy/one-gpu.yaml", "demo", "constraints/cpu.txt"])
def test_what_is_there_is_not_overwritten(tmp_path, taken, has_words):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = run("examples", "--out", str(tmp_path))
    assert result.exit_code == 2
    has_words(result.output, str(tmp_path / taken), "not overwritten", "--out")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / taken).read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path, has_words):
    (tmp_path / "file").write_text("")
    with pytest.raises(SereError) as caught:
        copy_examples(tmp_path / "file" / "below")
    has_words(str(caught.value), str(tmp_path / "file" / "below"), "cannot be written")


def test_an_installation_without_them_says_so(tmp_path, monkeypatch, has_words):
    monkeypatch.setattr("sere_ray.assets.examples._PACKAGE", tmp_path / "sere_ray")
    with pytest.raises(SereError) as caught:
        example_files()
    has_words(str(caught.value), str(tmp_path), "reinstall")


def test_an_unpacked_wheel_has_the_same(tmp_path, wheel_path):
    """The wheel's own package runs, not the clone; what it depends on is borrowed."""
    zipfile.ZipFile(wheel_path).extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import json; from pathlib import Path\n"
        "from sere_ray.assets.examples import copy_examples, example_files\n"
        "copy_examples(Path('out'))\n"
        "print(json.dumps({name: str(path) for name, path in example_files().items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(example_files())
    assert all(path.startswith(str(tmp_path / "site")) for path in found.values())
    copy_examples(tmp_path / "here")
    assert names(tmp_path / "here") == names(tmp_path / "out")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
