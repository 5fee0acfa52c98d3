"""Tokens per second under speculative decoding, with and without re-routing, on random weights.

Drafts are n-grams of the request, so they cost next to nothing: what is timed is the served model.
Each lane is an engine; its settings take turns in it, in random order, so that drift of the
machine hits all alike. All is relative to mode ``off`` of the same engine.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from sere_ray.bench.arms import Arm, arms, with_most_tau
from sere_ray.bench.engines import (
    CPU_OPTIONS,
    on_gpu,
    prepare_process,
    start_engine,
    write_config,
)
from sere_ray.bench.models import Model
from sere_ray.bench.routing import Router, skew_gates
from sere_ray.calibration.synthetic import synthetic_artifact
from sere_ray.engine.control import experts_read, read_counters, set_policy
from sere_ray.engine.vllm_internals import workspace_manager
from sere_ray.util.errors import SereError
from sere_ray.util.progress import progress

ARMS = ("off", "S=K", "S=2", "S=1", "margin")
"""What is timed, by default."""
Save = Callable[[dict[str, Any]], None]
_WARM_STEPS, _TRIAL_STEPS = 24, 8
_FORCED_RATES = (0.9, 0.67, 0.43)
"""How often so many drafts are accepted: with the last token 3.0 tokens a step, as of a trained
draft model that knows less of each next token."""


class Lane(NamedTuple):
    """Where drafts come from, and which are accepted."""

    name: str
    words: int
    """Different tokens of a request: with few, its answer soon repeats itself."""
    drafts: dict[str, Any]
    """vLLM's ``speculative_config``, but for the number of drafts."""


def lanes(num_drafts: int) -> dict[str, Lane]:
    """Acceptance ``forced``, or that of ``ngram`` drafts on answers that repeat themselves."""
    rates = [*_FORCED_RATES, *[0.0] * num_drafts][:num_drafts]
    forced = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    found = [
        Lane("forced", 128, {"prompt_lookup_min": 1, "prompt_lookup_max": 3, **forced}),
        Lane("ngram", 64, {"prompt_lookup_min": 2, "prompt_lookup_max": 4}),
    ]
    return {lane.name: lane for lane in found}


@dataclass(frozen=True)
class SpeculationPlan:
    """What is measured.

    Attributes:
        model: what to serve.
        streams: requests that decode at once.
        num_drafts: drafts of a request and step.
        steps: that are timed in a repeat.
        repeats: interleaved repeats of every arm.
        router: how tokens spread over the experts.
        lanes: names of :func:`lanes`.
        arms: names of the timed settings; ``off`` always is, as the ratios need it.
        compiled: run vLLM's compiled graphs; False = eager.
    """

    model: Model
    streams: int
    num_drafts: int
    steps: int
    repeats: int
    router: Router
    lanes: tuple[str, ...]
    arms: tuple[str, ...] = ARMS
    compiled: bool = True


class Timed(NamedTuple):
    """One repeat of an arm."""

    tokens: int
    seconds: float
    steps: int


def measure(plan: SpeculationPlan, *, console: Console, save: Save) -> None:
    """Measure and save after every lane.

    Args:
        plan: what is measured.
        console: where progress goes.
        save: called with ``{"rows": [...]}``.

    Raises:
        SereError: the plan does not fit the model or this machine.
    """
    if plan.router == "skewed" and not on_gpu():
        raise SereError("--router skewed: needs a GPU; on CPU vLLM packs the gates' weights away")
    if "forced" in plan.lanes and not on_gpu():
        raise SereError("--lanes forced: needs a GPU; on CPU vLLM forces no acceptance")
    known = lanes(plan.num_drafts)
    for name in plan.lanes:
        if name not in known:
            raise SereError(f"--lanes: {name!r} is none of {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sere-speculation-") as name:
        folder, similarity = write_config(plan.model, Path(name)), Path(name) / "sere.safetensors"
        settings = _settings(plan, str(similarity))
        synthetic_artifact(folder).save(similarity)
        prepare_process()
        kept: list[Any] = []  # an engine's graphs outlive the manager of their memory: engines.py
        for lane in (known[name] for name in plan.lanes):
            console.print(f"starting an engine: {plan.model.name}, drafts: {lane.name}")
            engine = _start(plan, lane, folder, settings)
            kept += [engine, workspace_manager()]
            rows += _measure_lane(plan, lane, engine, settings, console)
            save({"rows": rows})


def _settings(plan: SpeculationPlan, similarity: str) -> list[Arm]:
    """What is timed, ``observe`` beside it."""
    settings = {arm.name: arm for arm in arms(similarity, plan.model) if arm.policy}
    settings["S=K"] = Arm("S=K", settings[f"S={plan.model.top_k}"].policy)
    for name in plan.arms:
        if name not in settings:
            raise SereError(f"--arms: {name!r} is none of {', '.join(settings)}")
    return [settings[name] for name in dict.fromkeys(("off", "observe", "S=2", *plan.arms))]


def _start(plan: SpeculationPlan, lane: Lane, folder: Path, settings: list[Arm]) -> Any:
    speculates = {"method": "ngram", "num_speculative_tokens": plan.num_drafts, **lane.drafts}
    options = {**_engine_options(plan), "speculative_config": speculates}
    engine = start_engine(folder, settings[0].policy, plan.streams, plan.compiled, options)
    if plan.router == "skewed":
        engine.apply_model(skew_gates)
    return engine


def _engine_options(plan: SpeculationPlan) -> dict[str, Any]:
    if not on_gpu():
        return CPU_OPTIONS
    rows, model_length = plan.streams * (plan.num_drafts + 1), 1024
    options: dict[str, Any] = {
        "max_model_len": model_length,
        "max_num_batched_tokens": plan.streams * _prompt_tokens() + rows,
        "kv_cache_memory_bytes": plan.streams * model_length * plan.model.kv_bytes_per_token,
        "gpu_memory_utilization": 0.05,
    }
    if plan.compiled:
        options["compilation_config"] = {"cudagraph_capture_sizes": [rows]}
    return options


def _prompt_tokens() -> int:
    return 256 if on_gpu() else 64


def _measure_lane(
    plan: SpeculationPlan, lane: Lane, engine: Any, settings: list[Arm], console: Console
) -> list[dict[str, Any]]:
    observe, s2 = settings[1], next(arm for arm in settings if arm.name == "S=2")
    timed = [arm for arm in settings if arm.name in ("off", *plan.arms)]
    order, found = random.Random(0), {arm.name: list[Timed]() for arm in timed}

    def experts(arm: Arm, steps: int, field: str = "experts_after") -> float:
        _run(plan, lane, engine, arm, seed=0, steps=steps)
        return experts_read(read_counters(engine), field)

    with progress(console, plan.repeats + 1, task=lane.name, unit="repeats") as advance:
        if any(arm.name == "margin" for arm in timed):
            wanted = experts(s2, _TRIAL_STEPS)
            timed = [
                with_most_tau(arm, lambda trial: experts(trial, _TRIAL_STEPS) >= wanted)
                if arm.name == "margin"
                else arm
                for arm in timed
            ]
        before = experts(observe, plan.steps, "experts_before")
        read = {arm.name: experts(arm, plan.steps) for arm in timed if arm.name != "off"}
        advance(1)
        for repeat in range(1, plan.repeats + 1):
            for arm in order.sample(timed, len(timed)):
                found[arm.name].append(_run(plan, lane, engine, arm, seed=repeat, steps=plan.steps))
            advance(1)
    return [
        _row(plan, lane, arm, found[arm.name], found["off"], before, read.get(arm.name, before))
        for arm in timed
    ]


def _run(
    plan: SpeculationPlan, lane: Lane, engine: Any, arm: Arm, *, seed: int, steps: int
) -> Timed:
    """Serve the streams under an arm, and count and time steps in which all of them decode."""
    assert arm.policy
    set_policy(engine, arm.policy)
    names = _add_requests(plan, lane, engine, seed)
    ends = _step_ends(engine.llm_engine, len(names))
    for _ in range(_WARM_STEPS):
        next(ends)
    read_counters(engine, reset=True)
    start, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += next(ends)
    seconds = time.perf_counter() - start
    engine.llm_engine.abort_request(names)
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    return Timed(tokens, seconds, steps)


def _add_requests(plan: SpeculationPlan, lane: Lane, engine: Any, seed: int) -> list[str]:
    """Prompts and answers of a request are of its own few words."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng, core, names = random.Random(seed), engine.llm_engine, []
    for stream in range(plan.streams):
        words = rng.sample(range(2, int(plan.model.config["vocab_size"])), lane.words)
        prompt = [words[place % lane.words] for place in range(_prompt_tokens())]
        sampling = SamplingParams(
            max_tokens=engine.model_config.max_model_len - len(prompt),
            temperature=0,
            seed=stream,  # which drafts are accepted where that is forced: for all arms the same
            allowed_token_ids=words,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        names.append(f"{seed}-{stream}")
        core.add_request(names[-1], {"prompt_token_ids": prompt}, sampling)
    return names


def _step_ends(core: Any, streams: int) -> Iterator[int]:
    """Run; yields the new tokens of each step that answers all streams.

    With vLLM's async scheduling a step ends when its tokens have reached the host: see
    :func:`sere_ray.bench.engines.decode_steps`.

    Raises:
        SereError: a request ended: they are too short for so many steps.
    """
    while True:
        outputs = core.step()
        if any(output.finished for output in outputs):
            raise SereError("--steps: a request reached the most tokens of the model; fewer steps")
        if len(outputs) == streams:
            yield sum(len(output.outputs[0].token_ids) for output in outputs)


def _row(
    plan: SpeculationPlan,
    lane: Lane,
    arm: Arm,
    timed: Sequence[Timed],
    off: Sequence[Timed],
    before: float,
    read: float,
) -> dict[str, Any]:
    speeds, off_speeds = ([t.tokens / t.seconds for t in of] for of in (timed, off))
    ratios = [own / other for own, other in zip(speeds, off_speeds, strict=True)]
    lengths = [t.tokens / t.steps / plan.streams for t in timed]
    return {
        "model": plan.model.name,
        "router": plan.router,
        "lane": lane.name,
        "streams": plan.streams,
        "drafts": plan.num_drafts,
        "arm": arm.name,
        "select_top_k": arm.select_top_k if arm.name != "off" else None,
        "tau": arm.policy.tau if arm.policy else None,
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_min": round(min(speeds), 1),
        "tokens_per_s_max": round(max(speeds), 1),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "step_ms": round(statistics.median(t.seconds / t.steps for t in timed) * 1e3, 3),
        "acceptance_length": round(statistics.fmean(lengths), 3),
        "experts_before": round(before, 2),
        "experts_after": round(read, 2),
        "repeats": len(timed),
    }
