"""What `make install` asks of which index; an index that does not answer is an error, and soon."""

import importlib.util
import socket
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "constraints" / "install_cpu.py"
spec = importlib.util.spec_from_file_location("install_cpu", SCRIPT)
install_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install_cpu)
PINS = [line for line in install_cpu.PINS.read_text().splitlines() if not line.startswith("#")]
TORCH = next(pin for pin in PINS if pin.startswith("torch=="))


class Pip:
    """Knows versions by index, keeps the packages that it installs."""

    def __init__(self, **versions):
        self.versions, self.installed = versions, []

    def __call__(self, command, *arguments, seconds=None):
        index = "torch" if "--index-url" in arguments else "own"
        if command == "index":
            assert seconds <= 50
            return self._answer(self.versions[index].get(arguments[1], ""))
        if "-r" in arguments:
            wanted = Path(arguments[-1]).read_text().splitlines()
        else:
            wanted = [arguments[-1]]
        self.installed += [(index, pin) for pin in wanted]
        return subprocess.CompletedProcess([], 0, "", "")

    def _answer(self, versions):
        text = f"Available versions: {versions}\n" if versions else ""
        return subprocess.CompletedProcess([], int(not versions), text, "ERROR: no such\n")


PIP = next(pin for pin in PINS if pin.startswith("pip==")).removeprefix("pip==")
WITH_CPU, WITHOUT = f"9.9, {TORCH.removeprefix('torch==')}, 2.13.0", "9.9, 2.13.0"


@pytest.mark.parametrize(
    ("choice", "own", "there", "index"),
    [
        ("auto", WITHOUT, WITH_CPU, "torch"),
        ("auto", WITH_CPU, "", "own"),
        ("", WITHOUT, "", "own"),
        ("https://mirror.example", WITH_CPU, WITH_CPU, "torch"),
    ],
)
def test_torch_alone_comes_from_its_index(choice, own, there, index):
    pip = Pip(own={"pip": PIP, "torch": own}, torch={"torch": there})
    install_cpu.install(choice, pip)
    assert [found for found, pin in pip.installed if pin == TORCH] == [index]
    assert {found for found, pin in pip.installed if pin != TORCH} == {"own"}
    assert sorted(pin for _, pin in pip.installed) == sorted(PINS)


@pytest.mark.parametrize(
    ("own", "torch", "words"),
    [
        ({}, {}, ("pip's index", "PIP_INDEX_URL")),
        ({"pip": PIP}, {}, (install_cpu.PYTORCH, TORCH, "TORCH_INDEX", "no such")),
        ({"pip": PIP}, {"torch": WITHOUT}, (install_cpu.PYTORCH, TORCH, "for Python 3.")),
    ],
)
def test_an_index_without_the_build_is_named_before_anything_is_installed(
    monkeypatch, has_words, own, torch, words
):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    pip = Pip(own=own, torch=torch)
    with pytest.raises(SystemExit) as caught:
        install_cpu.install("auto", pip)
    has_words(str(caught.value), "error:", *words)
    assert pip.installed == []


def test_an_index_that_does_not_answer_is_left_in_time(monkeypatch):
    monkeypatch.setattr(install_cpu, "SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        found, words = install_cpu.has(TORCH, ["--index-url", url], install_cpu.pip)
    assert not found
    assert words == "no answer within 2 s"
    assert time.monotonic() - start < 15
