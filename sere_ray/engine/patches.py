"""Where vLLM is changed, and the ledger of what every engine with the ``sere`` key changes.

``cpu/patches.py`` and ``gpu/patches.py`` hold what a platform adds, each with its ledger, and name
the files with what several ranks add.

Observers, in place wherever the plugin is loaded; without the ``sere`` key they call straight
through and change nothing:

=====================================  ==========================================================
target                                 what, why, remove when
=====================================  ==========================================================
VllmConfig.__post_init__               Validate the key before the model loads; where it is the
                                       path of a file, put the content in its place. Why: a plugin
                                       gets no configuration. Remove: vLLM hands plugins the config.
MoERunner.__init__                     Attach the rule to each layer's router, and put the patches
                                       below in place. Why: the runner holds its router by
                                       reference, so it must be changed as it is built. Remove:
                                       vLLM offers a hook after ``_compute_routing``.
BaseModelLoader.create_model           Refuse a model that has built no layer the rule reaches,
                                       before its weights load. Leave the layers of a draft model
                                       alone. Remove: as for MoERunner.
EngineCore.preprocess_add_request      Add the policy, or the exact tier, to ``cache_salt``, so
                                       that blocks computed under one policy are never found under
                                       another, nor by exact requests: see ``kv_salt.py``. Remove:
                                       prefix caching takes an engine-wide salt.
EngineCore.add_request, collective_rpc Notice a policy change: requests that still wait get the salt
                                       of the new one, ``block_hashes`` and ``_block_hasher`` of
                                       those that run are cut, and LMCache's trackers store no more
                                       of them. Remove: as for preprocess_add_request.
Scheduler.make_spec_decoding_stats,    Count which drafts were accepted, and send how much drafts
Scheduler.schedule                     count with each step. Why: with async scheduling workers do
                                       not know. Remove: vLLM tells workers acceptance rates.
=====================================  ==========================================================

Patches, put in place by the first layer that is built under a ``sere`` key:

=====================================  ==========================================================
BaseRouter subclass of each instance   ``_compute_routing`` ends in re-routing, on logical ids,
                                       before the load balancer's map: on a CPU through the op
                                       ``sere_ray::choose``, on a GPU by a launch in place.
                                       Its ``set_capture_fn`` records distinct ids, see
                                       ``recording.py``. Remove: as for MoERunner.
RoutedExpertsCapturer.__init__         16 bits for 256 experts, so that -1 is no expert. Remove:
                                       vLLM records ids of -1.
base_loader.process_weights_after_     Check the router fingerprint while gates still hold the
loading                                checkpoint's values; then, with ``dispatch: all_to_all``,
                                       take vLLM's all-gather out of each layer's kernel, see
                                       ``cpu/dispatch.py``. Remove: a hook after weight loading.
Worker.execute_model                   Take what the scheduler sent with the step. Remove: as there.
Worker.reload_weights                  Refused: gates would change after they were checked. Remove:
                                       never, unless they are checked again there.
LoRAModelRunnerMixin.load_lora_model,  Refuse adapters, and targets of adapters, inside blocks with
WorkerLoRAManager._load_adapter        experts: see ``adapters.py``. Why: vLLM drops modules of an
                                       adapter that it has not wrapped, silently. Remove: never.
WorkerBase.sere_*                      Methods that ``collective_rpc`` reaches by name, those of
                                       ``worker_calls.py``. Remove: ``worker_extension_cls`` takes
                                       several classes.
=====================================  ==========================================================
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sere_ray.engine import acceptance, adapters, kv_salt, loaded, recording, worker_calls
from sere_ray.engine.back_end import BackEnd, Routing
from sere_ray.engine.back_ends import BACK_ENDS
from sere_ray.engine.checks import KEY, check_config, sere_config
from sere_ray.engine.layer_checks import (
    check_has_layer,
    check_layer,
    check_routes_outside_kernel,
    check_something_attached,
)
from sere_ray.engine.signatures import CountsPrompts
from sere_ray.engine.speculation import building_draft, builds_draft, is_draft
from sere_ray.engine.state import EngineState
from sere_ray.engine.states import add_state, find_state
from sere_ray.policy.capabilities import GateFacts
from sere_ray.policy.key_file import read_key_file
from sere_ray.util.errors import UnsupportedError

logger = logging.getLogger("vllm.sere_ray")
"""By vLLM's name of the device; others are refused before the model loads."""
_MARK = "_sere_ray_original"


def install_observers() -> None:
    """Put the observers in place; calling it again does nothing."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    _wrap(VllmConfig, "__post_init__", _validate_config)
    _wrap(MoERunner, "__init__", _attach_runner)
    _wrap(BaseModelLoader, "create_model", _create_model)
    _wrap(EngineCore, "preprocess_add_request", kv_salt.salt_request)
    _wrap(EngineCore, "add_request", kv_salt.salt_again)
    _wrap(EngineCore, "collective_rpc", kv_salt.notice_policy_change)
    _wrap(Scheduler, "make_spec_decoding_stats", acceptance.count_drafts)
    _wrap(Scheduler, "schedule", acceptance.send_weights)


def _install_patches(back_end: BackEnd, vllm_config: Any) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(LoRAModelRunnerMixin, "load_lora_model", adapters.load_lora_model)
    _wrap(WorkerLoRAManager, "_load_adapter", adapters.load_adapter)
    _wrap(RoutedExpertsCapturer, "__init__", recording.tell_dropped_apart)
    _wrap(Worker, "execute_model", acceptance.take_weights)
    _wrap(Worker, "reload_weights", loaded.refuse_other_weights)
    _wrap(base_loader, "process_weights_after_loading", loaded.check_loaded)
    for name, method in WORKER_METHODS.items():
        setattr(WorkerBase, name, method)
    back_end.install(_wrap, vllm_config)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(original, *args, **kwargs)``, once."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


# --- front end: validate before anything loads -------------------------------------------------


def _validate_config(original: Callable[..., Any], config: Any) -> None:
    original(config)
    model, key = config.model_config, sere_config(config)
    if model is None or model.is_submodel_config or key is None or is_draft(config, model):
        return
    # Every process is told the content: a file could change, or lie elsewhere for a worker.
    config.additional_config = {**config.additional_config, KEY: read_key_file(key)}
    check_config(config)


# --- worker: attach the rule to every layer ----------------------------------------------------


def _back_end_of(vllm_config: Any) -> BackEnd:
    return BACK_ENDS[vllm_config.device_config.device_type]


def _state_for(vllm_config: Any, runner: Any) -> EngineState:
    """The state of the engine with this configuration, made when its first layer is built."""
    state = find_state(vllm_config)
    if state is None:
        checked = check_config(vllm_config)
        state = _back_end_of(vllm_config).make_state(vllm_config, checked, runner)
        add_state(vllm_config, state)
    return state


def _attach_runner(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    original(runner, *args, **kwargs)
    vllm_config = get_current_vllm_config()
    if sere_config(vllm_config) is None or builds_draft():
        return
    back_end, state = _back_end_of(vllm_config), _state_for(vllm_config, runner)
    _install_patches(back_end, vllm_config)
    layer, router = runner.layer_id, runner.router
    check_has_layer(state, layer)
    check_routes_outside_kernel(runner)
    back_end.check_experts(state, runner)
    check_layer(runner, state.attached, state.top_k, vllm_config.model_config.get_num_experts())
    if not isinstance(router, BaseRouter):
        raise UnsupportedError(
            f"sere: layer {runner.layer_name!r} has its own router "
            f"{type(router).__name__}; this model cannot be re-routed: remove the 'sere' key"
        )
    router.sere_layer = layer
    back_end.attach(state, runner, vllm_config)
    router.__class__ = _rerouting_class(router.__class__, back_end.route)
    state.attached[layer] = runner


def _create_model(
    original: Callable[..., Any], loader: Any, vllm_config: Any, model_config: Any, **kwargs: Any
) -> Any:
    create = functools.partial(
        original, loader, vllm_config=vllm_config, model_config=model_config, **kwargs
    )
    if is_draft(vllm_config, model_config):
        with building_draft():
            return create()
    model = create()
    if sere_config(vllm_config) is not None:
        state = find_state(vllm_config)
        check_something_attached(
            state.attached if state else (),
            model_config.architecture,
            vllm_config.kernel_config.moe_backend,
        )
    return model


@functools.cache
def _rerouting_class(gate: type[Any], route: Callable[..., Routing]) -> type:
    # A subclass with one base keeps the object layout, so an instance's __class__ may be set.
    def _compute_routing(self: Any, *args: Any, **kwargs: Any) -> Routing:
        return route(self, functools.partial(gate._compute_routing, self), *args, **kwargs)

    def set_capture_fn(self: Any, capture: Callable[[Tensor], None] | None) -> None:
        gate.set_capture_fn(self, recording.recording_distinct(capture))

    methods = {"_compute_routing": _compute_routing, "set_capture_fn": set_capture_fn}
    return type(f"Rerouting{gate.__name__}", (gate,), methods)


# --- worker: answers to calls by name -------------------------------------------------------------


def _state_of(worker: Any) -> EngineState:
    state = find_state(worker.vllm_config)
    assert state is not None, "a worker with the key has built a layer"
    return state


def _counters(worker: Any, reset: bool = True) -> dict[str, Any]:
    from vllm.distributed import get_pp_group

    counters = _state_of(worker).read_counters(reset=reset)
    return {**counters, "stage": get_pp_group().rank_in_group}


def _set_policy(
    worker: Any, policy: dict[str, Any], artifact: bytes | None = None
) -> dict[str, Any]:
    return _state_of(worker).set_policy(policy, artifact).model_dump()


def _settle(worker: Any) -> None:
    """Nothing here: the engine core notices that all ranks were told the last policy."""


def _signatures(worker: Any) -> dict[str, Any] | None:
    state = _state_of(worker)
    return state.take_signatures() if isinstance(state, CountsPrompts) else None


def _gates(worker: Any) -> GateFacts:
    return _state_of(worker).gates.facts


WORKER_METHODS: dict[str, Callable[..., Any]] = {
    worker_calls.COUNTERS: _counters,
    worker_calls.SET_POLICY: _set_policy,
    worker_calls.SETTLE: _settle,
    worker_calls.SIGNATURES: _signatures,
    worker_calls.GATES: _gates,
}
"""What each call of ``worker_calls.py`` does in a worker."""
