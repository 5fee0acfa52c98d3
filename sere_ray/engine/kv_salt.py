"""KV blocks of one policy are never found under another, by whatever is added to ``cache_salt``.

Functions here wrap methods of vLLM's engine core; see the ledger in ``patches.py``.

While all ranks run the same policy, its word (``kv_identity.py``) is added: engines beside this one
have the same, and a cache beside the GPU (``kv_transfer_config``) is shared with them. Exact
requests, and all of them under the modes ``off`` and ``observe``, have the salt of stock.

When the policy changes, a request that runs has rows of both. The blocks of its prompt and of what
it has computed keep their hashes, those that follow are hashed under a random word of its own:
nobody finds them. So are blocks of requests that come before every rank was told.
"""

import os
import secrets
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine.checks import sere_config
from sere_ray.engine.kv_identity import kv_word, masks_digest, matrices_digest, weights_digest
from sere_ray.engine.worker_calls import CHANGES, SET_POLICY
from sere_ray.masks.served import load_masks
from sere_ray.policy.key import parse_key
from sere_ray.policy.policy import Policy
from sere_ray.policy.tiers import asks_exact

_MARK = "|sere-"
_NEVER = 1 << 62
"""More blocks than a request has."""
_making = Lock()


def salt_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    """``EngineCore.preprocess_add_request``: in a thread of its own, beside the steps."""
    if sere_config(core.vllm_config) is None:
        return original(core, request)
    given, word = request.cache_salt, _salts(core).word_for(request.sampling_params)
    request.cache_salt = _salted(given, word)
    result = original(core, request)
    made = result[0]
    made.sere_given_salt, made.sere_word, made.sere_is_cut = given, word, False
    return result


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
    if method not in CHANGES:
        return result
    salts = _salts(core)
    before = salts.word, salts.settled
    if method == SET_POLICY:
        salts.tell(*_arguments(*args, **kwargs))
    else:
        salts.settled = True
    if before != (salts.word, salts.settled):
        _follow_all(core, ran_another=method == SET_POLICY)
    return result


class KvSalts:
    """The words of an engine core.

    Args:
        vllm_config: vLLM's complete configuration, with the ``sere`` key.
        shares: whether a policy has the same word in every engine and whenever it comes back.
    """

    def __init__(self, vllm_config: Any, *, shares: bool) -> None:
        self._shares = shares
        model = vllm_config.model_config
        self._top_k = model.get_num_experts_per_tok()
        self._several_ranks = vllm_config.parallel_config.data_parallel_size > 1
        policy, self._startup = parse_key(sere_config(vllm_config))
        path = policy.similarity_path
        self._take(None if path is None else SimilarityArtifact.load(path))
        self._masks = masks_digest(load_masks(policy))
        digest = weights_digest(model, str(vllm_config.load_config.load_format))
        # Without one no other engine has the same.
        self._weights = digest if digest and shares else secrets.token_hex(16)
        self.word = self._word_of(policy)
        self.settled = True
        """Whether every rank was told the policy: ranks start with the same."""

    def tell(self, policy: dict[str, Any], artifact: bytes | None = None) -> None:
        """Take over the policy that this rank was told, as :meth:`EngineState.set_policy`."""
        told, _ = parse_key(policy, running=self._startup)
        if artifact is not None:
            self._take(SimilarityArtifact.from_bytes(artifact, name=str(told.similarity)))
        if not self._shares:
            self._weights = secrets.token_hex(16)
        self.word = self._word_of(told)
        self.settled = not self._several_ranks

    def _take(self, artifact: SimilarityArtifact | None) -> None:
        self._matrices = matrices_digest(artifact)
        self._strengths = None if artifact is None else artifact.metadata.strengths

    def _word_of(self, policy: Policy) -> str | None:
        bound = policy.for_model(top_k=self._top_k, strengths=self._strengths)
        return kv_word(bound, self._matrices, self._weights, self._masks)

    def word_for(self, sampling_params: Any) -> str | None:
        """Of a request that comes now; None = its blocks are those of stock."""
        if asks_exact(sampling_params):
            return None
        return self.word if self.settled else secrets.token_hex(16)


def _salts(core: Any) -> KvSalts:
    with _making:  # the first request is salted in a thread of its own
        if not hasattr(core, "sere_salts"):
            shares = all(_is_known(c) for c in _flatten(core.scheduler.connector))
            core.sere_salts = KvSalts(core.vllm_config, shares=shares)
        salts: KvSalts = core.sere_salts
        return salts


def _salted(given: str | None, word: str | None) -> str | None:
    return given if word is None else f"{given or ''}{_MARK}{word}"


def _arguments(timeout: float | None = None, args: Any = (), kwargs: Any = None) -> Any:
    """Those of the call, as ``collective_rpc`` takes them."""
    return args


def _follow_all(core: Any, *, ran_another: bool) -> None:
    """Salt requests that have no rows yet as new ones; of others cut what follows."""
    scheduler = core.scheduler
    # A request that waits may already be looked up, or recorded, by the hashes that it has.
    is_known = scheduler.connector is not None or scheduler.aux_output_connector is not None
    waiting = set() if is_known else {request.request_id for request in scheduler.waiting}
    for name, request in scheduler.requests.items():
        if name in waiting:  # vLLM queues those elsewhere that hold blocks
            _follow_policy(core, request)
        elif ran_another and not asks_exact(request.sampling_params):
            _cut(request, scheduler)


def _follow_policy(core: Any, request: Any) -> None:
    """Hash a request's blocks anew if it carries another word."""
    word = _salts(core).word_for(request.sampling_params)
    if word != request.sere_word:
        request.cache_salt = _salted(request.sere_given_salt, word)
        request.sere_word, request.sere_is_cut = word, False
        request._block_hasher = core.request_block_hasher
        request.block_hashes.clear()  # the same list: connectors keep it
        request.update_block_hashes()


def _cut(request: Any, scheduler: Any) -> None:
    """Hash what follows a request's computed rows and its prompt under a word of its own.

    Prompt rows are exact under every policy: blocks of prompts that are still to be computed are
    what they would have been.
    """
    if request.sere_is_cut or request._block_hasher is None:
        return
    request.sere_is_cut, request.sere_word = True, secrets.token_hex(16)
    request.cache_salt = _salted(request.sere_given_salt, request.sere_word)
    # All but the newest known token are computed, or will be as a prompt's after preemption.
    tokens = max(request.num_prompt_tokens, request.num_tokens - 1)
    keep = tokens // scheduler.hash_block_size
    hasher, parent = request._block_hasher, os.urandom(32)
    request._block_hasher = partial(_hash_after_cut, hasher, keep, parent)
    del request.block_hashes[keep:]
    request.update_block_hashes()
    for connector in _flatten(scheduler.connector):
        _stop_storing(connector, request)


def _hash_after_cut(hasher: Any, keep: int, parent: bytes, request: Any) -> Any:
    """vLLM's hasher, to which the last block before the cut seems to have another hash."""
    kept = request.block_hashes
    if not kept or len(kept) > keep:
        return hasher(request)
    request.block_hashes = [*kept[:-1], parent]
    try:
        return hasher(request)
    finally:
        request.block_hashes = kept


def _flatten(connector: Any) -> list[Any]:
    """A connector, or those of a ``MultiConnector``; None = there is none."""
    if connector is None:
        return []
    parts = getattr(connector, "sub_connectors", None)
    return [connector] if parts is None else [c for part in parts for c in _flatten(part)]


def _is_known(connector: Any) -> bool:
    """Others than vLLM's, such as that of the package ``lmcache``, may go on storing blocks of a
    request that was cut under the salt it came with: then no salt may come again."""
    return type(connector).__module__.startswith("vllm.")


def _stop_storing(connector: Any, request: Any) -> None:
    """vLLM's LMCacheMPConnector keeps the salt a request came with and hashes by itself."""
    tracker = getattr(connector, "request_trackers", {}).get(request.request_id)
    if tracker is not None and _is_known(connector):
        tracker.num_stored_blocks = _NEVER
