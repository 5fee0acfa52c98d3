"""The demo, step by step: calibrate, score quality, serve, send traffic, report."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sere_ray import assets
from sere_ray.calibration import calibrate
from sere_ray.demo.measure import Run, measure_quality, measure_runs, policies
from sere_ray.demo.report import print_table, write_html
from sere_ray.demo.serving import HOST, MODEL_ID, RANKS, served
from sere_ray.serve.run import wait_for_signal
from sere_ray.util.errors import SereError
from sere_ray.util.ports import check_free
from sere_ray.util.progress import progress
from sere_ray.util.results import write_result


def run_demo(
    *,
    json: Path | None,
    html: Path | None,
    keep: bool,
    port: int,
    concurrencies: Sequence[int],
    problems: int,
    eager: bool,
    console: Console,
) -> list[Run]:
    """Serve the demo model on CPU and compare policies; see ``sere-ray demo --help``.

    Raises:
        SereError: the port is taken, or a package of the extra ``cpu`` is missing.
    """
    compiled = check_machine(port, console) and not eager
    with tempfile.TemporaryDirectory(prefix="sere-demo-") as folder:
        similarity = Path(folder) / "demo.safetensors"
        console.print("[bold]1. calibrate[/]: how alike are the demo model's experts?")
        artifact = calibrate(
            str(assets.MODEL), data=str(assets.CALIBRATION), out=similarity, console=console
        )
        settings = policies(str(similarity))
        points = len(settings) * len(concurrencies)

        console.print("[bold]2. quality[/]: held-out text, exact model against re-routed")
        with progress(console, points, task="   teacher-forced", unit="settings") as advance:
            quality = measure_quality(settings, concurrencies, artifact, lambda: advance(1))

        console.print(
            f"[bold]3. serve[/]: Ray Serve and vLLM on CPU, {RANKS} ranks that share the experts, "
            "one to two minutes"
        )
        start = time.perf_counter()
        with served(
            settings[0],
            port,
            max_streams=max(concurrencies),
            compiled=compiled,
            console=console,
        ) as deployment:
            console.print(f"   up after {time.perf_counter() - start:.0f} s")
            console.print("[bold]4. traffic[/]: arithmetic through the endpoint")
            with progress(console, points, task="   requests", unit="settings") as advance:
                runs = measure_runs(
                    settings,
                    concurrencies,
                    problems,
                    quality,
                    deployment,
                    f"http://{HOST}:{port}/v1",
                    MODEL_ID,
                    lambda: advance(1),
                )
            print_table(runs, console)
            if json:
                write_result(json, {"model": "demo", "runs": [vars(run) for run in runs]})
                console.print(f"wrote {json}")
            if html:
                write_html(runs, html)
                console.print(f"wrote {html}")
            if keep:
                _wait(port, console)
    return runs


def check_machine(port: int, console: Console) -> bool:
    """Refuse at once what cannot run here, before the minutes of work.

    Returns:
        Whether vLLM can compile its graph: there is a C++ compiler.

    Raises:
        SereError: the port is taken, or the extra ``cpu`` is not installed.
    """
    for module in ("vllm", "ray"):
        if not _installed(module):
            raise SereError(
                f"the demo needs {module!r}: run `make demo`, or pip install 'sere-ray[cpu]'"
            )
    check_free(port, "--port")
    compiled = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    if not compiled:
        console.print("no C++ compiler found: vLLM runs eager (slower steps, same rule)")
    return compiled


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _wait(port: int, console: Console) -> None:
    """Leave the endpoint up until Ctrl-C."""
    console.print(
        f"\nThe endpoint stays up until Ctrl-C. Try:\n\n"
        f"curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{MODEL_ID}", "temperature": 0, "messages": '
        f'[{{"role": "user", "content": "Work out 23 + 48 - 17."}}]}}\'\n',
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    wait_for_signal()
    console.print("stopping")
