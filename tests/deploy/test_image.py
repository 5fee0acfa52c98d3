"""The image: its Dockerfile by structure, its install steps and its health check by running them.

No image can be built where this is tested.
"""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sere_ray import __version__
from sere_ray.util.ports import free_port
from tests.k8s.schemas import pod_templates

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def instructions():
    """``(name, arguments)`` of the Dockerfile, continuation lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def arguments(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def install(*words):
    command = [str(DEPLOY / "install.sh"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_stages_start_from_one_pinned_base():
    (base,) = (rest for rest in arguments("ARG") if rest.startswith("PYTHON="))
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-[a-z]+", base)
    assert {rest.split()[0] for rest in arguments("FROM")} == {"${PYTHON}"}
    assert "latest" not in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"].startswith(">=3.11")


def test_the_comment_builds_the_tags_of_the_manifests():
    assert re.findall(r"-t sere-ray:(\S+)", DOCKERFILE) == [__version__, f"{__version__}-cpu"]


def test_the_final_stage_is_not_root_and_checks_its_health():
    assert arguments("USER") == ["1000:1000"]
    after = instructions()[[name for name, _ in instructions()].index("USER") :]
    runs = [rest for name, rest in after if name in ("RUN", "COPY", "ADD")]
    assert runs == ["/usr/local/lib/sere/deploy/install.sh check /opt/sere/venv /opt/sere/demo"]
    assert "useradd --uid 1000" in DOCKERFILE
    (check,) = arguments("HEALTHCHECK")
    assert check.endswith('CMD ["sere-health"]')
    assert "deploy/healthcheck.sh /usr/local/bin/sere-health" in arguments("COPY")


def test_the_user_is_that_of_the_manifests():
    import yaml

    for file in ("service/rayservice.yaml", "calibration/rayjob.yaml"):
        document = yaml.safe_load((ROOT / "k8s" / "base" / file).read_text())
        for template in pod_templates(document):
            assert template["spec"]["securityContext"]["runAsUser"] == 1000


def test_nothing_is_downloaded_at_run_time_and_nothing_reported():
    environment = dict(re.findall(r"(\w+)=(\S+)", arguments("ENV")[0]))
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["PATH"].startswith("/opt/sere/venv/bin:")
    # a login shell, as KubeRay before 1.4 starts, sets PATH anew
    assert "export PATH=/opt/sere/venv/bin:$PATH" in DOCKERFILE


def copied():
    for rest in arguments("COPY"):
        if not rest.startswith("--from="):
            yield from rest.split()[:-1]


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    for path in copied():
        assert list(ROOT.glob(path)), path
        assert any(fnmatch.fnmatch(path, p) or p.startswith(path + "/") for p in sent), path
    for pattern in sent:
        assert list(ROOT.glob(pattern)), pattern
        assert any(pattern == path or pattern.startswith(path + "/") for path in copied()), pattern


def test_the_builder_is_sent_all_that_the_wheel_holds(tmp_path, wheel_path):
    """The stage `wheel` has only what its COPY lines name of what the ignore file lets through."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {path for line in lines if line.startswith("!") for path in ROOT.glob(line[1:])}
    stage = DOCKERFILE.split("FROM ")[1]
    for rest in re.findall(r"^COPY (.*)", stage, re.MULTILINE):
        *sources, target = rest.split()
        for source in (path for pattern in sources for path in ROOT.glob(pattern)):
            for path in [source, *source.rglob("*")]:
                is_sent = path in sent or any(parent in sent for parent in path.parents)
                if path.is_file() and is_sent and "__pycache__" not in path.parts:
                    inside = path.relative_to(source) if source.is_dir() else path.name
                    copy = tmp_path / "src" / target / inside
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, copy)
    script = tmp_path / "src" / "deploy" / "install.sh"
    subprocess.run(
        [script, "wheel", sys.executable, tmp_path / "wheels"], check=True, capture_output=True
    )
    (built,) = (tmp_path / "wheels").iterdir()
    assert sorted(ZipFile(built).namelist()) == sorted(ZipFile(wheel_path).namelist())


def test_install_steps_are_those_of_the_script():
    used = set(re.findall(r"install\.sh ([a-z-]+)", " ".join(arguments("RUN"))))
    defined = set(re.findall(r"^([a-z-]+)\(\) ", (DEPLOY / "install.sh").read_text(), re.M))
    assert used == {"build-tools", "wheel", "stack", "package", "system", "check"}
    assert used <= defined
    assert "pip" not in " ".join(arguments("RUN"))


def test_no_caches_stay():
    script = (DEPLOY / "install.sh").read_text()
    installs = re.findall(r"(pip\"? install .*)", script)
    assert len(installs) == 7
    assert all("--no-cache-dir" in line for line in installs)
    assert "--no-install-recommends" in script
    assert "rm -rf /var/lib/apt/lists/*" in script


def closure(extra):
    """Names of what this package with an extra requires here, directly or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"][extra]
    todo, done = [Requirement(line) for line in lines], set()
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if key in done:
            continue
        done.add(key)
        try:
            needed = distribution(requirement.name).requires or []
        except PackageNotFoundError:  # torchvision and the like: left out on CPUs, see Makefile
            continue
        for line in needed:
            part = Requirement(line)
            extras = ["", *requirement.extras]
            if part.marker is None or any(part.marker.evaluate({"extra": e}) for e in extras):
                todo.append(part)
    return {name for name, _ in done}


def test_the_cpu_image_has_the_pins_of_what_it_runs_and_no_others():
    pins = [line for line in install("pins").stdout.splitlines() if "==" in line]
    every = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    assert set(pins) <= set(every)
    installed = {canonicalize_name(line.split("==")[0]) for line in pins}
    pinned = {canonicalize_name(line.split("==")[0]) for line in every if "==" in line}
    assert installed == pinned & closure("cpu")


def test_the_gpu_image_takes_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = install("requirements", "gpu").stdout.splitlines()
    assert lines == project["dependencies"] + project["optional-dependencies"]["gpu"]


def test_an_unknown_variant_is_refused(tmp_path, has_words):
    done = install("stack", "tpu", tmp_path / "venv")
    assert done.returncode == 2
    has_words(done.stderr, "VARIANT = tpu", "cpu or gpu")
    assert not (tmp_path / "venv").exists()


def test_the_package_is_installed_and_runs_in_a_clean_environment(tmp_path):
    """The steps `wheel`, `package` and `check`; the stack itself is borrowed from this one."""
    done = install("wheel", sys.executable, tmp_path / "wheels")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    done = install("package", folder, wheel, tmp_path / "demo")
    assert done.returncode == 0, done.stderr

    (site,) = folder.glob("lib/python*/site-packages")
    stack = next(path for path in sys.path if (Path(path) / "ray").is_dir())
    (site / "stack.pth").write_text(stack + "\n")
    (folder / "bin" / "ray").symlink_to(Path(sys.executable).parent / "ray")
    program = "import sere_ray; print(sere_ray.__file__)"
    where = subprocess.run(
        [folder / "bin" / "python", "-c", program],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    done = subprocess.run(
        [DEPLOY / "install.sh", "check", folder, tmp_path / "demo"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout


def test_the_health_check_fails_where_nothing_answers():
    if shutil.which("wget") is None:
        pytest.skip("the health check calls wget: apt install wget")
    command = [str(DEPLOY / "healthcheck.sh"), str(free_port())]
    assert subprocess.run(command, timeout=20, check=False).returncode != 0
