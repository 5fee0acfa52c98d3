"""Which families of mixtures of experts calibrate, start re-routed, and stay exact at S = K.

Each is a tiny checkpoint of random weights: it is calibrated as a user would, then served by vLLM's
CPU build alone and with the ``sere`` key. Each of these in a process of its own, which is forked
from one that has imported vLLM.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from sere_ray import assets
from sere_ray.bench.family_configs import COMMON, EXPERTS, FAMILIES, Family
from sere_ray.engine.fork_server import PRELOAD
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

SECONDS = 600
"""Longest time of one process."""
_END_SECONDS = 10
_PROMPTS, _TOKENS = 6, 8
_PROCESSES = multiprocessing.get_context("forkserver")
Row = dict[str, Any]
Tokens = list[list[int]]
Result = TypeVar("Result")


def run_families(
    chosen: Sequence[str], save: Callable[[dict[str, Any]], None], *, console: Console
) -> None:
    """Try families one after the other, and save after each.

    Args:
        chosen: names in ``FAMILIES``; none = all.
        save: called with ``{"rows": [...]}``.
        console: where progress goes.

    Raises:
        SereError: a name is unknown.
    """
    for name in chosen:
        if name not in FAMILIES:
            raise SereError(f"--only: {name!r} is none of {', '.join(FAMILIES)}")
    rows: list[Row] = []
    names = list(chosen or FAMILIES)
    with progress(console, len(names), task="families", unit="families") as advance:
        for name in names:
            rows.append(try_family(name))
            save({"rows": rows})
            advance(1)


_EMPTY: Row = {
    "family": None,
    "calibrates": False,
    "starts": False,
    "equal_at_k": None,
    "experts_before": None,
    "experts_after": None,
    "message": None,
}


def build(family: Family, folder: Path) -> None:
    """Write a checkpoint of random weights, with the demo's tokenizer.

    Args:
        family: what to build.
        folder: where; made here.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.MODEL)
    arguments = {k: v for k, v in COMMON.items() if k not in family.without} | family.arguments
    arguments["vocab_size"] = max(len(tokenizer), 1024)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        arguments[name] = getattr(tokenizer, name)
    config = getattr(transformers, family.config or f"{family.name}Config")(**arguments)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for key, tensor in [*model.named_buffers(), *model.named_parameters()]:
            is_gate = tensor.dim() == 2 and len(tensor) == EXPERTS and not tensor.any()
            if is_gate or key.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)  # else it starts at zero
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family.architecture:
        path = folder / "config.json"
        changed = json.loads(path.read_text()) | {"architectures": [family.architecture]}
        path.write_text(json.dumps(changed))


def try_family(name: str) -> Row:
    """Calibrate and serve a family: its row."""
    row: Row = {**_EMPTY, "family": name}
    with tempfile.TemporaryDirectory(prefix="sere-families-") as parent:
        folder, similarity = Path(parent) / name, Path(parent) / "similarity.safetensors"
        try:
            _in_process(_calibrated, name, folder, similarity)
        except SereError as error:
            return row | {"message": f"calibration: {error}"}
        row["calibrates"] = True
        try:
            stock = _in_process(_stock, folder)
        except SereError as error:
            return row | {"message": f"stock vLLM: {error}"}
        try:
            return row | _in_process(_rerouted, folder, similarity, stock)
        except SereError as error:
            return row | {"message": str(error)}


def _in_process(call: Callable[..., Result], *arguments: Any) -> Result:
    """What a call returns in a process of its own.

    Raises:
        SereError: what the call raised; or that it died, with the last error that it printed, or
            took too long.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at the imports of the fork server
    _PROCESSES.set_forkserver_preload([*PRELOAD, "vllm.v1.engine.llm_engine", "transformers"])
    with tempfile.TemporaryDirectory(prefix="sere-families-") as folder:
        log = Path(folder) / "log"
        receiver, sender = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_run, args=(sender, log, call, arguments))
        process.start()
        sender.close()
        try:
            if not receiver.poll(SECONDS):
                raise SereError(f"no answer within {SECONDS} s")
            refusal, found = receiver.recv()
            process.join(_END_SECONDS)  # it tidies up
        except EOFError:
            raise SereError(_last_error(log)) from None
        finally:
            process.kill()
            process.join()
    if refusal is not None:
        raise SereError(refusal)
    result: Result = found
    return result


def _run(sender: Connection, log: Path, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """In the process: send the reason of a refusal, or what the call returns."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sender.send((None, call(*arguments)))
    except SereError as error:
        sender.send((str(error), None))


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["ended without a word"]
    return ([line for line in lines if "Error" in line] or lines)[-1].strip()[:300]


def _calibrated(name: str, folder: Path, similarity: Path) -> None:
    """Build a family's checkpoint and calibrate it."""
    from sere_ray.calibration import calibrate

    build(FAMILIES[name], folder)
    calibrate(str(folder), data=str(assets.CALIBRATION), out=similarity, sequences=8, length=64)


def _stock(folder: Path) -> Tokens:
    """Of an engine without the key."""
    return _tokens(_start(folder, None))


def _rerouted(folder: Path, similarity: Path, stock: Tokens) -> Row:
    """Of an engine with the key: counts at S = 1; tokens under what must change none."""
    from sere_ray.engine.control import experts_read, read_counters, set_policy
    from sere_ray.policy.policy import Policy

    key = {"similarity": str(similarity), "select_top_k": 1, "min_primary_experts": 0}
    engine = _start(folder, key)
    read_counters(engine, reset=True)
    _tokens(engine)
    counters = read_counters(engine)
    same = True
    for change in ({"select_top_k": counters["top_k"]}, {"mode": "observe"}, {"mode": "off"}):
        set_policy(engine, Policy.parse({**key, **change}))
        same = same and _tokens(engine) == stock
    return {
        "starts": True,
        "equal_at_k": same,
        "experts_before": round(experts_read(counters, "experts_before"), 2),
        "experts_after": round(experts_read(counters, "experts_after"), 2),
    }


def _start(folder: Path, key: dict[str, Any] | None) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        gpu_memory_utilization=0.05,
        additional_config={"sere": key} if key else {},
    )


def _tokens(engine: Any) -> Tokens:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    prompts = [f"def function_{number}(first, second):" for number in range(_PROMPTS)]
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]
