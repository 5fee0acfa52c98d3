"""Mode ``auto`` through the router: its configuration, and a simulated load on simulated ranks."""

import asyncio
import math
import random

import pytest

from sere_ray.observe.metrics import DECISIONS
from sere_ray.observe.score import Scores, TokenScore
from sere_ray.policy.policy import Policy
from sere_ray.serve import ServeConfig
from sere_ray.serve.app import build_app, llm_config
from sere_ray.serve.gateway.control_api import Status
from sere_ray.serve.policy_actor import actor as actor_module
from sere_ray.serve.policy_actor.actor import SereRouter
from sere_ray.serve.policy_actor.auto_config import AutoConfig, level_policies
from sere_ray.serve.policy_actor.store import memory_store
from sere_ray.serve.replica.server import OPTIONS
from sere_ray.util.errors import SereError
from sere_ray.util.token_times import bucket_of
from tests.observe.recorded import Recorded
from tests.serve.test_actor import LIMIT, TOP_K, Replica, counted, run, save_artifact
from tests.serve.test_auto_controller import step_ms

LEVELS = [{"select_top_k": 3}, {"select_top_k": 2}, {"select_top_k": 1}]
AUTO = {"tpot_ms": 16, "levels": LEVELS}
SHARES = {4: 0.0, 3: 0.1, 2: 0.2, 1: 0.35}
RANKS = 2


class SimulatedRank(Replica):
    """Counts what a rank would: steps of one interval that take longer the more rows they have."""

    def __init__(self, name, rank, seed=0):
        super().__init__(name, "g", RANKS, rank)
        self.rng = random.Random(seed)
        self.sums = {"steps": 0, "decode_rows": 0, "forward_seconds": None, "rows": 0}
        self.rerouted, self.scores = 0, Scores()

    def run_interval(self, load):
        """``load`` rows a step over the gang, for a second."""
        if not load:
            return
        policy = self.told[-1].policy
        kept = policy["select_top_k"] if policy["mode"] == "on" else TOP_K
        seconds = step_ms(TOP_K - kept, load) / 1e3 * self.rng.gauss(1, 0.02)
        steps, rows = round(1 / seconds), load / RANKS
        self.sums["steps"] += steps
        self.sums["decode_rows"] += round(steps * rows)
        self.rerouted += round(steps * rows * TOP_K * SHARES[kept])
        loss = TokenScore(-1.0, -1.0 - SHARES[kept], agrees=True)
        for _ in range(3):
            self.scores.add(self.told[-1].version, "default", [loss] * 5)
        for _ in range(round(steps * rows)):
            self.token_times[bucket_of(seconds * self.rng.gauss(1, 0.05))] += 1

    async def step(self, router, wait=False):
        order = await super().step(router, wait)
        if self.counters is not None:
            slots = [self.rerouted, self.rerouted]
            kind = counted(**self.sums, slots_rerouted=slots)
            idle = counted(steps=0, decode_rows=0, slots_rerouted=[0, 0])
            times = list(self.token_times)
            self.counters |= {"decode_only": kind, "mixed": idle, "token_times": times}
            self.counters["scores"] = self.scores.report()
        return order


class Deployment:
    """A router, two ranks that follow it, and a second store for its successor."""

    def __init__(self, folder, auto=AUTO, **policy):
        self.values, self.folder = {}, folder
        path = str(folder / "a.safetensors")
        self.policy = {"similarity": path, "select_top_k": 2, "mode": "off", **policy}
        self.auto = auto
        self.ranks = [SimulatedRank(str(rank), rank, seed=rank) for rank in range(RANKS)]

    def restart(self, **options):
        self.router = SereRouter(
            self.policy,
            folder=str(self.folder),
            max_artifact_bytes=LIMIT,
            auto=self.auto,
            store=memory_store("router", self.values),
            put=lambda content: content,
            **options,
        )
        return self.router

    async def __aenter__(self):
        router = self.restart()
        for rank in self.ranks:
            await rank.join(router)
            await rank.step(router)
        self.tasks = [asyncio.create_task(rank.follow(lambda: self.router)) for rank in self.ranks]
        return self

    async def __aexit__(self, *error):
        for task in self.tasks:
            task.cancel()

    async def levels(self, loads):
        """The level after each interval; every rank runs it before the next one."""
        found = []
        for load in loads:
            for rank in self.ranks:
                rank.run_interval(load)
            await self.router.auto_step()
            status = await self.router.policy()
            while any(rank.told[-1].version < status["version"] for rank in self.ranks):
                await asyncio.sleep(0.001)
            Status.model_validate(status)
            found.append(status["auto"]["level"])
        return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(actor_module, "POLL_SECONDS", 0.1)
    save_artifact(tmp_path / "a.safetensors")
    save_artifact(tmp_path / "b.safetensors", seed=1)
    return tmp_path


def test_a_score_is_held_as_the_floor(folder):
    """Level 1 scores 0.1, level 2 0.2: it tries the second, when the first has its 8 answers."""
    auto = {"max_score": 0.15, "levels": LEVELS, "patience": 1}

    async def scenario():
        async with Deployment(folder, auto) as deployment:
            await deployment.router.set_policy({"mode": "auto"}, "ops")
            levels = await deployment.levels([40] * 12)
            first_answers = levels.index(2) - levels.index(1)
            assert first_answers >= 2, "6 answers an interval: it waits for the second one"
            assert levels[-4:] == [1] * 4
            assert max(levels) == 2
            status = (await deployment.router.policy())["auto"]
            assert status["score"] == pytest.approx(0.1)
            mine = [e for e in await deployment.router.audit() if e["who"] == "auto"]
            assert mine[-1]["reason"] == "score 0.2000 > 0.1500 nats"

    run(scenario())


def changes(levels):
    return sum(a != b for a, b in zip([0, *levels], levels, strict=False))


def test_it_settles_under_a_constant_load_and_is_exact_when_idle(folder):
    async def scenario():
        async with Deployment(folder) as deployment:
            router = deployment.router
            assert (await router.set_policy({"mode": "auto"}, "ops"))["auto"]["level"] == 0
            assert deployment.ranks[0].told[-1].policy["mode"] == "off"
            levels = await deployment.levels([40] * 60)
            assert levels == sorted(levels), "it went back although the load stayed"
            assert 1 <= changes(levels) <= len(LEVELS)
            status = await router.policy()
            level = status["auto"]["level"]
            assert (status["mode"], level) == ("auto", levels[-1])
            assert status["policy"]["mode"] == "on"
            assert status["policy"]["select_top_k"] == LEVELS[level - 1]["select_top_k"]
            assert all(r.told[-1].policy == status["policy"] for r in deployment.ranks)
            assert status["auto"]["load"] == pytest.approx(40, rel=0.05)
            assert await deployment.levels([0]) == [0]
            assert (await router.policy())["policy"]["mode"] == "off"
            mine = [e for e in await router.audit() if e["who"] == "auto"]
            assert [e["level"] for e in mine] == [*range(1, level + 1), 0]
            assert "ms > 16.0 ms" in mine[0]["reason"]
            assert mine[-1]["reason"] == "idle"

    run(scenario())


def test_it_follows_a_day_without_oscillating(folder):
    day = [round(2 + 40 * (1 - math.cos(2 * math.pi * i / 200)) / 2) for i in range(200)]

    async def scenario():
        async with Deployment(folder) as deployment:
            await deployment.router.set_policy({"mode": "auto"}, "ops")
            levels = await deployment.levels(day)
            assert max(levels) >= 2
            assert levels[-1] == 0
            assert changes(levels) <= 2 * len(LEVELS) + 2

    run(scenario())


def test_a_floor_alone_is_a_target(folder):
    async def scenario():
        auto = {"max_rerouted_share": 0.25, "levels": LEVELS}
        async with Deployment(folder, auto) as deployment:
            await deployment.router.set_policy({"mode": "auto"}, "ops")
            levels = await deployment.levels([8] * 40)
            assert levels[-1] == 2, "the strongest level below a quarter"
            assert changes(levels[20:]) <= 1

    run(scenario())


def test_modes_are_left_and_entered_and_keys_change_below_the_levels(folder):
    async def scenario():
        async with Deployment(folder) as deployment:
            router = deployment.router
            await router.set_policy({"mode": "auto"}, "ops")
            await deployment.levels([60] * 20)
            status = await router.set_policy({"threshold": 0.5}, "ops")
            assert (status["mode"], status["auto"]["level"]) == ("auto", 3)
            assert (status["policy"]["threshold"], status["policy"]["select_top_k"]) == (0.5, 1)
            status = await router.set_artifact("b.safetensors", "ops")
            assert (status["mode"], status["policy"]["select_top_k"]) == ("auto", 1)
            await deployment.levels([0])
            status = await router.set_policy({"mode": "on"}, "ops")
            assert (status["mode"], status["auto"]) == ("on", None)
            assert status["policy"]["similarity"].endswith("b.safetensors")
            assert status["policy"]["select_top_k"] == 2, "not of a level"
            version = status["version"]
            await router.auto_step()
            assert (await router.policy())["version"] == version

    run(scenario())


def test_a_refused_change_keeps_the_mode(folder, has_words):
    async def scenario():
        async with Deployment(folder) as deployment:
            router = deployment.router
            await router.set_policy({"mode": "auto"}, "ops")
            await deployment.levels([60] * 10)
            before = await router.policy()
            for bad in ({"mode": "fast"}, {"mode": "on", "select_top_k": 9}, {"threshold": 2.0}):
                with pytest.raises(SereError):
                    await router.set_policy(bad, "eve")
            assert await router.policy() == before
        async with Deployment(folder, auto=None) as deployment:
            with pytest.raises(SereError) as caught:
                await deployment.router.set_policy({"mode": "auto"}, "eve")
            has_words(str(caught.value), "policy.mode = 'auto'", "no levels", "in its file")

    run(scenario())


def test_a_restarted_router_goes_on_in_auto_from_exact(folder):
    async def scenario():
        async with Deployment(folder) as deployment:
            await deployment.router.set_policy({"mode": "auto", "threshold": 0.5}, "ops")
            assert (await deployment.levels([60] * 10))[-1] > 0
            status = await deployment.restart().policy()
            assert (status["mode"], status["auto"]["level"]) == ("auto", 0)
            assert status["policy"]["mode"] == "off"
            assert (await deployment.router.audit())[-1]["reason"] == "the policy actor restarted"
            await deployment.router.set_policy({"mode": "on"}, "ops", timeout_s=0)
            assert (await deployment.router.policy())["policy"]["threshold"] == 0.5

    run(scenario())


def test_the_router_looks_by_itself(folder, monkeypatch):
    async def scenario():
        async with Deployment(folder, {**AUTO, "interval_s": 0.5}) as deployment:
            await deployment.router.set_policy({"mode": "auto"}, "ops")
            router = deployment.router
            while (await router.policy())["auto"]["load"] is None:
                await asyncio.sleep(0.01)
            deployment.ranks[0].run_interval(40)
            while not (await router.policy())["auto"]["tpot_ms"]:
                await asyncio.sleep(0.01)
        deployment.router._auto_task.cancel()

    run(scenario())


def test_ranks_that_do_not_answer_change_nothing(folder):
    async def scenario():
        async with Deployment(folder) as deployment:
            await deployment.router.set_policy({"mode": "auto"}, "ops")
            before = (await deployment.levels([60] * 10))[-1]
            for task in deployment.tasks:
                task.cancel()
            counted = deployment.router._counted
            deployment.router._counted = lambda: counted(timeout_s=0.01)
            await deployment.router.auto_step()
            assert before > 0
            assert (await deployment.router.policy())["auto"]["level"] == before

    run(scenario())


# --- the file ------------------------------------------------------------------------------------

VALID = {
    "model": "/m",
    "model_id": "m",
    "sere": {"similarity": "a.safetensors", "select_top_k": 2},
    "auto": AUTO,
}


def test_a_file_may_start_in_auto():
    config = ServeConfig.parse({**VALID, "sere": {**VALID["sere"], "mode": "auto"}})
    assert (config.starts_auto, config.sere.mode) == (True, "off")
    options = llm_config(config).experimental_configs[OPTIONS]
    assert options["starts_auto"] is True
    assert AutoConfig.model_validate(options["auto"]) == config.auto
    assert ServeConfig.parse(VALID).starts_auto is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto": {"levels": LEVELS}}, ["auto", "tpot_ms, max_rerouted_share or max_score"]),
        ({"auto": {"tpot_ms": 5}}, ["auto.levels", "required"]),
        ({"auto": {"tpot_ms": 5, "levels": []}}, ["auto.levels", "at least 1"]),
        ({"auto": {"tpot_ms": 0, "levels": LEVELS}}, ["auto.tpot_ms = 0", "greater than 0"]),
        ({"auto": {"tpot_ms": 5, "levels": [{}]}}, ["auto.levels.0", "select_top_k, threshold"]),
        (
            {"auto": {"tpot_ms": 5, "levels": [{"union": "local"}]}},
            ["auto.levels.0.union = 'local'", "not permitted"],
        ),
        ({"sere": None}, ["auto: needs a policy under `sere`"]),
        (
            {"auto": None, "sere": {**VALID["sere"], "mode": "auto"}},
            ["sere.mode = 'auto'", "levels under `auto`"],
        ),
        ({"engine": {"disable_log_stats": True}}, ["disable_log_stats"]),
        (
            {"auto": {"max_score": 0.1, "levels": LEVELS}, "score": {"share": 0}},
            ["auto.max_score = 0.1", "nothing is scored", "share 0"],
        ),
        (
            {
                "auto": {"max_score": 0.1, "levels": LEVELS},
                "engine": {"logprobs_mode": "raw_logits"},
            },
            ["auto.max_score = 0.1", "logprobs_mode = 'raw_logits'"],
        ),
        ({"starts_auto": True}, ["`mode: auto` under `sere`"]),
    ],
)
def test_mistakes_in_the_file(changes, words, has_words):
    with pytest.raises(SereError) as caught:
        ServeConfig.parse({**VALID, **changes})
    has_words(str(caught.value), *words)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([{"select_top_k": 9}], ["auto.levels.0.select_top_k = 9", "1..4"]),
        ([{"select_top_k": 1}, {"select_top_k": 2}], ["auto.levels.1 =", "must re-route more"]),
        ([{"select_top_k": 2}, {"select_top_k": 2}], ["auto.levels.1 =", "one must fall"]),
        (
            [{"threshold": None}, {"threshold": 0.5, "select_top_k": 1}],
            ["auto.levels.1 =", "none rise"],
        ),
    ],
)
def test_levels_that_do_not_fit_the_model_or_each_other(folder, levels, words, has_words):
    auto = {"tpot_ms": 5, "levels": levels}
    with pytest.raises(SereError) as caught:
        Deployment(folder, auto).restart()
    has_words(str(caught.value), *words)
    sere = {"similarity": str(folder / "a.safetensors"), "select_top_k": 2}
    with pytest.raises(SereError) as caught:  # where the file is here, before anything starts
        build_app({**VALID, "sere": sere, "auto": auto})
    has_words(str(caught.value), *words)


def test_levels_do_not_go_with_settings_by_rows(folder, has_words):
    sere = {"similarity": str(folder / "a.safetensors"), "select_top_k": 2}
    sere["by_rows"] = [{"up_to": 4, "select_top_k": 3}]
    with pytest.raises(SereError) as caught:
        build_app({**VALID, "sere": sere, "auto": {"tpot_ms": 5, "levels": [{"select_top_k": 1}]}})
    has_words(str(caught.value), "policy.by_rows", "'auto'", "leave by_rows out")


def test_levels_are_ordered_by_strength():
    base = Policy.parse({"similarity": "a", "select_top_k": 3, "threshold": 0.8})
    levels = [{"threshold": 0.5}, {"threshold": None}, {"threshold": None, "select_top_k": 1}]
    levels.append({**levels[-1], "min_primary_experts": 0})
    config = AutoConfig.model_validate({"tpot_ms": 5, "levels": levels})
    policies = level_policies(base, config, TOP_K)
    assert [p.mode for p in policies] == ["off", *["on"] * 4]
    assert [p.threshold for p in policies] == [0.8, 0.5, None, None, None]
    assert [p.select_top_k for p in policies] == [3, 3, 3, 1, 1]


def test_every_change_of_level_is_exported(folder):
    async def scenario():
        recorded = Recorded()
        async with Deployment(folder) as deployment:
            router = deployment.restart(sink=recorded)  # the ranks follow this one now
            assert recorded.of(DECISIONS, direction="up") == 0
            await router.set_policy({"mode": "auto"}, "ops")
            level = (await deployment.levels([60] * 20))[-1]
            assert recorded.of(DECISIONS, direction="up") == level > 0
            assert (await deployment.levels([0]))[-1] == 0
            assert recorded.of(DECISIONS, direction="down") == 1

    run(scenario())
