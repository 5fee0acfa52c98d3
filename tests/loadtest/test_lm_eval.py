"""The lm-eval task on the demo's arithmetic: its scoring against real answers."""

import re
from pathlib import Path

import pytest
import yaml

from sere_ray import assets
from sere_ray.assets import final_answer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "loadtest" / "lm_eval"


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load((FOLDER / "demo_arithmetic.yaml").read_text())


def extracted(task, name, answer):
    """What a filter finds, as lm-eval's `regex` does: the match that `group_select` names."""
    (chain,) = (entry["filter"] for entry in task["filter_list"] if entry["name"] == name)
    assert [step["function"] for step in chain] == ["regex", "take_first"]
    found = re.findall(chain[0]["regex_pattern"], answer)
    return found[chain[0]["group_select"]] if found else None


def test_the_task_asks_the_held_out_problems(task):
    file = ROOT / task["dataset_kwargs"]["data_files"][task["test_split"]]
    assert file.samefile(assets.MODEL.parent / "data" / "arithmetic.jsonl")
    problem = {"prompt": "a", "answer": "b"}
    assert set(re.findall(r"{{(\w+)}}", task["doc_to_text"] + task["doc_to_target"])) == set(
        problem
    )
    assert set(problem) == set(yaml.safe_load(file.open().readline()))
    assert task["generation_kwargs"]["do_sample"] is False


def test_real_answers_are_scored_as_the_demo_scores_them(task):
    text = (assets.CALIBRATION).read_text()
    answers = re.findall(r"assistant\\n(.*?)<\|im_end\|>", text)
    answers = [answer.replace("\\n", "\n") for answer in answers if "Answer:" in answer]
    assert len(answers) > 100
    for answer in answers:
        assert extracted(task, "strict-match", answer) == final_answer(answer)
        assert extracted(task, "flexible-extract", answer) == final_answer(answer)


@pytest.mark.parametrize("answer", ["", "7 * 3 = 21", "Answer: 21 apples", "Answer: twenty"])
def test_an_answer_without_mark_is_not_a_strict_match(task, answer):
    assert extracted(task, "strict-match", answer) is None
