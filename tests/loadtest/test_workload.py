import json
import random

import pytest

from sere_ray.loadtest.driver import Target
from sere_ray.loadtest.workload import (
    Entry,
    load_keys,
    load_trace,
    load_workload,
    text_workload,
    to_lines,
)
from sere_ray.util.errors import SereError


def test_a_seed_says_all(tmp_path):
    options = {"requests": 20, "prompt_words": (5, 9), "output_tokens": (2, 4)}
    entries = text_workload(**options, seed=1)
    assert entries == text_workload(**options, seed=1) != text_workload(**options, seed=2)
    assert {len(entry.prompt.split()) for entry in entries} <= set(range(5, 10))
    assert {entry.max_tokens for entry in entries} <= {2, 3, 4}
    (tmp_path / "w.jsonl").write_text(to_lines(entries))
    assert load_workload(tmp_path / "w.jsonl") == entries


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{nonsense", ["line 2", "not a JSON object"]),
        ('{"prompt": "a"}', ["line 2", "max_tokens"]),
        ('{"prompt": "a", "max_tokens": 0}', ["line 2", "max_tokens", "greater"]),
        ('{"prompt": "a", "max_tokens": 1, "tire": "exact"}', ["line 2", "tire"]),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path, has_words):
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 1}\n' + line + "\n")
    with pytest.raises(SereError) as error:
        load_workload(path)
    has_words(str(error.value), "w.jsonl", *words)


def test_an_entry_says_how_its_answer_is_sampled(tmp_path):
    file = tmp_path / "load.jsonl"
    file.write_text(
        '{"prompt": "a", "max_tokens": 2}\n{"prompt": "b", "max_tokens": 2, "temperature": 1}\n'
    )
    target = Target("http://127.0.0.1/v1", "m")
    bodies = [
        json.loads(target.request(entry, random.Random(0), None)["body"])
        for entry in load_workload(file)
    ]
    assert [body["temperature"] for body in bodies] == [0, 1]


def test_missing_and_empty_files(tmp_path, has_words):
    with pytest.raises(SereError) as error:
        load_workload(tmp_path / "none.jsonl")
    has_words(str(error.value), "none.jsonl", "No such file")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SereError) as error:
        load_workload(tmp_path / "empty.jsonl")
    has_words(str(error.value), "no request in it")


def test_mooncake_trace(tmp_path):
    records = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 520, "output_length": 7, "hash_ids": [1, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    first, second = load_trace(path, speed=2.0)
    assert (first.at, second.at) == (0.0, 1.5)
    assert (first.max_tokens, second.max_tokens) == (7, 5)
    one, other = first.prompt.split(), second.prompt.split()
    assert (len(one), len(other)) == (520, 600)
    assert one[:512] == other[:512]
    assert one[512:] != other[512:520]


def test_burst_gpt_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,10,3,13,Conversation log\n45,ChatGPT,7,0,7,Conversation log\n"
    )
    assert [(e.at, len(e.prompt.split()), e.max_tokens) for e in load_trace(path)] == [(0, 10, 3)]


@pytest.mark.parametrize(("name", "text"), [("t.csv", "a,b\n1,2\n"), ("t.jsonl", '{"a": 1}\n')])
def test_what_is_no_trace(name, text, tmp_path, has_words):
    (tmp_path / name).write_text(text)
    with pytest.raises(SereError) as error:
        load_trace(tmp_path / name)
    has_words(str(error.value), name, "line", "as ")


def test_keys_and_tiers(tmp_path):
    (tmp_path / "keys.yaml").write_text("- {key: sk-a, weight: 3}\n- {key: sk-b, tier: exact}\n")
    one, other = load_keys(tmp_path / "keys.yaml")
    plain, own = Entry(prompt="p", max_tokens=1), Entry(prompt="p", max_tokens=1, tier="default")
    assert one.headers(plain) == {"Authorization": "Bearer sk-a"}
    assert other.headers(plain) == {"Authorization": "Bearer sk-b", "x-sere-tier": "exact"}
    assert other.headers(own)["x-sere-tier"] == "default"


def test_messages_about_keys_show_none(tmp_path, has_words):
    path = tmp_path / "keys.yaml"
    for text in ("- {key: sk-secret, wait: 3}", "{key: sk-secret}", "- {key: [sk-secret"):
        path.write_text(text)
        with pytest.raises(SereError) as error:
            load_keys(path)
        has_words(str(error.value), "keys.yaml")
        assert "secret" not in str(error.value)
