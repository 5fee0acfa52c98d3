"""Learned masks in the policy actor: sent once, refused where they do not fit, kept."""

import pytest

from sere_ray.serve.policy_actor.actor import SereRouter
from sere_ray.serve.policy_actor.store import memory_store
from sere_ray.util.errors import ArtifactError, SereError
from tests.masks.made import make_masks
from tests.serve.test_actor import EXPERTS, LIMIT, TOP_K, Replica, run, save_artifact

ALONE = {"rule": "none", "level": 1}
BESIDE = {"select_top_k": 2, "level": 1, "similarity": "a.safetensors"}


def save_masks(path, fingerprint="0"):
    shapes = dict.fromkeys(range(2), (EXPERTS, 6))
    make_masks(shapes, dict.fromkeys(shapes, fingerprint * 32), top_k=TOP_K).save(path)
    return path.read_bytes()


@pytest.fixture
def make_router(tmp_path):
    save_artifact(tmp_path / "a.safetensors")
    save_artifact(tmp_path / "b.safetensors", seed=1)
    save_masks(tmp_path / "m.safetensors")
    save_masks(tmp_path / "foreign.safetensors", fingerprint="1")
    values = {}

    def make(keys, masks="m.safetensors"):
        policy = {**keys, "masks": str(tmp_path / masks)}
        if "similarity" in keys:
            policy["similarity"] = str(tmp_path / keys["similarity"])
        return SereRouter(
            policy,
            folder=str(tmp_path),
            max_artifact_bytes=LIMIT,
            store=memory_store("router", values),
            put=lambda content: content,
        )

    return make


@pytest.mark.parametrize("keys", [ALONE, BESIDE], ids=["alone", "beside"])
def test_a_replica_gets_its_files_as_it_starts_and_levels_while_it_runs(
    make_router, tmp_path, keys
):
    async def scenario():
        router, replica = make_router(keys), Replica("r")
        first = await replica.join(router)
        assert first.masks == (tmp_path / "m.safetensors").read_bytes()
        artifact = (tmp_path / "a.safetensors").read_bytes() if keys is BESIDE else None
        assert first.content == artifact
        status = await router.set_policy({"level": 2}, "test", timeout_s=0)
        assert (status["policy"]["level"], status["policy"]["rule"]) == (2, first.policy["rule"])
        await replica.step(router)
        assert [update.policy["level"] for update in replica.told] == [1, 2]
        assert replica.told[-1].masks is replica.told[-1].content is None
        found = await router.artifact()
        assert found["masks"]["name"].endswith("m.safetensors")
        assert [level["knob"] for level in found["masks"]["levels"]] == [1, 2]
        assert found["layers"] == [0, 1]
        assert (found["name"] is None) == (keys is ALONE)
        assert found["metadata"]["top_k"] == TOP_K

    run(scenario())


def test_a_restarted_router_still_has_the_masks(make_router, tmp_path):
    async def scenario():
        old = make_router(ALONE)
        await Replica("r").join(old)
        await old.set_policy({"level": 2}, "test", timeout_s=0)
        content = (tmp_path / "m.safetensors").read_bytes()
        for path in tmp_path.iterdir():  # the new actor may be on another node
            path.unlink()
        new = make_router(ALONE)
        assert await new.artifact() == await old.artifact()
        late = await Replica("late", "h").join(new)
        assert (late.masks, late.policy["level"]) == (content, 2)

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": 3}, ["level = 3", "levels 1..2"]),
        ({"level": None}, ["policy.level is missing"]),
        ({"masks": "other"}, ["policy.masks = 'other'", "only `level` moves", "leave the key out"]),
        ({"rule": "sere", "select_top_k": 2}, ["policy.similarity is missing"]),
        ({"similarity": "a"}, ["policy.similarity = 'a'", "PUT /sere/artifact"]),
    ],
)
def test_what_a_running_deployment_cannot_change_to(make_router, has_words, changes, words):
    async def scenario():
        router = make_router(ALONE)
        with pytest.raises(SereError) as caught:
            await router.set_policy(changes, "eve")
        has_words(str(caught.value), *words)
        assert (await router.policy())["version"] == 0

    run(scenario())


def test_an_artifact_is_not_swapped_in_where_there_is_none(make_router, has_words):
    async def scenario():
        router = make_router(ALONE)
        with pytest.raises(SereError) as caught:
            await router.set_artifact("b.safetensors", "eve")
        has_words(str(caught.value), "'b.safetensors'", "without an artifact", "restart")

    run(scenario())


def test_an_artifact_is_swapped_beside_masks(make_router):
    async def scenario():
        router, replica = make_router(BESIDE), Replica("r")
        await replica.join(router)
        await router.set_artifact("b.safetensors", "test", timeout_s=0)
        await replica.step(router)
        assert replica.told[-1].content is not None
        assert replica.told[-1].policy["masks"].endswith("m.safetensors")

    run(scenario())


@pytest.mark.parametrize(
    ("keys", "masks", "words"),
    [
        (BESIDE, "foreign.safetensors", ["router fingerprint of layer 0", "similarity artifact"]),
        (ALONE, "a.safetensors", ["no file of masks", "sere-ray train-masks"]),
        (ALONE, "gone.safetensors", ["gone.safetensors", "No such file", "train-masks"]),
        ({**ALONE, "level": 9}, "m.safetensors", ["level = 9", "levels 1..2"]),
    ],
)
def test_files_that_do_not_fit_stop_the_start(make_router, has_words, keys, masks, words):
    with pytest.raises(ArtifactError) as caught:
        make_router(keys, masks)
    has_words(str(caught.value), *words)
