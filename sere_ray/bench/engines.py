"""vLLM engines in one process, stock and with the ``sere`` key, and their decode steps."""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sere_ray.bench.models import Model
from sere_ray.bench.weights import draw_weights
from sere_ray.engine.vllm_internals import fill_dummy_weights, workspace_manager
from sere_ray.policy.policy import Policy

MAX_TOKENS = 500
"""Decode steps of a repeat at most, so that prompt and answer fit in what the engines allow."""
_PREFILL_TOKENS = 16384


def on_gpu() -> bool:
    """Whether this host's engines run on a GPU."""
    return torch.cuda.is_available()


def prompt_tokens() -> int:
    """Length of a prompt: a usual context on a GPU, next to nothing on a CPU."""
    return 256 if on_gpu() else 4


@dataclass
class Engines:
    """The engines, and what must live as long as they do."""

    stock: dict[str, Any]
    """By ``--moe-backend``."""
    sere: Any
    kept: list[Any]

    def each(self, function: Callable[[torch.nn.Module], Any]) -> list[Any]:
        """Call a function with the model of each engine; stock first."""
        return [engine.apply_model(function)[0] for engine in (*self.stock.values(), self.sere)]


def write_config(model: Model, parent: Path) -> Path:
    """A folder that vLLM takes for a checkpoint whose weights it has to make up."""
    folder = parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def start_engines(
    folder: Path, model: Model, policy: Policy, batches: list[int], tokens: int, compiled: bool
) -> Engines:
    """Start all in this process.

    As processes of their own, each one's polling would take time from the others' cores.
    """
    prepare_process()
    options = _gpu_options(model, batches, tokens, compiled) if on_gpu() else CPU_OPTIONS
    if model.is_quantised:
        fill_dummy_weights(draw_weights)
    # vLLM has one workspace manager a process, and the next engine replaces it. The first one's
    # graphs still write to the old manager's memory, so it must not be freed and given to others.
    kept, engines = [], {}
    for back_end in model.stock_back_ends:
        chosen = {**options, "moe_backend": back_end}
        engines[back_end] = start_engine(folder, None, max(batches), compiled, chosen)
        kept.append(workspace_manager())
    options = {**options, "moe_backend": model.rerouted_back_end or "auto"}
    sere = start_engine(folder, policy, max(batches), compiled, options)
    return Engines(engines, sere, [*kept, workspace_manager()])


def prepare_process() -> None:
    """Before the first engine: all of them compute in this process, and decode greedily."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Do not build FlashInfer's sampler.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # Inductor ends its idle workers after a minute. The second engine's compilation began just then
    # in one run on an H200, and never ended.
    os.environ.setdefault("TORCHINDUCTOR_QUIESCE_ASYNC_COMPILE_POOL", "0")


def gpu_engine(model: Model, streams: int, model_length: int) -> dict[str, Any]:
    """Arguments of a served GPU engine that starts quickly: a cache and graphs of what is needed.

    Graphs are of powers of two, up to twice the streams: where a prompt is computed beside rows
    that decode, a step has more rows than streams.
    """
    sizes = [1 << power for power in range((2 * streams - 1).bit_length() + 1)]
    return {
        "kv_cache_memory_bytes": streams * model_length * model.kv_bytes_per_token,
        "compilation_config": {"cudagraph_capture_sizes": sizes},
    }


CPU_OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 28,
    "gpu_memory_utilization": 0.2,
}
"""Of an engine on a CPU."""


def _gpu_options(model: Model, batches: list[int], tokens: int, compiled: bool) -> dict[str, Any]:
    prompt, rows = prompt_tokens(), max(batches)
    context = prompt + tokens + 128  # whole blocks, whatever size the attention chooses
    options: dict[str, Any] = {
        "max_model_len": 1024,
        # Prompts of 64 rows and a token of each row that already decodes: at most three steps.
        "max_num_batched_tokens": max(min(rows * prompt, _PREFILL_TOKENS) + rows, 1024),
        # Given in bytes, the cache is not sized by a share of the GPU's memory, which would count
        # what the other engine holds. At start vLLM still wants that share to be free.
        "kv_cache_memory_bytes": max(rows * context, 4096) * model.kv_bytes_per_token,
        "gpu_memory_utilization": 0.05,
    }
    if compiled:
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(set(batches))}
    return options


def start_engine(
    folder: Path, policy: Policy | None, max_batch: int, compiled: bool, options: dict[str, Any]
) -> Any:
    """Start one, of made-up weights.

    Args:
        folder: of :func:`write_config`.
        policy: of its ``sere`` key; None = without it.
        max_batch: most requests of a step.
        compiled: run vLLM's compiled graphs; False = eager.
        options: further arguments of ``vllm.LLM``.
    """
    from vllm import LLM

    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=max_batch,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"sere": policy.model_dump()} if policy else {},
        **options,
    )


def decode_steps(
    engine: Any, model: Model, batch: int, tokens: int, *, seed: int
) -> Iterator[float]:
    """Serve a batch of random prompts; yields the time at the end of each step that only decodes.

    Yields ``tokens`` + 1 times where all prompts fit one step, less where they do not. With
    vLLM's async scheduling (its default on GPU) a step ends when its tokens have reached the
    host, with the next one launched: the time between two ends is a step's, unless the host
    needs longer to schedule than the GPU to compute; then it is the host's, as in serving.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = random.Random(seed)
    vocabulary = int(model.config["vocab_size"])
    sampling = SamplingParams(
        max_tokens=tokens + 2,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    core = engine.llm_engine
    for row in range(batch):
        prompt = [rng.randrange(2, vocabulary) for _ in range(prompt_tokens())]
        core.add_request(f"{seed}-{row}", {"prompt_token_ids": prompt}, sampling)
    whole = 0
    while core.has_unfinished_requests():
        if len(core.step()) == batch:
            whole += 1
            if whole > 1:  # the first one that answers every row may hold a prompt
                yield time.perf_counter()
