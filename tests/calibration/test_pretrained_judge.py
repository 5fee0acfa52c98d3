"""The recipe of the pretrained judges: the cut, the training forward pass, and a tiny run."""

import fcntl
import importlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tests.calibration.taken_up import check_taken_up

CALIBRATION = Path(__file__).resolve().parents[2] / "calibration"
RECIPE = CALIBRATION / "pretrained_judge"
GATES = ("softmax", "sigmoid")


@pytest.fixture(scope="module")
def recipe():
    path = list(sys.path)
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("upcycle")
    sys.path[:] = path
    here = [name for name, module in sys.modules.items() if _is_of_a_recipe(module)]
    for name in here:
        sys.modules.pop(name)


def _is_of_a_recipe(module):
    return str(getattr(module, "__file__", None)).startswith(str(CALIBRATION))


@pytest.fixture(scope="module")
def dense():
    """Two layers, whose MLPs count for so much that a segment too few would show."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for parameter in layer.mlp.parameters():
            parameter.data *= 5
    return model


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    """What prepare.py writes, but for the weights: random tokens, a byte-level tokenizer."""
    where = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    for split, size in (("train", 20_000), ("heldout", 3000)):
        with lzma.open(where / f"{split}.npy.xz", "wb") as file:
            np.save(file, draw.integers(0, 320, size, dtype=np.uint16))
    corpus = importlib.import_module("corpus")
    corpus.train_tokenizer(["a b c def"], 320).save_pretrained(where / "tokenizer")
    (where / "source.json").write_text("{}")
    return where


def arguments(folder, out, gate, **others):
    sizes = {"--rows": 1, "--steps": 4, "--heldout-windows": 2, "--gate": gate, **others}
    pairs = {"--text": folder, "--out": out, **sizes}
    return [str(word) for pair in pairs.items() for word in pair]


def start(recipe, dense, folder, out, gate, **others):
    args = recipe.parse_args(arguments(folder, out, gate, **others))
    out.mkdir(exist_ok=True)
    stream = recipe.read_tokens(folder, "train")
    model, rows = recipe.start_model(dense, stream, args)
    return recipe.Upcycle(model, stream, args), rows


def clear_gates(recipe, dense, scale):
    """Gates by which one pair wins clearly: its rows are far from the others, its twins are not."""
    cut = importlib.import_module("cut")
    draw = torch.Generator().manual_seed(1)
    level = torch.randn(cut.PAIRS, 1, 1, 64, generator=draw) * scale
    twin = torch.randn(cut.PAIRS, 1, cut.SEGMENTS, 64, generator=draw) * scale / 1e4
    return [torch.cat([level + twin, level - twin], 1).flatten(0, 2) for _ in dense.model.layers]


@pytest.mark.parametrize("gate", GATES)
def test_the_cut_model_is_the_dense_one_where_one_pair_wins(recipe, dense, gate):
    gates = clear_gates(recipe, dense, 0.3)
    ids = torch.arange(300).view(2, 150)
    moe = recipe.cut(dense, gates, gate, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        expected, found = dense(ids).logits, moe(ids).logits
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A few rows are between two pairs and miss a segment; the others differ by the twins' weights.
    assert float((off < 1e-3).float().mean()) > 0.9
    moe.model.layers[0].mlp.experts.down_proj.data *= 1.01
    with torch.no_grad():
        off = (moe(ids).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float((off < 1e-3).float().mean()) < 0.1  # so the bound can be missed


@pytest.mark.parametrize("gate", GATES)
def test_gates_read_the_wanted_share(recipe, dense, folder, tmp_path, gate):
    _, few = start(recipe, dense, folder, tmp_path, gate, **{"--target": 0.55})
    _, many = start(recipe, dense, folder, tmp_path, gate, **{"--target": 0.8})
    for low, high in zip(few, many, strict=True):
        assert low.offset > high.offset
        assert high.union == pytest.approx(0.8, abs=0.06)
        assert 0.5 < low.union < 0.72


@pytest.mark.parametrize("gate", GATES)
def test_what_is_trained_is_what_the_stock_model_computes(recipe, dense, folder, tmp_path, gate):
    run, _ = start(recipe, dense, folder, tmp_path, gate)
    if gate == "sigmoid":  # a bias that decides, and a shared expert that says something
        for layer in run.model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
            layer.mlp.shared_experts.down_proj.weight.data.normal_(0, 0.1)
    routed = importlib.import_module("routed")
    ids = run.rows()[:, :257]
    with torch.no_grad():
        x, routings = routed.forward(run.model, ids[:, :-1])
        own = x @ run.model.lm_head.weight.T
        logits = run.model.eval()(ids[:, :-1]).logits
    found = cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten())
    stock = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(found) == pytest.approx(float(stock), rel=1e-5)
    for routing in routings:
        assert float(routing.load.sum()) == 8 * 256
        assert 8 / 64 < float(routing.union) <= 1
        assert float(routing.balance) > 0.9


@pytest.mark.parametrize("gate", GATES)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(recipe, dense, folder, tmp_path, gate):
    whole, second = check_taken_up(
        lambda name: start(recipe, dense, folder, tmp_path / name, gate)[0]
    )
    assert torch.equal(second.balance.state(), whole.balance.state())
    with pytest.raises(SystemExit, match="give another --out"):
        start(recipe, dense, folder, tmp_path / "parts", gate, **{"--seed": 1})[0].take_up()


def test_balance_follows_the_union(recipe, dense, folder, tmp_path):
    routed = importlib.import_module("routed")
    load = torch.arange(64.0)
    below, above = (
        [routed.Routing(torch.tensor(2.0, requires_grad=True), load, torch.tensor(share))] * 2
        for share in (0.5, 0.7)
    )
    by_loss = start(recipe, dense, folder, tmp_path / "a", "softmax")[0].balance
    before = by_loss.state().clone()
    by_loss.after(below)
    assert (by_loss.state() > before).all()
    by_loss.after(above)
    by_loss.after(above)
    assert (by_loss.state() < before).all()
    assert float(by_loss.term(below).detach()) == pytest.approx(2 * float(by_loss.state().sum()))
    run = start(recipe, dense, folder, tmp_path / "b", "sigmoid")[0]
    bias = run.model.model.layers[0].mlp.gate.e_score_correction_bias
    run.balance.after(above)
    assert not bias.any()
    run.balance.after(below)
    assert (bias[:32] > 0).all()
    assert (bias[32:] < 0).all()


@pytest.mark.parametrize("gate", GATES)
def test_a_recipe_that_is_started_twice(recipe, dense, folder, tmp_path, gate, monkeypatch, capsys):
    from sere_ray.calibration.collect import find_moe_layers, moe_shape
    from sere_ray.calibration.loading import load_model

    # The weights are no part of a test; reading them is tried below.
    monkeypatch.setattr(recipe, "open_dense", lambda *_: dense)
    recipe.main(arguments(folder, tmp_path, gate))
    (made,) = (path for path in tmp_path.iterdir() if path.is_dir())
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["run"]["steps"] == 4
    assert set(metrics["heldout_perplexity"]) == {"dense", "start", "after"}
    assert 8 < metrics["experts_read"]["4"]["mean"] < metrics["experts_read"]["64"]["mean"] <= 64
    model = load_model(str(made), revision=None, device=torch.device("cpu"), dtype="float32")
    shape = moe_shape(model, find_moe_layers(model))
    assert (shape.num_experts, shape.top_k, shape.layers) == (64, 8, (0, 1))
    if gate == "sigmoid":
        kept = [layer.selection_bias for layer in find_moe_layers(model).values()]
        assert all(bias.dtype == torch.float32 for bias in kept)
        with safe_open(made / "model.safetensors", "pt") as weights:  # for vLLM
            head, embedding = map(
                weights.get_tensor, ("lm_head.weight", "model.embed_tokens.weight")
            )
        assert torch.equal(head, embedding)
    digest = metrics["weights_sha256"]

    capsys.readouterr()
    recipe.main(arguments(folder, tmp_path, gate))  # it is done
    assert "is done" in capsys.readouterr().out
    assert json.loads((made / "metrics.json").read_text())["weights_sha256"] == digest
    with pytest.raises(SystemExit, match="give another --out"):
        recipe.main(arguments(folder, tmp_path, gate, **{"--steps": 5}))
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another run works there"):
            recipe.main(arguments(folder, tmp_path, gate))


def test_a_query_is_turned_back_to_halves(recipe):
    source = importlib.import_module("source")
    weight = torch.randn(2 * 8, 3)
    # llama.cpp's `permute`, which the file was written with
    side_by_side = weight.view(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)
    assert torch.equal(source.halves_apart(side_by_side, 2), weight)
    assert not torch.equal(side_by_side, weight)


def test_weights_travel_in_parts(recipe, tmp_path, monkeypatch):
    source = importlib.import_module("source")
    monkeypatch.setattr(source, "PART_BYTES", 10)
    content = bytes(range(25))
    parts = source.write_parts(content, tmp_path)
    assert [part.stat().st_size for part in parts] == [10, 10, 5]
    assert source.whole_file(tmp_path) == content
    with pytest.raises(SystemExit, match=r"prepare\.py"):
        source.whole_file(tmp_path / "none")


def test_names_of_a_gguf_file(recipe):
    source = importlib.import_module("source")
    assert source.name_of("blk.3.ffn_up.weight", 30) == "model.layers.3.mlp.up_proj.weight"
    assert source.name_of("blk.3.ffn_up.weight", 3) is None
    assert source.name_of("output_norm.weight", 30) == "model.norm.weight"


def test_inputs_that_are_alike_give_a_gate_all_the_same(recipe):
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.ones(1000, 16), torch.randn(24, 16, generator=draw)])
    rows = recipe.gate_rows(x, 0.6, 3.0, draw)
    assert rows.weight.isfinite().all()
