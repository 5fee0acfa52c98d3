"""What other rooms borrow of vLLM is there in the installed version, and does what they need."""

import ast
import os
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
