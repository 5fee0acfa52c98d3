import gc
import os
import random
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.calibration.collect import find_moe_layers, moe_shape
from tests.engine.ranks import fork_workers
from tests.models import build_checkpoint

# The engine core runs in this process: engines start in seconds and tests can look inside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a random-weight checkpoint, with an artifact at ``artifact_path(folder)``."""
    made = {}

    def build(architecture):
        if architecture not in made:
            folder = build_checkpoint(architecture, tmp_path_factory.mktemp(architecture))
            random_artifact(folder).save(artifact_path(folder))
            made[architecture] = folder
        return made[architecture]

    return build


def artifact_path(folder):
    return folder.with_suffix(".sere.safetensors")


def random_artifact(folder, **changes):
    """Random similarity with real fingerprints (``synthetic`` would be refused)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = find_moe_layers(model)
    shape = moe_shape(model, layers)
    generator = torch.Generator().manual_seed(0)
    matrices = {
        layer: torch.rand(shape.num_experts, shape.num_experts, generator=generator).fill_diagonal_(
            1.0
        )
        for layer in layers
    }
    metadata = {
        "model_id": folder.name,
        "architecture": shape.architecture,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "router_fingerprint": {i: router_fingerprint(m.gate_weight) for i, m in layers.items()},
        "metric": "random",
        "date": "2026-11-22",
    }
    return SimilarityArtifact(matrices, ArtifactMetadata(**{**metadata, **changes}))


def attention_for(folder):
    """vLLM's latent attention for AMX wants bfloat16, and these checkpoints are float32."""
    config = Path(folder) / "config.json"
    is_latent = config.is_file() and "kv_lora_rank" in config.read_text()
    if is_latent and not torch.cuda.is_available() and torch.cpu._is_amx_tile_supported():
        return {"attention_config": {"backend": "CPU_MLA"}}
    return {}


@contextmanager
def running_engine(folder, sere=None, **options):
    """A real vLLM engine on CPU; ``sere`` is the value of the key, None leaves it out."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.triton_utils import dispatcher

    from sere_ray.engine import patches
    from sere_ray.engine.cpu.patches import hide_llvmlite

    # A stock engine may follow one that loaded numba into this process: see the ledger.
    patches._wrap(dispatcher, "_rebind_kernels", hide_llvmlite)
    defaults = {
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
        "gpu_memory_utilization": 0.05,
        **attention_for(folder),
    }
    with _frozen_heap(), fork_workers():
        engine = None
        try:
            engine = LLM(
                str(folder),
                additional_config={} if sere is None else {"sere": sere},
                **{**defaults, **options},
            )
            yield engine
        finally:  # one that was refused while it loaded leaves its groups of ranks, too
            if engine is not None:
                engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()


@contextmanager
def _frozen_heap():
    """What is there before an engine is left out when garbage is collected.

    vLLM does so nine times for each engine, and a process that has imported all of it, and Ray, is
    slow to search. Its own ``freeze()`` would keep the engine, its ``unfreeze()`` undo this one.
    """

    def nothing():
        pass

    gc.collect()
    gc.freeze()
    try:
        with mock.patch.multiple(gc, freeze=nothing, unfreeze=nothing):
            yield
    finally:
        gc.unfreeze()


def state_of(engine):
    """The state of an engine in this process, of its first worker."""
    from sere_ray.engine.states import find_state

    return engine.collective_rpc(lambda worker: find_state(worker.vllm_config))[0]


def sere_key(folder, **keys):
    """A valid value of the key for a checkpoint of the fixture above."""
    return {"similarity": str(artifact_path(folder)), "select_top_k": 1, **keys}


def prompts(count=8, seed=0, length=(5, 40)):
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(10, 900) for _ in range(rng.randint(*length))]}
        for _ in range(count)
    ]


def generate(engine, requests, tokens=12, **sampling):
    """Greedy answers: ``(token ids, RequestOutput)`` per request."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        **{"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **sampling}
    )
    outputs = engine.generate(requests, parameters, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs], outputs
