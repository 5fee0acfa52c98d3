"""What other rooms borrow of vLLM is there in the installed version, and does what they need."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sere_ray.engine import vllm_internals


def test_the_ledger_has_every_function():
    source = Path(vllm_internals.__file__).read_text()
    functions = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    table = vllm_internals.__doc__
    listed = [line.split()[0] for line in table.splitlines() if line[:1].isalpha() and "_" in line]
    assert set(functions) <= set(listed)
    assert table.count("Remove:") == len(functions)


@pytest.mark.parametrize(("workers", "is_changed"), [(1, True), (2, False)])
def test_one_worker_computes_in_the_engine_process(workers, is_changed):
    from vllm.v1.executor.abstract import Executor

    parallel = SimpleNamespace(world_size=workers, distributed_executor_backend="mp")
    config = SimpleNamespace(parallel_config=parallel)
    before = Executor.get_class(config)
    vllm_internals.compute_in_engine_process(config)
    assert (Executor.get_class(config) is not before) == is_changed
    assert (Executor.get_class(config).__name__ == "UniProcExecutor") == is_changed


def test_the_workspace_manager_is_the_one_that_engines_use(monkeypatch):
    from vllm.v1.worker import workspace

    mine = object()
    monkeypatch.setattr(workspace, "_manager", mine)
    assert workspace.current_workspace_manager() is mine
    assert vllm_internals.workspace_manager() is mine


def test_a_changed_environment_is_read_again(monkeypatch):
    from vllm import envs

    monkeypatch.setenv("VLLM_DP_MASTER_PORT", "4001")
    envs.enable_envs_cache()
    assert envs.VLLM_DP_MASTER_PORT == 4001
    os.environ["VLLM_DP_MASTER_PORT"] = "4002"
    assert envs.VLLM_DP_MASTER_PORT == 4001
    vllm_internals.forget_environment()
    assert envs.VLLM_DP_MASTER_PORT == 4002


def test_dummy_weights_are_given_to_a_function(monkeypatch):
    from vllm.config.load import LoadConfig
    from vllm.model_executor import model_loader

    loaders = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", loaders)
    filled = []
    vllm_internals.fill_dummy_weights(filled.append)
    vllm_internals.fill_dummy_weights(filled.append)  # once is enough
    model = torch.nn.Linear(2, 2)
    loader = model_loader.get_model_loader(LoadConfig(load_format="dummy"))
    loader.load_weights(model, None)
    assert filled == [model]
    assert model.weight.abs().max() <= 1e-3  # vLLM's own came first


ASKED = """
import ctypes
from sere_ray.engine.cpu.back_end import ask_for_tiles

def allowed():
    found = ctypes.c_ulong(0)
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(found))  # ARCH_GET_XCOMP_PERM
    return found.value >> 18 & 1

before = allowed()
ask_for_tiles()
print(before, allowed())
"""


def test_an_engine_asks_for_tile_registers_where_there_are_some():
    """vLLM's experts for them do not, and such a process ends with an illegal instruction."""
    found = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == (["0", "1"] if torch.cpu._is_amx_tile_supported() else ["0", "0"])
    found = find_spec("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    experts = Path(found.origin)
    assert "init_amx" not in experts.read_text(), "vLLM asks itself: ask_for_tiles() can go"
