"""KV blocks of one policy are never found under another, by whatever is added to ``cache_salt``.

Functions here wrap methods of vLLM's engine core; see the ledger in ``patches.py``. Salts are
random words, one for each policy of each engine: a number would come again after a restart, and
caches beside the GPU (``kv_transfer_config``) outlive the engine that filled them.
"""

import secrets
from collections.abc import Callable
from typing import Any

from sere_ray.engine.checks import sere_config
from sere_ray.engine.worker_calls import CHANGES
from sere_ray.policy.tiers import asks_exact

_MARK = "|sere-"
_EXACT = "exact"
"""The same blocks under every policy and in every engine."""


def salt_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    """``EngineCore.preprocess_add_request``: in a thread of its own, beside the steps."""
    if sere_config(core.vllm_config) is not None:
        made_by = _EXACT if asks_exact(request.sampling_params) else _policy_salt(core)
        request.cache_salt = f"{request.cache_salt or ''}{_MARK}{made_by}"
    return original(core, request)


def salt_again(original: Callable[..., Any], core: Any, request: Any, *args: Any) -> Any:
    """``EngineCore.add_request``: between steps; the policy may have changed meanwhile."""
    if sere_config(core.vllm_config) is not None:
        _follow_policy(core, request)
    return original(core, request, *args)


def notice_policy_change(
    original: Callable[..., Any], core: Any, method: Any, *args: Any, **kwargs: Any
) -> Any:
    """``EngineCore.collective_rpc``: between steps, too."""
    result = original(core, method, *args, **kwargs)
    if method in CHANGES:
        core.sere_policy_salt = secrets.token_hex(8)
        for request in core.scheduler.waiting:  # none has blocks: vLLM queues those elsewhere
            _follow_policy(core, request)
    return result


def _policy_salt(core: Any) -> str:
    if not hasattr(core, "sere_policy_salt"):
        core.sere_policy_salt = secrets.token_hex(8)
    salt: str = core.sere_policy_salt
    return salt


def _follow_policy(core: Any, request: Any) -> None:
    """Hash a request's blocks anew if it carries an earlier policy's salt."""
    given, _, made_by = request.cache_salt.rpartition(_MARK)
    salt = _policy_salt(core)
    if made_by not in (_EXACT, salt):
        request.cache_salt = f"{given}{_MARK}{salt}"
        request.block_hashes = []
        request.update_block_hashes()
