"""`sere-ray tasks`: questions by hand, statistics against known values, a small run, bad input."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sere_ray import assets
from sere_ray.calibration.loading import load_tokenizer
from sere_ray.cli.main import app
from sere_ray.evaluation.decode_batches import Predictions
from sere_ray.evaluation.paired import Paired, mcnemar_p
from sere_ray.evaluation.task_arithmetic import worked_sum
from sere_ray.evaluation.task_definitions import definitions
from sere_ray.evaluation.task_items import TASKS, Question, Task, check_tasks
from sere_ray.evaluation.task_rows import worst_tasks
from sere_ray.evaluation.task_run import asking_order, judge
from sere_ray.evaluation.task_texts import Document
from sere_ray.evaluation.tasks import as_settings
from sere_ray.util.errors import SereError
from sere_ray.util.results import load_result

DATA = str(assets.CALIBRATION)
HELD_OUT = str(assets.CALIBRATION.with_name("heldout.jsonl"))
CUE = load_tokenizer(str(assets.MODEL))("\nName:", add_special_tokens=False)["input_ids"]
FIELDS = {"task", "rule", "settings", "batch", "items", "right", "right_exact", "lost", "won"}
FIELDS |= {"relative_loss", "relative_loss_95", "mcnemar_p", "items_needed", "ended_by"}
FIELDS |= {"experts_read_mean", "expert_rows_share", "level"}


def by_characters(text):
    """A document whose tokens are characters."""
    return Document(text, [ord(c) for c in text], [(i, i + 1) for i in range(len(text))])


def asked(name, documents, prompt, decode, tokenizer=None):
    """The questions of a task with texts of other lengths."""
    full = TASKS[name]
    task = Task(prompt, decode, full.choices, full.ask)
    return full.ask(task, documents, tokenizer)


def spelled(question, text=0):
    return ["".join(map(chr, question.texts[text][a:b])) for a, b in question.answers]


# --- questions by hand -------------------------------------------------------------------------


def test_words_are_whole_tokens_but_for_spaces_before_them():
    text = "if foo_barbaz: no  selfish"
    tokens = ["if", " foo", "_", "bar", "baz", ": no", "  self", "ish"]
    ends = list(itertools.accumulate(map(len, tokens)))
    document = Document(text, list(range(len(tokens))), list(zip([0, *ends], ends, strict=False)))
    assert list(document.words()) == [(1, 2), (3, 5), (6, 8)], "'if' and 'no' are too short"
    cut = Document(text, [0, 1], [(0, 8), (8, len(text))])
    assert list(cut.words()) == [], "no token ends where 'foo' does"


def test_a_letter_of_several_tokens():
    document = Document("über", [0, 1, 2, 3], [(0, 1), (0, 1), (1, 3), (3, 4)])
    assert list(document.words()) == [(0, 4)]


def test_cloze_asks_for_words_that_decode_rows_predict():
    """Prompt 4, decode 12: tokens 5 to 15 of a window are predicted by decode rows."""
    document = by_characters("one two three four")
    (question,) = asked("cloze", [document], 4, 12)
    assert spelled(question) == ["three"], "'two' starts too early, 'four' ends too late"
    assert question.texts == [document.ids[:16]]


def test_continuation_is_one_of_four_ends_of_the_same_document():
    document = by_characters("".join(map(chr, range(200, 200 + 96))))
    questions = list(asked("continuation", [document], 8, 16))
    assert len(questions) == 7, "windows of 24 every 12 of 96 characters"
    for question in questions:
        assert question.answers == [(12, 24)]
        true, *others = question.texts
        assert len(others) == 3
        assert true == list(range(true[0], true[0] + 24)), "the text itself"
        for other in others:
            assert other[:12] == true[:12]
            assert other[12:] != true[12:]
            assert other[12:] == list(range(other[12], other[12] + 12)), "another window's end"
        assert len({tuple(text) for text in question.texts}) == 4


def test_copying_asks_for_the_words_of_the_second_piece():
    document = by_characters("skipped: alpha, beta")
    (question,) = asked("copying", [document], 20, 20)
    assert question.texts == [document.ids * 2]
    assert spelled(question) == ["alpha", "beta"]
    assert question.answers == [(29, 34), (36, 40)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def area(width):\n    return width", ["area"]),
        ("class Stack(list):\n    pass # and a long rest", ["Stack"]),
        ("A monad is a monoid in the category of endofunctors.", ["monad"]),
        ("- **Entropy**: how many ways there are to be so.", ["Entropy"]),
        ("limit = 17 # most users at a time\n", ["limit"]),
        ("try:\n    go()\nexcept ValueError:\n    stay()\n", []),
        ("That is a way, and there are the others.", []),
        ("Go home, said the voice, and then nothing more.", []),
        ("A loop is a loop that is its own way to go on", []),
    ],
)
def test_what_a_text_defines(text, names):
    class Characters:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    found = definitions(by_characters(text), Characters())
    assert [definition.spelled for definition in found] == names
    for definition in found:
        said = "".join(map(chr, definition.said))
        after = text.partition(definition.spelled)[2]
        assert after.lstrip("*").startswith(said) or after.startswith(said)


def test_definitions_ask_which_of_four_names_was_defined():
    tokenizer = load_tokenizer(str(assets.MODEL))
    documents = [Document.of(text, tokenizer) for text in assets.heldout_texts()[:20]]
    task = TASKS["definitions"]
    questions = list(task.ask(task, documents, tokenizer))
    assert len(questions) > 100
    defined = {}
    for document in documents:
        for definition in definitions(document, tokenizer):
            defined.setdefault((tuple(definition.name), tuple(definition.said)), definition)
    for question in questions:
        ((start, end),) = question.answers
        names = [tuple(text[start:end]) for text in question.texts]
        before = {tuple(text[:start]) for text in question.texts}
        assert len(set(names)) == 4
        assert len(before) == 1, "only the names differ"
        said, cue = next(iter(before))[: -len(CUE)], next(iter(before))[-len(CUE) :]
        assert list(cue) == CUE
        assert (names[0], said[-20:]) in defined, "the first name is the true one"
        shown = tokenizer.decode(said)
        for name in names:
            assert f"Name:{tokenizer.decode(name)}\n" not in shown, "no example has it"


def test_arithmetic_is_right_and_asks_for_the_reply_but_its_first_token():
    tokenizer = load_tokenizer(str(assets.MODEL))
    for question in itertools.islice(asked("arithmetic", [], 96, 64, tokenizer), 20):
        (ids,), ((first, last),) = question.texts, question.answers
        assert len(ids) == 160
        before, reply = tokenizer.decode(ids[:96]), tokenizer.decode(ids[first - 1 : last])
        assert before.endswith("<|im_start|>assistant\n"), "a server's prompt ends there"
        problem = before.rpartition("Work out ")[2].partition(".<|im_end|>")[0]
        assert assets.final_answer(reply) == str(eval(problem))
        for line in reply.splitlines()[:-1]:
            sum_, _, result = line.partition(" = ")
            assert str(eval(sum_)) == result


def test_sums_stay_at_or_above_zero():
    rng = random.Random(1)
    for _ in range(300):
        problem, reply = worked_sum(rng)
        assert "-" not in reply.partition("Answer:")[2]
        assert problem.count(" ") in (6, 8), "two or three operations"


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_the_same_each_time_and_asked_of_decode_rows(name):
    tokenizer = load_tokenizer(str(assets.MODEL))
    documents = [Document.of(text, tokenizer) for text in assets.heldout_texts()[:6]]
    task = TASKS[name]
    first, again = (
        list(itertools.islice(task.ask(task, documents, tokenizer), 12)) for _ in range(2)
    )
    assert first == again
    for question in first:
        assert {len(text) for text in question.texts} == {task.length}
        assert len(question.texts) == task.choices
        assert question.answers
        for start, end in question.answers:
            assert task.prompt_tokens < start < end <= task.length


def test_choices_of_a_question_are_in_different_batches():
    order = asking_order(16, 4)
    assert sorted(order) == [(q, c) for q in range(16) for c in range(4)]
    for start in range(0, 64, 16):
        batch = order[start : start + 16]
        assert len({question for question, _ in batch}) == 16
        assert sorted(choice for _, choice in batch) == sorted([0, 1, 2, 3] * 4)


def test_a_word_is_right_if_all_its_tokens_are():
    """Prompt 4, decode 6: the first scored token is token 5."""
    task = Task(4, 6, 1, None)
    question = Question([list(range(10))], [(5, 6), (6, 8), (8, 10)])
    hits = np.array([[True, True, False, True, True]])
    said = Predictions(np.zeros((1, 5), dtype=np.float32), hits, 0.0, 1.0)
    assert judge(task, [question], [(0, 0)], said).tolist() == [True, False, True]


def test_the_true_end_must_be_the_most_likely():
    """Rows in the order of a pass; what comes before the end has no part."""
    task, order = Task(4, 4, 4, None), asking_order(2, 4)
    questions = [Question([list(range(8))] * 4, [(6, 8)])] * 2
    likely = {(0, 0): -1.0, (0, 1): -2.0, (0, 2): -3.0, (0, 3): -1.1}
    likely |= {(1, 0): -1.0, (1, 1): -1.0, (1, 2): -3.0, (1, 3): -4.0}  # a tie is not right
    before = {place: 10.0 * place[1] for place in order}
    rows = [[before[place], likely[place] / 2, likely[place] / 2] for place in order]
    said = Predictions(np.array(rows, dtype=np.float32), np.zeros((8, 3), dtype=bool), 0.0, 1.0)
    assert judge(task, questions, order, said).tolist() == [True, False]


# --- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (6, 1, 0.125), (10, 2, 0.03857421875), (0, 10, 2**-9)],
)
def test_mcnemar(lost, won, p):
    """By hand: (6, 1) is 2 (1 + 7) / 128; (10, 2) is 2 (1 + 12 + 66) / 4096."""
    assert mcnemar_p(lost, won) == mcnemar_p(won, lost) == pytest.approx(p)


def test_mcnemar_of_many_flips_is_the_normal_law():
    z = (5100 - 4900 - 1) / np.sqrt(10_000)  # with the correction for continuity
    normal = 2 * (1 - torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item())
    assert mcnemar_p(5100, 4900) == pytest.approx(normal, rel=1e-3)


def paired(exact, rule, text=None):
    exact, rule = np.array(exact, dtype=bool), np.array(rule, dtype=bool)
    return Paired(exact, rule, np.arange(len(exact)) if text is None else np.array(text))


def test_flips_both_ways_and_relative_loss():
    found = paired([1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0])
    assert (found.lost, found.won) == (2, 1)
    assert found.relative_loss().value == 1 / 4


def test_no_flips_still_has_an_interval():
    """Of 1,000 right none flipped: at 97.5 % fewer than 3.69 would be expected."""
    same = np.ones(1000, dtype=bool)
    loss = paired(same, same).relative_loss()
    assert loss.value == 0
    assert (loss.low, loss.high) == pytest.approx((-0.003689, 0.003689), rel=1e-3)


def test_a_task_that_exact_never_solves_says_nothing():
    found = paired([0, 0], [1, 0])
    assert found.relative_loss() is None
    assert found.items_needed(0.01) is None
    assert found.won == 1


def test_items_needed_is_what_gives_the_half_width():
    """60 % right, 4.7 % flips: about 20,000 items for half a percent."""
    kinds = [(1, 1)] * 5765 + [(1, 0)] * 235 + [(0, 1)] * 235 + [(0, 0)] * 3765
    found = paired(*zip(*kinds, strict=True))
    expected = 1.96 * np.sqrt(470) / 6000
    assert found.half_width() == pytest.approx(expected, rel=0.1)
    assert found.items_needed(0.005) == pytest.approx(20_000, rel=0.2)


def test_items_of_one_text_count_as_one_text():
    """Ten copies of each item in one text: the interval of the single items."""
    rng = np.random.default_rng(0)
    exact, flips = rng.random(400) < 0.7, rng.random(400) < 0.3
    single = paired(exact, exact ^ flips)
    copied = paired(*(np.repeat(v, 10) for v in (exact, exact ^ flips)), np.repeat(range(400), 10))
    apart = paired(copied.exact, copied.rule)
    assert copied.half_width() == pytest.approx(single.half_width(), rel=1e-6)
    assert apart.half_width() < 0.4 * single.half_width()


def test_intervals_cover_the_loss_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        exact = rng.random(600) < 0.7
        rule = np.where(exact, rng.random(600) > 0.1, rng.random(600) < 0.1)
        loss = paired(exact, rule).relative_loss()
        hits += loss.low <= (0.7 * 0.1 - 0.3 * 0.1) / 0.7 <= loss.high
    assert 180 <= hits <= 199


def test_joined_parts_keep_texts_apart():
    parts = [paired([1, 1], [1, 0], [0, 0]), paired([1, 0], [1, 1], [0, 1])]
    assert Paired.join(parts).text.tolist() == [0, 0, 1, 2]


def test_the_worst_task_is_the_one_whose_interval_reaches_highest():
    def row(task, loss, high, batch=16):
        interval = None if loss is None else [loss - 0.01, high]
        of = {"rule": "sere", "settings": {"select_top_k": 2}, "batch": batch, "task": task}
        return {**of, "relative_loss": loss, "relative_loss_95": interval, "items": 7}

    rows = [row("a", None, None), row("b", 0.02, 0.03), row("c", 0.01, 0.05), row("b", 0, 1, 4)]
    worst = worst_tasks(rows)
    assert [(found["batch"], found["task"]) for found in worst] == [(16, "c"), (4, "b")]
    assert worst_tasks(rows[:1]) == []


# --- a small run -------------------------------------------------------------------------------


def run(similarity, out, *arguments, data=HELD_OUT):
    where = ["--similarity", similarity, "--data", str(data), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(app, ["tasks", str(assets.MODEL), *where, *map(str, arguments)])


@pytest.fixture(scope="module")
def small(similarity, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks") / "tasks-demo.json"
    policies = "S=4,S=1:min_primary_experts=0,rule=margin:tau=0.05"
    done = run(similarity, out, "--policies", policies, "--batches", "8", "--most-items", "30")
    assert done.exit_code == 0, done.output
    return out, done


def test_every_task_is_measured(small):
    out, done = small
    document = load_result(out)
    rows = document["rows"]
    assert [row["task"] for row in rows] == [name for name in TASKS for _ in range(3)]
    for row in rows:
        assert row.keys() == FIELDS
        assert row["items"] >= 30
        assert row["right_exact"] - row["right"] == row["lost"] - row["won"]
        if row["rule"] == "sere" and row["settings"] == {"select_top_k": 4}:
            assert row["lost"] == row["won"] == 0, "S = K changes nothing"
            assert (row["relative_loss"], row["mcnemar_p"]) == (0, 1)
    strongest = [row for row in rows if row["settings"].get("select_top_k") == 1]
    assert sum(row["lost"] for row in strongest) > 20
    assert {row["task"] for row in strongest if row["relative_loss"] > 0.1} >= {"arithmetic"}
    by_task = {row["task"]: row["right_exact"] / row["items"] for row in rows}
    assert by_task["arithmetic"] > 0.8
    assert by_task["continuation"] > 0.5, "a guess is right one time in four"
    assert by_task["copying"] > by_task["cloze"] + 0.1, "what was just there is easier"
    assert by_task["definitions"] > 0.35, "a guess is right one time in four"
    assert {row["ended_by"] for row in rows} == {"most_items"}
    said = " ".join(done.output.split())
    assert "give a higher --most-items" in said
    worst = document["worst"]["sere S=1 floor=0, batch 8"]
    assert worst["task"] == "arithmetic"
    assert "batch 8: worst is arithmetic, " in said


def test_append_goes_on_where_it_stopped(small, similarity, tmp_path):
    out = tmp_path / "part.json"
    document = json.loads(small[0].read_text())
    kept = [row for row in document["rows"] if row["task"] != "cloze"]
    marked = [row | {"items": 7_777_777} for row in kept]
    out.write_text(json.dumps(document | {"rows": marked}))
    policies = "S=4,S=1:min_primary_experts=0,rule=margin:tau=0.05"
    again = ["--policies", policies, "--batches", "8", "--most-items", "30", "--append"]
    done = run(similarity, out, *again)
    assert done.exit_code == 0, done.output
    rows = load_result(out)["rows"]
    assert rows[: len(marked)] == marked, "they were not measured again"
    assert rows[len(marked) :] == document["rows"][:3], "the same items, the same answers"
    assert load_result(out)["command"].count(" && ") == 1
    done = run(similarity, out, *again, "--half-width", "0.01")
    assert done.exit_code == 2
    assert "half_width is 0.005" in " ".join(done.output.split())


# --- bad input ---------------------------------------------------------------------------------


def test_unknown_task_is_refused():
    with pytest.raises(SereError, match="'chess' is none of cloze, continuation"):
        check_tasks(("cloze", "chess"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chess", "--policies", "S=2"], "'chess' is none of"),
        ([], "nothing to measure: give --policies"),
        (["--policies", "off"], "compared with the exact model anyway"),
        (["--policies", "S=2", "--half-width", "0"], "--half-width = 0.0: must be at least"),
        (["--policies", "S=9"], "select_top_k"),
        (["--policies", "rule=margin:tau=0.1:balance_ranks=true"], "no rules that look at ranks"),
    ],
)
def test_bad_input_is_refused(similarity, tmp_path, arguments, message):
    done = run(similarity, tmp_path / "out.json", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("name", ["cloze", "continuation", "copying", "definitions"])
def test_text_too_short_is_refused(similarity, tmp_path, name):
    text = tmp_path / "short.txt"
    text.write_text("def add(left, right):\n    return left + right\n")
    done = run(similarity, tmp_path / "o.json", "--policies", "S=2", "--tasks", name, data=text)
    assert done.exit_code == 2
    assert f"--tasks {name}: data = " in done.output
    assert "gives 0 questions" in done.output
    assert ("`NAME is a`" if name == "definitions" else "give more or longer text") in done.output


def test_sums_of_too_many_tokens_end():
    """A tokenizer with a token for each character: a reply does not fit, and nothing hangs."""

    class Characters:
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    assert list(asked("arithmetic", [], 96, 20, Characters())) == []
    question = next(asked("arithmetic", [], 96, 64, Characters()))
    assert spelled(question)[0].splitlines()[-1].startswith("Answer: ")


def test_settings_are_told_once_and_without_defaults():
    named = {"S=2": {"mode": "on", "rule": "sere", "select_top_k": 2, "union": "global"}}
    assert as_settings(named, [{"select_top_k": 1}]) == [
        {"rule": "sere", "select_top_k": 2},
        {"rule": "sere", "select_top_k": 1},
    ]
    with pytest.raises(SereError, match="S=2 is there twice"):
        as_settings(named, [{"select_top_k": 2}])
