"""The policy actor without Ray: replicas that follow it are coroutines of the same loop."""

import asyncio
import hashlib
import time

import pytest
import torch

from sere_ray.artifact.similarity import ArtifactMetadata, SimilarityArtifact
from sere_ray.engine.counters import BYTES, COUNTERS, SLOTS_MASKED
from sere_ray.engine.step_totals import StepTotals
from sere_ray.serve.gateway.control_api import Stats
from sere_ray.serve.policy_actor import actor as actor_module
from sere_ray.serve.policy_actor.actor import SereRouter
from sere_ray.serve.policy_actor.members import Member, Order
from sere_ray.serve.policy_actor.store import memory_store
from sere_ray.serve.policy_actor.versions import AUDIT_ENTRIES, HISTORY
from sere_ray.util.errors import ArtifactError, SereError
from sere_ray.util.token_times import BUCKETS

EXPERTS, TOP_K = 8, 4
LIMIT = 1 << 16


def save_artifact(path, seed=0, fingerprint="0", **changes):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: torch.rand(EXPERTS, EXPERTS, generator=generator).fill_diagonal_(1.0)
        for layer in range(2)
    }
    metadata = {
        "model_id": "m",
        "architecture": "A",
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "router_fingerprint": dict.fromkeys(layers, fingerprint * 32),
        "metric": "random",
        "date": "2026-11-23",
    }
    SimilarityArtifact(layers, ArtifactMetadata(**{**metadata, **changes})).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    save_artifact(tmp_path / "a.safetensors")
    save_artifact(tmp_path / "b.safetensors", seed=1)
    save_artifact(tmp_path / "foreign.safetensors", fingerprint="1")
    save_artifact(tmp_path / "large.safetensors", model_id="x" * LIMIT)
    (tmp_path / "text.txt").write_text("no artifact")
    (tmp_path / "damaged.safetensors").write_bytes(b"no artifact")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "b.safetensors")
    return tmp_path


@pytest.fixture
def make_router(folder, monkeypatch):
    monkeypatch.setattr(actor_module, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(actor_module, "ATTACHED_SECONDS", 2.0)
    values = {}

    def make(policy=None, **engines):
        return SereRouter(
            policy or {"similarity": str(folder / "a.safetensors"), "select_top_k": 2},
            folder=str(folder),
            max_artifact_bytes=LIMIT,
            store=memory_store("router", values),
            put=lambda content: content,
            **engines,
        )

    return make


def test_it_is_the_applications_router_once_an_engine_follows_it(make_router):
    """The one of the version before has the engines that serve until then."""

    async def scenario():
        calls = []
        router, replica = make_router(on_followed=lambda: calls.append(1)), Replica("r")
        await replica.join(router)
        assert calls == []
        for _ in range(3):
            await replica.step(router)
        assert calls == [1]

    run(scenario())


def counted(**numbers):
    """Counters of one rank and kind of step, of two layers."""
    lists = {name: [4, 5] for name in (*COUNTERS, SLOTS_MASKED, *BYTES)}
    return {**vars(StepTotals()), **lists, "rows": 7, "steps_counted": 2, **numbers}


class Replica:
    """What ``Follower`` does, with a list for an engine."""

    def __init__(self, name, gang="g", gang_size=1, rank=0):
        self.name, self.gang, self.gang_size, self.rank = name, gang, gang_size, rank
        self.told, self.settled, self.counters = [], -1, None
        self.token_times = [0] * BUCKETS

    async def join(self, router):
        update = await router.join(self.gang)
        self.told, self.settled = [update], update.version
        return update

    async def step(self, router, wait=False):
        member = Member(
            self.name,
            self.gang,
            self.gang_size,
            self.rank,
            self.told[-1].version,
            self.settled,
            self.counters,
        )
        self.counters = None
        order = await router.poll(member, wait)
        self.told += order.updates
        self.settled = order.settle or self.settled
        if order.report:
            kind = counted(steps=2, decode_rows=3, forward_seconds=0.5)
            self.counters = {
                "layers": [0, 1],
                "top_k": TOP_K,
                "token_times": self.token_times,
                "policy": {"union": "global"},
                "decode_only": kind,
                "mixed": {**kind, "forward_seconds": None},
            }
        return order

    async def follow(self, get_router):
        while True:
            await self.step(get_router(), wait=True)


def versions(replica):
    return [update.version for update in replica.told]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_replica_starts_with_what_the_router_holds(make_router, folder):
    async def scenario():
        router, replica = make_router(), Replica("r")
        await router.set_policy({"select_top_k": 1}, "test")
        update = await replica.join(router)
        assert (update.version, update.policy["select_top_k"]) == (1, 1)
        assert update.content == (folder / "a.safetensors").read_bytes()
        assert await replica.step(router) == Order()
        assert (await router.policy())["replicas_settled"] == 1

    run(scenario())


def test_ranks_of_a_gang_start_alike_whatever_happens_in_between(make_router):
    async def scenario():
        router, one, two = make_router(), Replica("1", "g", 2), Replica("2", "g", 2, 1)
        other = Replica("3", "another gang")
        await one.join(router)
        await router.set_policy({"select_top_k": 1}, "test")
        assert (await two.join(router)).version == 0
        assert (await other.join(router)).version == 1

    run(scenario())


def test_nothing_settles_before_the_whole_gang_was_told(make_router):
    async def scenario():
        router, one, two = make_router(), Replica("1", "g", 2), Replica("2", "g", 2, 1)
        for replica in (one, two):
            await replica.join(router)
        await router.set_policy({"mode": "off"}, "test", timeout_s=0)
        await one.step(router)
        await one.step(router)
        assert (versions(one), one.settled) == ([0, 1], 0)
        assert (await router.policy())["replicas_settled"] == 0
        await two.step(router)
        for replica in (one, two, one, two, one, two):
            await replica.step(router)
        assert (one.settled, two.settled) == (1, 1)
        assert (await router.policy())["replicas_settled"] == 2

    run(scenario())


def test_a_change_waits_for_its_replicas_and_says_how_many_follow(make_router):
    async def scenario():
        router, replicas = make_router(), [Replica(str(r), "g", 2, r) for r in range(2)]
        for replica in replicas:
            await replica.join(router)
            await replica.step(router)
        tasks = [asyncio.create_task(replica.follow(lambda: router)) for replica in replicas]
        status = await router.set_policy({"select_top_k": 1, "threshold": 0.5}, "test")
        assert status["replicas"] == status["replicas_settled"] == 2
        assert status["policy"]["threshold"] == 0.5
        tasks[1].cancel()  # a rank that hangs
        status = await router.set_policy({"select_top_k": 3}, "test", timeout_s=0.2)
        assert (status["replicas"], status["replicas_settled"]) == (2, 0)
        while (await router.policy())["replicas"] != 1:
            await asyncio.sleep(0.05)
        tasks[0].cancel()

    run(scenario())


def test_an_artifact_is_sent_once_and_only_when_it_changes(make_router, folder):
    async def scenario():
        router, replica = make_router(), Replica("r")
        await replica.join(router)
        await router.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        status = await router.set_artifact("b.safetensors", "test", timeout_s=0)
        await router.set_policy({"select_top_k": 3}, "test", timeout_s=0)
        content = (folder / "b.safetensors").read_bytes()
        assert status["sha256"] == hashlib.sha256(content).hexdigest()
        await replica.step(router)
        assert [update.content for update in replica.told[1:]] == [None, content, None]
        assert (await router.artifact())["name"].endswith("b.safetensors")

    run(scenario())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foreign.safetensors", ["router fingerprint of layer 0", "1111", "0000", "calibrate"]),
        ("missing.safetensors", ["missing.safetensors", "No such file", "policy actor"]),
        ("damaged.safetensors", ["damaged.safetensors", "not a readable safetensors file"]),
        ("large.safetensors", ["max_artifact_bytes = 65536"]),
        ("text.txt", [".safetensors"]),
        ("../a.safetensors", ["name of a file in the configured folder"]),
        (".hidden.safetensors", ["name of a file in the configured folder"]),
        ("link.safetensors", ["name of a file in the configured folder"]),
        ("", ["name of a file in the configured folder"]),
        ("a\0.safetensors", ["name of a file in the configured folder"]),
    ],
)
def test_an_artifact_that_does_not_fit_changes_nothing(make_router, has_words, name, words):
    async def scenario():
        router = make_router()
        before = await router.policy(), await router.artifact()
        with pytest.raises(ArtifactError) as caught:
            await router.set_artifact(name, "eve")
        has_words(str(caught.value), *words)
        assert (await router.policy(), await router.artifact()) == before
        last = (await router.audit())[-1]
        assert (last["who"], last["what"]) == ("eve", "artifact")
        assert "refused" in last

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select_top_k": 9}, ["policy.select_top_k = 9", "1..4"]),
        ({"select_top": 1}, ["policy.select_top = 1", "did you mean 'select_top_k'"]),
        ({"threshold": 2.0}, ["policy.threshold = 2.0"]),
        ({"mode": "fast"}, ["policy.mode = 'fast'", "'observe'"]),
        ({"similarity": "b.safetensors"}, ["PUT /sere/artifact"]),
    ],
)
def test_a_policy_that_is_not_valid_changes_nothing(make_router, has_words, changes, words):
    async def scenario():
        router = make_router()
        before = await router.policy()
        with pytest.raises(SereError) as caught:
            await router.set_policy(changes, "eve")
        has_words(str(caught.value), *words)
        assert await router.policy() == before

    run(scenario())


BY_ROWS = [{"up_to": 4, "select_top_k": 3}, {"up_to": 16, "threshold": 0.5}]


def test_a_policy_by_rows_is_kept_and_shown(make_router):
    async def scenario():
        router = make_router(on_gpu=True, several_ranks=True)
        status = await router.set_policy({"by_rows": BY_ROWS}, "eve")
        assert status["policy"]["by_rows"] == BY_ROWS
        assert (await router.set_policy({"select_top_k": 1}, "eve"))["policy"]["by_rows"] == BY_ROWS
        assert (await make_router(several_ranks=True).policy())["policy"]["by_rows"] == BY_ROWS
        with pytest.raises(SereError, match="select_top_k = 9"):
            await router.set_policy({"by_rows": [{"up_to": 4, "select_top_k": 9}]}, "eve")
        assert (await router.set_policy({"by_rows": None}, "eve"))["policy"]["by_rows"] is None

    run(scenario())


def test_another_rule_is_set_without_naming_the_keys_of_the_first(make_router):
    async def scenario():
        router = make_router()
        await router.set_policy({"rule": "margin", "tau": 0.1}, "eve")
        status = await router.set_policy({"rule": "sere", "select_top_k": 2}, "eve")
        assert (status["policy"]["tau"], status["policy"]["select_top_k"]) == (None, 2)
        newest = (await router.audit())[-1]
        assert (newest["before"]["tau"], newest["after"]["policy"]["tau"]) == (0.1, None)

    run(scenario())


@pytest.mark.parametrize(
    ("engines", "changes", "words"),
    [
        ({}, {"rule": "oea"}, ["policy.rule = 'oea'", "'sere', 'margin' or 'spare'", "evaluate"]),
        ({}, {"rule": "spare", "tau": 0.1}, ["'spare'", "directed_loss", "--statistics directed"]),
        ({}, {"prefer_local_rank": 0.1}, ["policy.prefer_local_rank = 0.1", "unknown key"]),
        (
            {"on_gpu": True},
            {"rule": "margin", "tau": 0.1, "balance_ranks": True, "select_top_k": None},
            ["policy.balance_ranks", "CUDA kernel", "leave it out"],
        ),
        (
            {"on_gpu": True, "several_ranks": True},
            {"union": "local"},
            ["policy.union = 'local'", "restart"],
        ),
    ],
)
def test_what_engines_would_refuse_is_not_handed_to_them(
    make_router, has_words, engines, changes, words
):
    """They would restart, and refuse it again."""

    async def scenario():
        router = make_router(**engines)
        before = await router.policy()
        with pytest.raises(SereError) as caught:
            await router.set_policy(changes, "eve")
        has_words(str(caught.value), *words)
        assert await router.policy() == before

    run(scenario())


LOSSLESS = {"on_gpu": True, "several_ranks": True, "startup": {"replicas": "by_experts"}}


def test_a_policy_that_names_no_file_is_held_where_engines_choose_copies(make_router, has_words):
    async def scenario():
        router, replica = make_router({"rule": "none"}, **LOSSLESS), Replica("r")
        first = await replica.join(router)
        assert (first.policy["rule"], first.policy["similarity"]) == ("none", None)
        assert first.content is first.masks is None
        found = await router.artifact()
        assert (found["name"], found["layers"], found["metadata"]) == (None, [], {})
        assert (await router.set_policy({"mode": "off"}, "eve", timeout_s=0))["mode"] == "off"
        await replica.step(router)
        assert [update.policy["mode"] for update in replica.told] == ["on", "off"]
        again = make_router({"rule": "none"}, **LOSSLESS)
        assert (await again.policy())["policy"]["mode"] == "off"
        for changes, words in (
            ({"rule": "sere", "select_top_k": 2}, ["similarity is missing"]),
            ({"union": "local"}, ["policy.union = 'local'", "replicas = 'by_experts'"]),
            ({"mode": "auto"}, ["'auto'", "has no levels"]),
        ):
            with pytest.raises(SereError) as caught:
                await router.set_policy(changes, "eve")
            has_words(str(caught.value), *words)
        with pytest.raises(SereError, match="started without an artifact"):
            await router.set_artifact("b.safetensors", "eve")

    run(scenario())


def test_a_policy_that_changes_nothing_is_refused_elsewhere(make_router, has_words):
    words = ("rule = 'none'", "changes nothing", "masks and level", "replicas = 'by_experts'")
    with pytest.raises(SereError) as caught:
        make_router({"rule": "none"}, on_gpu=True, several_ranks=True)
    has_words(str(caught.value), *words)

    async def scenario():
        with pytest.raises(SereError) as caught:
            await make_router().set_policy({"rule": "none"}, "eve")
        has_words(str(caught.value), *words)

    run(scenario())


def test_ranks_on_gpus_keep_their_artifact(make_router, has_words):
    async def scenario():
        router = make_router(on_gpu=True, several_ranks=True)
        with pytest.raises(SereError) as caught:
            await router.set_artifact("b.safetensors", "eve")
        has_words(str(caught.value), "'b.safetensors'", "a.safetensors'", "restart")
        assert (await router.policy())["version"] == 0

    run(scenario())


def test_a_restarted_router_goes_on_where_the_old_one_stopped(make_router, folder):
    async def scenario():
        old, replica = make_router(), Replica("r")
        await replica.join(old)
        await old.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        await old.set_artifact("b.safetensors", "test", timeout_s=0)
        (folder / "b.safetensors").unlink()  # the new actor may be on another node
        (folder / "a.safetensors").unlink()
        new = make_router()
        assert (await new.policy())["version"] == 2
        assert (await new.artifact()) == (await old.artifact())
        assert [entry["what"] for entry in await new.audit()][-1] == "restart"
        await replica.step(new)
        assert versions(replica) == [0, 1, 2], "a version between was left out"
        late = await Replica("late", "h").join(new)
        assert late.content == replica.told[-1].content

    run(scenario())


def test_what_the_gates_keep_engines_from_is_refused_and_ends_no_engine(make_router, has_words):
    """Only engines see the gates: without that, they would end at the change, and at each start."""

    async def scenario():
        router, replica = make_router(), Replica("r")
        await replica.join(router)
        unknown = {"unknown": (3, "custom_routing_function"), "odd": None, "hashed": None}
        await router.note_gates(unknown)
        for each in (router, make_router()):  # the actor that comes after it knows, too
            with pytest.raises(SereError) as error:
                await each.set_policy({"rule": "margin", "tau": 0.1}, "test", timeout_s=0)
            has_words(str(error.value), "policy.rule = 'margin'", "layer 3", "custom_routing")
        assert (await router.audit())[-1]["refused"]
        assert (await router.policy())["version"] == 0
        await router.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        await router.note_gates({**unknown, "unknown": None})
        await router.set_policy({"rule": "margin", "tau": 0.1}, "test", timeout_s=0)
        assert (await router.policy())["version"] == 2

    run(scenario())


def test_ranks_of_a_gang_stop_together_and_the_state_ends_with_the_last(make_router):
    async def scenario():
        router, ranks = make_router(), [Replica(str(r), "g", 2, r) for r in range(2)]
        for replica in ranks:
            await replica.join(router)
            await replica.step(router)
        await router.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        first = asyncio.create_task(router.leave("0", "g", 2))
        await asyncio.sleep(0.05)
        assert not first.done(), "its sibling still has requests"
        assert (await make_router().policy())["version"] == 1
        await router.leave("1", "g", 2)
        await first
        assert (await make_router().policy())["policy"]["select_top_k"] == 2, "not the file's"

    run(scenario())


def test_a_gang_that_restarts_finds_the_state_again(make_router):
    async def scenario():
        router, replica = make_router(), Replica("r")
        await replica.join(router)
        await replica.step(router)
        await router.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        await router.leave("r", "g", 1)
        await Replica("new", "h").join(router)
        assert (await make_router().policy())["version"] == 1

    run(scenario())


def test_a_replica_that_is_too_far_behind_or_ahead_starts_anew(make_router):
    async def scenario():
        router, replica = make_router(), Replica("r")
        await replica.join(router)
        for number in range(HISTORY):
            await router.set_policy({"min_primary_experts": number}, "test", timeout_s=0)
        assert len((await replica.step(router)).updates) == HISTORY
        slow = Replica("slow")
        slow.told = [replica.told[0]]
        await router.set_policy({"select_top_k": 1}, "test", timeout_s=0)
        assert (await slow.step(router)).restart
        await replica.step(router)
        assert (await replica.step(make_router())).restart is False

    run(scenario())


def test_stats_are_asked_for_and_added_up(make_router):
    async def scenario():
        router = make_router()
        replicas = [Replica(str(r), "g", 2, r) for r in range(2)]
        for replica in replicas:
            await replica.join(router)
            await replica.step(router)
        silent = await router.stats(timeout_s=0.05)
        assert [r["counters"] for r in silent["per_replica"]] == [None, None]
        tasks = [asyncio.create_task(replica.follow(lambda: router)) for replica in replicas]
        total = (await router.stats())["total"]["decode_only"]
        # the ranks share steps and their one union; rows and slots are each rank's own
        assert (total["steps"], total["forward_seconds"]) == (2, 0.5)
        assert total["experts_before"] == [4, 5]
        assert (total["decode_rows"], total["slots_rerouted"]) == (6, [8, 10])
        assert total["slots"] == 6 * TOP_K * 2
        Stats.model_validate(await router.stats())
        for task in tasks:
            task.cancel()

    run(scenario())


def test_counters_that_are_the_same_again_are_an_answer(make_router, monkeypatch):
    monkeypatch.setattr(actor_module, "POLL_SECONDS", 10.0)

    async def scenario():
        router, idle = make_router(), Replica("r")
        await idle.join(router)
        await idle.step(router)
        task = asyncio.create_task(idle.follow(lambda: router))
        start = time.monotonic()
        for _ in range(3):
            assert (await router.stats())["per_replica"][0]["counters"] is not None
        assert time.monotonic() - start < 1, "waited for counters to change"
        task.cancel()

    run(scenario())


def test_the_audit_log_is_bounded_and_says_who(make_router):
    async def scenario():
        router = make_router()
        for number in range(AUDIT_ENTRIES + 5):
            await router.set_policy({"min_primary_experts": number}, "ann", timeout_s=0)
        entries = await router.audit()
        assert len(entries) == AUDIT_ENTRIES
        assert {"time", "who", "what", "before", "after", "mode"} == set(entries[-1])

    run(scenario())
