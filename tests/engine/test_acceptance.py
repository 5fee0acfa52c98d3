"""How much drafts count: from what the scheduler sees to the rows of a step."""

import pickle

import numpy as np
import pytest

from sere_ray.engine.acceptance import Acceptance
from sere_ray.engine.cpu.state import CpuState
from sere_ray.rules.margin import WEIGHT_UNIT
from tests.engine.conftest import generate, running_engine, sere_key, state_of
from tests.engine.test_speculation import SPECULATES, repetitive


def test_weights_are_shares_of_accepted_drafts():
    acceptance = Acceptance(3)
    assert acceptance.weights() == (32, 32, 32, 32)
    for accepted in [3] * 100 + [1] * 200 + [0] * 100:
        acceptance.observe(3, accepted)
    assert acceptance.weights() == (32, 24, 8, 8)  # 300, 100, 100 of 400
    for _ in range(10000):
        acceptance.observe(3, 1)
    assert acceptance.weights() == (32, 32, 1, 1)  # what was is forgotten; 1 is the least
    for _ in range(3):
        acceptance.observe(1, 0)  # fewer drafts than places
    assert acceptance.weights()[2:] == (1, 1)


@pytest.mark.engine
def test_a_step_carries_the_weights_of_its_drafts(checkpoint):
    folder, requests = checkpoint("qwen3_moe"), repetitive(8)
    key = {"similarity": sere_key(folder)["similarity"], "rule": "margin", "tau": 0.02}
    with running_engine(folder, key, **SPECULATES) as engine, pytest.MonkeyPatch.context() as patch:
        state, seen = state_of(engine), []

        def record(state, drafts, original=CpuState.row_weights):
            found = original(state, drafts)
            seen.append((drafts, found, state.draft_weights))
            return found

        patch.setattr(CpuState, "row_weights", record)
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        generate(engine, requests, tokens=60)
    weights = scheduler.sere_acceptance.weights()
    assert 1 <= weights[3] <= weights[2] <= weights[1] < weights[0] == WEIGHT_UNIT
    drafted = [(drafts, found, sent) for drafts, found, sent in seen if found is not None]
    assert drafted
    assert {len(sent) for _, _, sent in drafted} == {4}
    for drafts, found, sent in drafted:
        assert found.tolist() == [sent[place] for place in drafts]
    for drafts, found, _ in seen:
        assert found is not None or not np.any(drafts)
    assert state.draft_weights == drafted[-1][2] or not seen[-1][0].any()


def test_what_is_sent_survives_the_way_to_another_process():
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    output.sere_draft_weights = (32, 20)
    assert pickle.loads(pickle.dumps(output)).sere_draft_weights == (32, 20)
