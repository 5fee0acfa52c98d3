"""`sere-ray compare`: judging by hand, pairing, lm-eval's files, whole runs, what is refused.

The endpoint is a small real server; lm-eval's program is one that writes what lm-eval 0.4.13 wrote.
"""

import json
import random
import stat
import sys

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from sere_ray.cli.main import app
from sere_ray.loadtest.compare.ask import Endpoint, Reply
from sere_ray.loadtest.compare.json_task import judged, made_schema
from sere_ray.loadtest.compare.lm_eval_task import failure, read_samples, task_name
from sere_ray.loadtest.compare.long_task import is_sound, pieces, repetition
from sere_ray.loadtest.compare.scores import Scores, compared
from sere_ray.util.errors import DataError, SereError
from sere_ray.util.results import load_result
from tests.loadtest.servers import Control, serving, whole_answer

SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 3}},
    "required": ["size"],
    "additionalProperties": False,
}


# --- judging -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ('{"size": 3}', (True, True)),
        ('```json\n{"size": 4}\n```', (True, True)),
        ('<think>{"size": 0}</think>\n{"size": 4}', (True, True)),
        ('{"size": 2}', (False, True)),
        ('{"size": 3, "more": 1}', (False, True)),
        ("{}", (False, True)),
        ('{"size": 3', (False, False)),
        ('Here it is: {"size": 3}', (False, False)),
        ('{"size": NaN}', (False, False)),
        ("", (False, False)),
        ("[" * 100_000, (False, False)),
    ],
)
def test_json_is_judged_by_its_schema(text, marks):
    assert judged(text, SCHEMA) == marks


def test_made_schemas_are_schemas_and_the_same_each_time():
    first, again = ([made_schema(random.Random(seed)) for seed in range(40)] for _ in range(2))
    assert first == again
    for schema in first:
        Draft202012Validator.check_schema(schema)
        assert not Draft202012Validator(schema).is_valid({}), "no empty object passes"
        assert any(part["type"] == "object" for part in schema["properties"].values())
    assert len({json.dumps(schema) for schema in first}) == 40


def test_repetition_is_the_share_of_pieces_that_were_there_before():
    assert repetition("") == repetition("short") == 0
    assert repetition("".join(map(chr, range(100, 200)))) == 0
    assert repetition("a" * 17) == 0.5, "two 16-grams, one new"
    assert repetition("loop again and " * 40) > 0.9


@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("def area(width, height):\n    return width * height\n", True),
        ("über alles, 日本語のテキスト", True),
        ("and so on " * 60, False),
        ("broken \N{REPLACEMENT CHARACTER} character", False),
        ("control \x07 character", False),
        (" \n\n ", False),
    ],
)
def test_sound_text(text, sound):
    assert is_sound(Reply(text, 7, "length")) is sound


def test_pieces_are_beginnings_of_long_documents(tmp_path):
    data = tmp_path / "texts.jsonl"
    texts = ["a" * 399, "b" * 400, "c" * 2_399 + "d", "e" * 2_400]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = pieces(str(data), "text")
    assert [piece[0] for piece in found] == ["b", "c", "c", "e", "e"]
    assert {len(piece) for piece in found} == {400}
    assert len(pieces(None, "text")) > 50, "the demo's own text"
    data.write_text(json.dumps({"text": "a" * 399}) + "\n")
    with pytest.raises(DataError, match="no document has 400 characters"):
        pieces(str(data), "text")


# --- pairing -----------------------------------------------------------------------------------


def scores(right, tokens):
    items = {str(i): bool(value) for i, value in enumerate(right)}
    return Scores("t", "m", items, {"tokens": {str(i): float(v) for i, v in enumerate(tokens)}})


def test_items_are_paired_by_name():
    exact = scores([1, 1, 1, 1, 0], [10, 10, 10, 10, 10])
    policy = scores([1, 0, 0, 1, 1], [10, 30, 10, 10, 10])
    turned = Scores("t", "m", dict(reversed(policy.right.items())), policy.measures)
    row = compared(exact, turned, 0.005)
    assert (row["items"], row["right_exact"], row["right"]) == (5, 4, 3)
    assert (row["lost"], row["won"], row["relative_loss"]) == (2, 1, 0.25)
    assert (row["tokens_mean_exact"], row["tokens_mean"], row["tokens_max"]) == (10, 14, 30)
    assert row["tokens_change"] == 4
    low, high = row["tokens_change_95"]
    assert low < 4 < high


def test_other_items_are_refused():
    with pytest.raises(SereError, match="1 items were answered under one policy only"):
        compared(scores([1, 1], [1, 1]), scores([1], [1]), 0.005)


# --- lm-eval -----------------------------------------------------------------------------------


def record(doc, name, answer, **metrics):
    """As lm-eval 0.4.13 writes it, but for fields that we do not read."""
    return {
        "doc_id": doc,
        "resps": [[answer]],
        "filter": name,
        "metrics": list(metrics),
        **metrics,
    }


def write_samples(folder, task, records):
    path = folder / f"samples_{task}_2026-11-30T16-05-10.311184.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_samples_give_a_score_for_each_filter_and_metric_of_0_or_1(tmp_path):
    records = [
        record(0, "strict-match", "Answer: 3", exact_match=1.0, bleu=0.4),
        record(1, "strict-match", "no", exact_match=0.0, bleu=1.0),
        record(0, "none", "Answer: 3", acc=True),
        record(1, "none", "no", acc=False),
    ]
    strict, plain = read_samples(write_samples(tmp_path, "my_task_2", records))
    assert (strict.task, strict.scored_by) == ("my_task_2", "exact_match, strict-match")
    assert strict.right == plain.right == {"0": True, "1": False}
    assert plain.scored_by == "acc"
    assert strict.measures == {"characters": {"0": 9.0, "1": 2.0}}


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("...\nValueError: Tasks not found: chess\n", "knows no such task"),
        (
            "NotImplementedError: Loglikelihood is not supported for chat completions.",
            "prompts, which are always exact",
        ),
        ("Traceback\nOSError: disk is full\n\n", "lm_eval failed: OSError: disk is full"),
        ("", "it said nothing"),
    ],
)
def test_failures_of_lm_eval_are_one_line(log, words):
    assert words in failure(log)
    assert "\n" not in failure(log)


def test_a_task_may_be_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: my_task\nprocess_results: !function utils.process\n")
    assert task_name(str(file)) == ("my_task", tmp_path)
    assert task_name("gsm8k") == ("gsm8k", None)
    for content, words in (
        ("tusk: my_task", "no key 'task'"),
        ("- task", "no key 'task'"),
        ("task: [", "not a YAML file"),
    ):
        file.write_text(content)
        with pytest.raises(SereError, match=words) as error:
            task_name(str(file))
        assert str(file) in str(error.value)
    with pytest.raises(SereError, match=r"none\.yaml: No such file"):
        task_name(str(tmp_path / "none.yaml"))


# --- whole runs --------------------------------------------------------------------------------


def run(url, out, *arguments):
    return CliRunner().invoke(app, ["compare", url, "--out", str(out), *map(str, arguments)])


class Model:
    """Answers that are worse under S = 1: every second object lacks its keys, texts loop."""

    def __init__(self, control):
        self.control = control

    def __call__(self, body):
        return whole_answer(self.say(body))

    def say(self, body):
        broken = self.control.policy["mode"] == "on" and self.control.policy["select_top_k"] == 1
        if "prompt" in body:
            return "and so on " * 60 if broken else f"a text of its own, {body['seed']}"
        schema = json.loads(body["messages"][0]["content"].partition("\n")[2])
        return json.dumps({} if broken and body["seed"] % 2 else made(schema))


def made(schema):
    """An object that satisfies a schema of ours."""
    kind = schema["type"]
    if kind == "object":
        return {key: made(part) for key, part in schema["properties"].items()}
    if kind == "array":
        return [schema["items"]["minimum"] + i for i in range(schema["minItems"])]
    if kind == "string" and "enum" in schema:
        return schema["enum"][0]
    if kind == "string" and "pattern" in schema:
        return "A" * int(schema["pattern"][7]) + "-000"
    if kind == "string":
        return "x" * schema["minLength"]
    return {"integer": lambda: schema["minimum"], "boolean": lambda: True}.get(
        kind, lambda: schema["exclusiveMinimum"] + 1
    )()


@pytest.fixture
def deployment():
    control = Control()
    with serving(control=control, answer=Model(control)) as server:
        server.control = control
        yield server


def test_built_in_tasks_are_paired_with_the_exact_model(deployment, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    out = tmp_path / "compare.json"
    arguments = ["--tasks", "json,long", "--policies", "S=2,S=1", "--items", "40"]
    done = run(deployment.url, out, *arguments, "--max-tokens", 600, "--concurrency", 4)
    assert done.exit_code == 0, done.output
    document = load_result(out)
    rows = {(row["policy"], row["task"], row["scored_by"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 6
    same, worse = (rows[policy, "json", "schema"] for policy in ("S=2", "S=1"))
    assert (same["right_exact"], same["lost"], same["won"], same["relative_loss"]) == (40, 0, 0, 0)
    assert (worse["lost"], worse["won"], worse["relative_loss"]) == (20, 0, 0.5)
    assert worse["mcnemar_p"] < 1e-5
    assert rows["S=1", "json", "parses"]["lost"] == 0
    long = rows["S=1", "long", "sound, 600 tokens at most"]
    assert (long["right"], long["right_exact"], long["items"]) == (0, 40, 40)
    assert long["repetition_mean_exact"] < 0.1 < 0.9 < long["repetition_mean"]
    assert document["worst"]["S=1"]["task"] == "long"
    assert "S=1: worst is long: sound" in " ".join(done.output.split())
    asked = [body for _, body in deployment.requests]
    assert {body["max_tokens"] for body in asked} == {600}
    assert {body["temperature"] for body in asked} == {0}
    assert {headers["Authorization"] for headers, _ in deployment.requests} == {"Bearer sk-mine"}
    for key in ("messages", "prompt"):
        questions = [json.dumps(body[key]) for body in asked if key in body]
        assert len(questions) == 120
        assert len(set(questions)) == 40, "the same ones under each policy"
    assert deployment.control.history[-1] == ("on", 3), "as it was found"


LM_EVAL = """#!{python}
import json, pathlib, sys, urllib.request
options = sys.argv[1:]
folder = pathlib.Path(options[options.index("--output_path") + 1]) / "tiny"
folder.mkdir()
if "chess" in options:
    sys.exit("ValueError: Tasks not found: chess")
said = dict(part.split("=") for part in options[options.index("--model_args") + 1].split(","))
base = said["base_url"].removesuffix("/v1/chat/completions")
policy = json.load(urllib.request.urlopen(base + "/sere/policy"))["policy"]
wrong = policy["mode"] == "on" and policy["select_top_k"] == 1
pathlib.Path({log!r}).write_text(json.dumps(options))
with open(folder / "samples_sums_2026-11-30T16-05-10.311184.jsonl", "w") as file:
    for doc in range(10):
        score = {{"exact_match": float(not wrong or doc > 3)}}
        score = {{"bleu": 0.5}} if "soft" in options else score
        record = {{"doc_id": doc, "resps": [["Answer"]], "filter": "none", "metrics": list(score)}}
        print(json.dumps(record | score), file=file)
"""


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """A program that scores by the policy that runs; the file of its last options."""
    folder, log = tmp_path / "bin", tmp_path / "options.json"
    folder.mkdir()
    program = folder / "lm_eval"
    program.write_text(LM_EVAL.format(python=sys.executable, log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    return log


def test_tasks_of_lm_eval_are_paired(deployment, lm_eval, tmp_path):
    task, out = tmp_path / "sums.yaml", tmp_path / "compare.json"
    task.write_text("task: sums\n")
    arguments = ["--tasks", task, "--policies", "S=1", "--lm-eval-options", "--num_fewshot 5"]
    done = run(deployment.url, out, *arguments, "--concurrency", 7)
    assert done.exit_code == 0, done.output
    (row,) = load_result(out)["rows"]
    assert (row["task"], row["scored_by"], row["items"]) == ("sums", "exact_match", 10)
    assert (row["lost"], row["won"], row["relative_loss"]) == (4, 0, 0.4)
    assert row["characters_mean"] == 6
    options = json.loads(lm_eval.read_text())
    for name, value in (
        ("--tasks", "sums"),
        ("--include_path", str(tmp_path)),
        ("--num_fewshot", "5"),
        (
            "--model_args",
            f"model=tiny,base_url={deployment.url}/v1/chat/completions,num_concurrent=7",
        ),
    ):
        assert options[options.index(name) + 1] == value
    assert "--limit" not in options


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "policies", "words"),
    [
        ("chess", "S=1", ["--tasks chess: lm-eval knows no such task"]),
        ("soft", "S=1", ["--tasks soft: none of its metrics says right or wrong"]),
        ("missing.yaml", "S=1", ["--tasks missing.yaml: No such file"]),
        ("json,json", "S=1", ["--tasks: 'json' is there twice"]),
        ("json", "off", ["--policies: 'off'", "exact model anyway"]),
        ("json", "fast", ["--policies: 'fast': must be off, observe"]),
        ("json", "missing.yaml", ["missing.yaml: not a readable YAML file"]),
        ("json", "rule=margin", ["--policies: rule=margin", "tau is missing"]),
    ],
)
def test_bad_input_is_one_line(deployment, lm_eval, tmp_path, has_words, tasks, policies, words):
    out = tmp_path / "compare.json"
    done = run(deployment.url, out, "--tasks", tasks, "--policies", policies, "--items", 4)
    assert done.exit_code == 2
    has_words(" ".join(done.output.split()), *words)
    assert sum(line.startswith("error:") for line in done.output.splitlines()) == 1
    assert "Traceback" not in done.output
    assert not out.exists()
    assert deployment.control.policy["select_top_k"] == 3, "as it was found"


def test_a_policy_file_called_off_is_refused(tmp_path):
    file = tmp_path / "off.yaml"
    file.write_text("{similarity: a, select_top_k: 1}")
    done = run("http://127.0.0.1:9", tmp_path / "o.json", "--tasks", "json", "--policies", file)
    assert done.exit_code == 2
    assert "'off': every policy is compared with the exact model" in " ".join(done.output.split())


def test_a_refused_policy_is_refused_before_the_work(tmp_path, has_words):
    control = Control(refuse="auto")
    with serving(control=control, answer=Model(control)) as server:
        out = tmp_path / "compare.json"
        done = run(server.url, out, "--tasks", "json", "--policies", "S=2,auto")
        assert done.exit_code == 2
        has_words(done.output, "mode auto is refused")
        assert server.requests == [], "nothing was asked"
    done = run(server.url, out, "--tasks", "json", "--policies", "S=2")
    assert done.exit_code == 2
    has_words(done.output, "is it up, and --url right?")


def test_without_lm_eval_its_tasks_are_refused_at_once(deployment, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(deployment.url, tmp_path / "o.json", "--tasks", "gsm8k", "--policies", "S=1")
    assert done.exit_code == 2
    assert "pip install 'lm_eval[api]'" in " ".join(done.output.split())
    assert deployment.control.history == []


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [(400, None, "400: not you"), (200, lambda body: {"choices": []}, "no OpenAI answer")],
)
def test_a_refusal_of_the_endpoint_is_told(status, answer, words):
    with serving(status=status, answer=answer) as server:
        endpoint = Endpoint(server.url, "tiny", None, 2, 8)
        with pytest.raises(SereError, match=words):
            endpoint.chats(["one", "two", "three"])


def test_a_server_that_is_busy_is_asked_again(monkeypatch):
    monkeypatch.setattr("sere_ray.loadtest.compare.ask._PAUSE_SECONDS", 0.01)
    answer = {"answer": lambda body: whole_answer("late"), "status": 503}
    with serving(**answer, refused=2) as server:
        (reply,) = Endpoint(server.url, "tiny", None, 1, 8).chats(["one"])
        assert (reply.text, len(server.requests)) == ("late", 3)
    monkeypatch.setattr("sere_ray.loadtest.compare.ask._PATIENCE_SECONDS", 0.05)
    with serving(**answer) as server, pytest.raises(SereError, match="503: not you"):
        Endpoint(server.url, "tiny", None, 1, 8).chats(["one"])
