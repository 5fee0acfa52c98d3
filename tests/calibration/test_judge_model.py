"""The recipe of the judge models: its text, and a tiny training run that is left and taken up."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.calibration.taken_up import check_taken_up

RECIPE = Path(__file__).resolve().parents[2] / "calibration" / "judge_model"
MODULES = ("text", "train", "batches", "corpus", "forward", "measure", "training")
LINES = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(120))


@pytest.fixture(scope="module")
def recipe():
    path = list(sys.path)
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("text"), importlib.import_module("train")
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    text, _ = recipe
    where = tmp_path_factory.mktemp("text")
    documents = [text.Document("some", f"{i}.py", LINES[i:]) for i in range(8)]
    both = {"train": documents, "validation": documents}
    text.write_documents(where / "documents.jsonl.xz", both)
    text.write_jsonl(where / "heldout.jsonl", text.pieces(documents, 4))
    text.train_tokenizer([LINES], 320).save_pretrained(where / "tokenizer")
    (where / "manifest.json").write_text("{}")
    return where


def arguments(folder, out, seed=0):
    sizes = {"--hidden": 64, "--layers": 2, "--rows": 1, "--steps": 4, "--seed": seed}
    pairs = {"--text": folder, "--out": out, **sizes}
    return [str(word) for pair in pairs.items() for word in pair]


def start(train, folder, out, seed=0):
    args = train.parse_args(arguments(folder, out, seed))
    out.mkdir(exist_ok=True)
    tokenizer = train.AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    model = train.Qwen3MoeForCausalLM(train.make_config(tokenizer, args.aux, 64, 2))
    stream = train.token_stream(tokenizer, [LINES] * 4)
    return train.Run(model, stream, args)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(recipe, folder, tmp_path):
    _, train = recipe
    check_taken_up(lambda name: start(train, folder, tmp_path / name))


def test_a_checkpoint_of_other_settings_is_refused(recipe, folder, tmp_path):
    _, train = recipe
    start(train, folder, tmp_path).leave()
    with pytest.raises(SystemExit, match="give another --out"):
        start(train, folder, tmp_path, seed=1).take_up()


def test_what_is_trained_is_what_the_stock_model_computes(recipe, folder, tmp_path):
    _, train = recipe
    run = start(train, folder, tmp_path)
    ids = run.rows()
    with torch.no_grad():
        loss, balance = train.training_losses(run.model, ids)
        logits = run.model.eval()(ids[:, :-1]).logits
    stock = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(stock), rel=1e-4)
    assert 8 <= float(balance) < 10  # 8 = K: all experts alike


def test_the_recipe_writes_a_checkpoint_that_our_tools_load(recipe, folder, tmp_path):
    from sere_ray.calibration.collect import find_moe_layers, moe_shape
    from sere_ray.calibration.loading import load_model, load_tokenizer

    _, train = recipe
    train.main(arguments(folder, tmp_path))
    metrics = json.loads((tmp_path / "judge-seed0" / "metrics.json").read_text())
    assert metrics["run"]["steps"] == 4
    assert metrics["history"][0]["step"] == 1
    assert 1 < metrics["heldout"]["model"]["perplexity"] < 400
    assert len(metrics["experts_on_heldout_text"]["layers"]) == 2
    model = load_model(
        str(tmp_path / "judge-seed0"), revision=None, device=torch.device("cpu"), dtype="float32"
    )
    shape = moe_shape(model, find_moe_layers(model))
    assert (shape.num_experts, shape.top_k, shape.layers) == (64, 8, (0, 1))
    assert load_tokenizer(str(tmp_path / "judge-seed0"))("def f")["input_ids"]


def test_the_default_size_is_what_can_be_carried(recipe):
    _, train = recipe
    args = train.parse_args(["--text", "a", "--out", "b"])
    with torch.device("meta"):
        config = train.make_config(_Vocabulary(), args.aux, args.hidden, args.layers)
        model = train.Qwen3MoeForCausalLM(config)
    assert 50e6 < sum(p.numel() for p in model.parameters()) < 55e6


class _Vocabulary:
    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self):
        return 8192


def test_packages_are_on_one_side_each_and_doubles_are_left_out(recipe):
    text, _ = recipe
    splits = {package: text.split_of(package) for package in map(str, range(400))}
    counts = {name: list(splits.values()).count(name) for name in set(splits.values())}
    assert set(counts) == {"train", "validation", "heldout"}
    assert counts["train"] > 300
    documents = [
        text.Document("a", "one.py", LINES),
        text.Document("b", "two.py", LINES.replace("    ", "\t")),  # the same but for spaces
        text.Document("c", "LICENSE.txt", "word\n" * 200),
        text.Document("d", "table.py", "1, " * 400),
        text.Document("e", "other.py", LINES.replace("value", "number")),
    ]
    assert sorted(d.package for d in text.select(documents)) in (["a", "e"], ["b", "e"])


def test_heldout_documents_that_training_has_are_left_out(recipe):
    text, _ = recipe
    long = [f"a line that is long enough to be told from others, {i}" for i in range(100)]
    known = text.Document("a", "a.py", "\n".join(long))
    half = text.Document("b", "b.py", "\n".join(long[:50] + [f"{line} new" for line in long[:50]]))
    new = text.Document("c", "c.py", "\n".join([*long[:10], *(f"{line} new" for line in long)]))
    kept, shared = text.unseen([half, new], [known])
    assert kept == [new]
    assert shared == pytest.approx(10 / 110)
