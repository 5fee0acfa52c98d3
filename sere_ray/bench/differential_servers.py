"""Three servers of the demo model, one after the other, get the requests of ``differential.py``."""

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from sere_ray import assets
from sere_ray.bench.differential import Answer, ask_all, compare, unintended
from sere_ray.bench.differential_cases import all_cases
from sere_ray.bench.differential_examples import MODEL, Case
from sere_ray.bench.models import get_model
from sere_ray.bench.serving_overhead import BARE, PROXIES, OverheadPlan, start
from sere_ray.calibration.run import calibrate
from sere_ray.util.errors import SereError
from sere_ray.util.http import open_url
from sere_ray.util.progress import progress

ENGINE = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 26,
    "enable_prompt_tokens_details": True,
}
"""Engine arguments of all three, and of the deployments of tests."""


def vllm_server(folder: Path) -> AbstractContextManager[tuple[str, str, Any]]:
    """vLLM's own server with the demo model: its URL, key and process while the block runs."""
    return start(_plan(folder, {}), BARE)


def of_vllm(url: str, key: str, generated: int) -> tuple[list[Case], list[Answer]]:
    """The cases, made of its document, and its answers."""
    with open_url(f"{url}/openapi.json", 60) as response:
        cases = all_cases(json.load(response), generated)
    return cases, ask_all(url, key, cases)


def run_differential(
    generated: int, *, save: Callable[[dict[str, Any]], None], console: Console | None
) -> None:
    """Send all cases to plain vLLM and to ours on both ways.

    Args:
        generated: requests of each generated kind.
        save: called with the content of the result file.
        console: where progress goes.

    Raises:
        SereError: a server does not start; or, after the result is saved, ours differs for no
            reason.
    """
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="sere-differential-") as name,
        progress(console, 1 + len(PROXIES), task="differential", unit="servers") as advance,
    ):
        folder = Path(name)
        with vllm_server(folder) as (url, key, _):
            cases, expected = of_vllm(url, key, generated)
        advance(1)
        artifact = folder / "sere.safetensors"
        calibrate(str(assets.MODEL), data=str(assets.CALIBRATION), out=artifact, console=None)
        policy = {"similarity": str(artifact), "select_top_k": 1}
        for proxy in PROXIES:
            with start(_plan(folder, policy), proxy) as (url, key, _):
                rows += compare(cases, proxy, ask_all(url, key, cases), expected)
            advance(1)
    save({"model": "demo", "cases": len(cases), "rows": rows})
    if wrong := unintended(rows):
        raise SereError(f"{len(wrong)} answers differ from vLLM's, such as {dict(wrong[0])}")


def _plan(folder: Path, policy: dict[str, Any]) -> OverheadPlan:
    model = get_model("demo")
    return OverheadPlan(model, assets.MODEL, policy, ENGINE, tokens=0, model_id=MODEL)
