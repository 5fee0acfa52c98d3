"""Salts that engines share: no block computed under another policy, weights or tier is found."""

import importlib
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.engine import kv_salt
from sere_ray.engine.control import set_policy
from sere_ray.engine.kv_identity import kv_word, matrices_digest, weights_digest
from sere_ray.engine.worker_calls import SET_POLICY, SETTLE
from sere_ray.policy.policy import Policy
from tests.engine.conftest import artifact_path, prompts, running_engine, sere_key
from tests.engine.kv_oracle import KvOracle

BLOCK = 32
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
LMCACHE = (
    "lmcache",
    "lmcache.integration",
    "lmcache.integration.vllm",
    "lmcache.integration.vllm.utils",
    "lmcache.utils",
    "lmcache.v1",
    "lmcache.v1.multiprocess",
    "lmcache.v1.multiprocess.custom_types",
    "lmcache.integration.vllm.vllm_multi_process_adapter",
    "lmcache.integration.vllm.lmcache_mp_connector",
)
MARGIN = {"rule": "margin", "select_top_k": None, "tau": 0.02}
POLICIES = {
    "S=1": {},
    "S=2": {"select_top_k": 2},
    "margin": MARGIN,
    None: {"mode": "off"},
}
"""Of the load; None is what the oracle calls exact."""


# --- the word ---------------------------------------------------------------------------------


def test_the_word_follows_from_what_is_computed(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    artifact = SimilarityArtifact.load(artifact_path(folder))
    other = SimilarityArtifact.load(artifact_path(folder))
    other.layers[2][0, 1] += 0.001
    more = replace(artifact, statistics={2: {"directed_loss": torch.eye(3)}})
    less = replace(artifact, statistics={2: {"directed_loss": torch.zeros(3, 3)}})
    of_artifact, key = matrices_digest(artifact), sere_key(folder)

    def word(changes=(), matrices=of_artifact, weights="w"):
        return kv_word(Policy.parse({**key, **dict(changes)}).for_model(top_k=4), matrices, weights)

    assert word() == word({"similarity": "elsewhere.safetensors", "min_primary_experts": 4})
    others = [
        {"select_top_k": 2},
        {"threshold": 0.5},
        {"min_primary_experts": 0},
        {"union": "local"},
        {"by_rows": [{"up_to": 4, "select_top_k": 2}]},
        {**MARGIN, "tau": 0.02},
        {**MARGIN, "tau": 0.03},
        {**MARGIN, "beta": 1.0},
        {**MARGIN, "rule": "spare"},
        {**MARGIN, "rule": "spare", "limit": 0.5},
    ]
    words = [word(), *map(word, others), word((), weights="v")]
    words += [word((), matrices_digest(of)) for of in (other, more, less)]
    assert len(set(words)) == len(words)
    assert word({"mode": "off"}) is word({"mode": "observe", "select_top_k": 2}) is None


def model_config(folder, **changes):
    fields = {"dtype": "bfloat16", "quantization": None, "revision": None, **changes}
    config = SimpleNamespace(architectures=["Qwen3MoeForCausalLM"])
    return SimpleNamespace(model=str(folder), hf_config=config, **fields)


def test_weights_are_told_apart(checkpoint, tmp_path):
    folder, copy = checkpoint("qwen3_moe"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    mine = weights_digest(model_config(folder), "auto")
    assert mine == weights_digest(model_config(copy), "auto")
    assert mine != weights_digest(model_config(folder, quantization="fp8"), "auto")
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.o_proj.weight"] *= 1.05
    save_file(tensors, file, metadata={"format": "pt"})
    assert mine != weights_digest(model_config(copy), "auto")
    assert weights_digest(model_config(folder), "dummy") is None
    assert weights_digest(model_config(tmp_path / "none"), "auto") is None
    assert weights_digest(model_config("no-such/model-anywhere"), "auto") is None


# --- requests of one engine core ------------------------------------------------------------------


class Core:
    """What the functions reach of an engine core, with vLLM's own requests and hasher."""

    def __init__(self, folder, ranks=1, connector=None, **key):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        config = EngineArgs(
            str(folder), additional_config={"sere": sere_key(folder, **key)}
        ).create_engine_config()
        config.parallel_config.data_parallel_size = ranks
        init_none_hash(sha256)
        self.vllm_config, self.request_block_hasher = config, get_request_block_hasher(4, sha256)
        self.scheduler = SimpleNamespace(
            waiting=[],
            requests={},
            connector=connector,
            aux_output_connector=None,
            hash_block_size=4,
        )

    def add(self, name, tokens=10, *, runs=False, salt=None, **extra):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=99, extra_args=extra or None)
        given = SimpleNamespace(cache_salt=salt, sampling_params=sampling)

        def make(core, given):
            return Request(
                name,
                list(range(tokens)),
                sampling,
                None,
                cache_salt=given.cache_salt,
                block_hasher=self.request_block_hasher,
            ), 0

        request, _ = kv_salt.salt_request(make, self, given)
        kv_salt.salt_again(lambda *_: None, self, request)
        self.scheduler.requests[name] = request
        if not runs:
            self.scheduler.waiting.append(request)
        return request

    def call(self, method, *args):
        kv_salt.notice_policy_change(lambda *_: [], self, method, None, args)


FIRST_TURNS, REQUESTS = 8, 64
EXACT = {"sere_tier": "exact"}


@pytest.fixture
def moe(checkpoint):
    return checkpoint("qwen3_moe")


def policy_of(folder, **changes):
    return sere_key(folder, **changes)


def test_engines_agree_and_policies_do_not(moe):
    one, other, third = Core(moe), Core(moe), Core(moe, select_top_k=2)
    first, same = one.add("a"), other.add("a")
    assert first.block_hashes == same.block_hashes
    assert len(first.block_hashes) == 2
    assert third.add("a").block_hashes != first.block_hashes
    assert one.add("b", salt="mine").block_hashes != first.block_hashes
    # Exact blocks are those of stock, whatever the policy; so are all of them without one.
    stock = one.add("c", **EXACT)
    assert stock.cache_salt is None
    assert third.add("d", **EXACT).block_hashes == stock.block_hashes != first.block_hashes
    assert Core(moe, mode="observe").add("a").block_hashes == stock.block_hashes
    one.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    assert one.add("e").block_hashes == third.add("e").block_hashes
    one.call(SET_POLICY, policy_of(moe), None)
    assert one.add("f").block_hashes == first.block_hashes


def test_an_artifact_that_comes_with_a_policy_counts(moe, tmp_path):
    core = Core(moe)
    first = core.add("a", runs=True)
    artifact = SimilarityArtifact.load(artifact_path(moe))
    artifact.layers[0][0, 1] += 0.01
    artifact.save(tmp_path / "new.safetensors")
    content = (tmp_path / "new.safetensors").read_bytes()
    core.call(SET_POLICY, policy_of(moe, similarity="new.safetensors"), content)
    assert core.add("b").block_hashes != first.block_hashes
    core.call(SET_POLICY, policy_of(moe, similarity="new.safetensors", threshold=0.5), None)
    core.call(SET_POLICY, policy_of(moe, similarity="new.safetensors"), None)
    assert core.add("c").block_hashes != first.block_hashes


def test_waiting_requests_follow_and_running_ones_are_cut(moe):
    core, new = Core(moe), Core(moe, select_top_k=2)
    waits, late, exact = core.add("a"), core.add("b", runs=True), core.add("c", runs=True, **EXACT)
    runs, boundary = core.add("d", 10, runs=True), core.add("e", 11, runs=True)
    before = list(core.add("f", 11).block_hashes)
    hashes = waits.block_hashes
    for request in (runs, boundary, exact):
        request.append_output_token_ids(99)
    assert len(boundary.block_hashes) == 3  # its newest token is not computed yet
    whole = boundary.block_hashes[2]
    core.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    assert waits.block_hashes is hashes  # connectors keep the list
    assert waits.block_hashes == new.add("a").block_hashes
    assert exact.sere_word is None
    for request in (runs, boundary):
        assert request.block_hashes[:2] == before
        assert request.cache_salt != late.cache_salt
        request.append_output_token_ids([99] * 8)
    assert boundary.block_hashes[2] != whole
    twin = Core(moe).add("e", 11, runs=True)
    for _ in range(2):  # once more changes nothing for it
        twin.append_output_token_ids(99)
        again = new.add("g", 11, runs=True)
        again.append_output_token_ids([99] * 9)
        found = {*boundary.block_hashes[2:]}
        assert not found & {*twin.block_hashes, *again.block_hashes}
        frozen = list(boundary.block_hashes)
        core.call(SET_POLICY, policy_of(moe), None)
        assert boundary.block_hashes == frozen


def test_nothing_is_shared_until_every_rank_was_told(moe):
    core, alone = Core(moe, ranks=2), Core(moe, select_top_k=2)
    assert core.add("a", runs=True).block_hashes == Core(moe).add("a").block_hashes
    core.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    unsettled = [core.add(name) for name in "bc"] + [core.add("d", runs=True)]
    hashes = {h for request in unsettled for h in request.block_hashes}
    assert len(hashes) == 3 * 2
    assert not hashes & {*alone.add("b").block_hashes, *core.scheduler.requests["a"].block_hashes}
    core.call(SETTLE)
    assert core.add("e").block_hashes == alone.add("b").block_hashes
    # Those that waited have no rows yet; those that ran stay apart.
    assert unsettled[0].block_hashes == alone.add("b").block_hashes
    assert {*unsettled[2].block_hashes} < hashes


def known_connector():
    return type("Known", (), {"__module__": f"{CONNECTORS}.offloading_connector"})()


def test_no_salt_comes_again_beside_a_connector_that_is_not_known(moe):
    """It may store, under the salt a request came with, what was computed after a change."""
    core = Core(moe, connector=SimpleNamespace())
    first = core.add("a", runs=True)
    core.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    core.call(SET_POLICY, policy_of(moe), None)
    assert core.add("b").block_hashes != first.block_hashes != Core(moe).add("c").block_hashes
    assert core.add("d", **EXACT).cache_salt is None


def test_requests_that_a_connector_knows_keep_their_hashes(moe):
    core = Core(moe, connector=known_connector())
    waits = core.add("a", 10)
    before = list(waits.block_hashes)
    core.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    assert waits.block_hashes == before  # it may have been looked up: its prompt is exact anyway
    waits.append_output_token_ids([5] * 6)
    twin = Core(moe).add("a", 10)
    twin.append_output_token_ids([5] * 6)
    assert len(waits.block_hashes) == len(twin.block_hashes) == 4
    assert waits.block_hashes[2:] != twin.block_hashes[2:]


def test_lmcache_stores_no_more_of_a_request_that_was_cut(moe, monkeypatch):
    """vLLM's own tracker; LMCache itself is not here, and only its names are asked for."""
    for name in LMCACHE:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    module = importlib.import_module(f"{CONNECTORS}.lmcache_mp_connector")
    monkeypatch.delitem(sys.modules, module.__name__)
    connector = type("Upstream", (), {"__module__": module.__name__})()
    core = Core(moe, connector=SimpleNamespace(sub_connectors=[connector]))
    request = core.add("a", 8, runs=True)
    tracker = module.LMCacheMPRequestTracker(request)
    connector.request_trackers = {"a": tracker}

    def stored(tokens):
        request.append_output_token_ids([5] * 4)
        tracker.append_block_ids([tokens])
        tracker.increase_num_scheduled_tokens(4)
        return module.LMCacheMPRequestMetadata.GetStoreMetadata(tracker, 1, 4)

    before = stored(1)
    assert before.cache_salt == request.cache_salt
    assert tracker.num_stored_blocks == 1
    core.call(SET_POLICY, policy_of(moe, select_top_k=2), None)
    assert [stored(tokens) for tokens in (2, 3)] == [None, None]
    # After preemption vLLM makes another tracker, of the salt of its own.
    assert module.LMCacheMPRequestTracker(request).cache_salt != before.cache_salt


# --- under load -----------------------------------------------------------------------------------


def run_load(folder, turns, memory):
    """Requests of several turns, while the policy changes.

    Args:
        folder: a checkpoint.
        turns: policies by name, and for how many steps each of them runs; then again from the
            first one on.
        memory: bytes of KV cache.
    """
    from vllm import SamplingParams

    rng, key = random.Random(1), sere_key(folder, min_primary_experts=0)
    options = {"enable_prefix_caching": True, "block_size": BLOCK, "max_num_seqs": 8}
    options |= {"max_num_batched_tokens": 96, "kv_cache_memory_bytes": memory}
    with running_engine(folder, {**key, **POLICIES[turns[0][0]]}, **options) as engine:
        oracle, core, added, step = KvOracle(engine), engine.llm_engine, 0, 0

        def add(text):
            nonlocal added
            sampling = SamplingParams(
                max_tokens=rng.randint(34, 50),
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                extra_args=EXACT if rng.random() < 0.25 else None,
            )
            core.add_request(str(added), {"prompt_token_ids": text}, sampling)
            added += 1

        for text in prompts(FIRST_TURNS, seed=1, length=(40, 70)):
            add(text["prompt_token_ids"])
        changes = [name for name, steps in turns for _ in range(steps)]
        while core.has_unfinished_requests():
            policy = changes[step % len(changes)]
            if policy != oracle.policy and step:
                set_policy(engine, Policy.parse({**key, **POLICIES[policy]}))
            oracle.policy = policy
            for output in core.step():
                if output.finished and added < REQUESTS:
                    add([*output.prompt_token_ids, *output.outputs[0].token_ids, 7, 8, 9][:256])
            step += 1
    return oracle


@pytest.mark.engine
def test_no_hash_is_of_two_policies_under_load(checkpoint):
    folder = checkpoint("qwen3_moe")
    one = run_load(folder, [("S=1", 80), (None, 10), ("margin", 80), ("S=2", 80)], 1 << 23)
    other = run_load(folder, [("S=1", 60), ("S=2", 60), (None, 10), ("margin", 60)], 1_400_000)
    assert other.preempted, "it has too much room"
    hits = [*one.hits, *other.hits]
    for is_exact, policy, found in hits:
        assert found <= (frozenset() if is_exact else {policy})
    assert len({found for _, _, found in hits}) > 2, "re-routed blocks found under two policies"
    straddling = [
        h for o in (one, other) for h, of in o.seen.items() if any(len(x) > 1 for x in of)
    ]
    assert straddling, "no request ran while the policy changed"
    shared = one.seen.keys() & other.seen.keys()
    assert not shared & set(straddling)
    policies_of = {h: frozenset().union(*one.seen[h], *other.seen[h]) for h in shared}
    assert max(len(policies) for policies in policies_of.values()) == 1
    assert frozenset().union(*policies_of.values()) >= {"S=1"}, "engines share no re-routed block"
