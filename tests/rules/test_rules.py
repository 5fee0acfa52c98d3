"""Every rule behind the common interface: against brute force, by hand, and what all must keep."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_ray.rules import (
    EXACT,
    PADDING,
    REROUTABLE,
    RULES,
    Layer,
    merge_repeated,
    name_dropped,
    reroute,
    spare,
)
from sere_ray.rules.margin import (
    UNIT,
    ask,
    demand,
    demand_units,
    is_named,
    keep,
    of_level,
    wanted_of,
)
from tests.rules import rules_oracle

E, K = 12, 3
KNOBS = {
    "none": {},
    "sere": {"select_top_k": 1},
    "topk": {"select_top_k": 2},
    "oea": {"select_top_k": 1},
    "xshare": {"experts": 5},
    "lynx": {"experts": 5},
    "k1k2": {"select_top_k": 2, "normalise_over": 5},
    "ace": {"tau": 0.25},
    "exfold": {"experts": 5},
    "mone": {"experts": 5},
    "margin": {"tau": 0.02, "min_primary_experts": 3, "runners_up": 4},
    "spare": {"tau": 0.02, "min_primary_experts": 3, "runners_up": 4},
}
OWNER = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
FULL = {
    "none": {},
    "sere": {"select_top_k": K},
    "topk": {"select_top_k": K},
    "oea": {"select_top_k": K},
    "xshare": {"experts": E},
    "lynx": {"experts": E},
    "k1k2": {"select_top_k": K, "normalise_over": K},
    "ace": {"tau": 0.0},
    "exfold": {"experts": E},
    "mone": {"experts": E},
    "margin": {"tau": 1.0, "min_primary_experts": E},
    "spare": {"tau": 1.0, "min_primary_experts": E},
}


def draw(rows, seed, shape=()):
    """Ids, weights and scores of a softmax gate that renormalises."""
    generator = torch.Generator().manual_seed(seed)
    scores = (1.5 * torch.randn(*shape, rows, E, generator=generator)).softmax(-1)
    top = scores.topk(K, -1)
    return top.indices, top.values / top.values.sum(-1, keepdim=True), scores


def statistics(seed=10, stands_in=True):
    """What rules read beside similarity; scales of both signs, equal losses, unseen pairs."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    loss = (rand(E, E) * 8).round() / 8
    unseen = (rand(E, E) < 0.2) | torch.eye(E, dtype=torch.bool)
    return {
        "output_norm": rand(E) + 0.2,
        "stand_in_scale": (2 * rand(E, E) - 0.5).masked_fill(unseen, 0.0),
        "stand_in_loss": loss.masked_fill(unseen, 1e30),
        "novice_score": (rand(E) * 6).round(),
        "output_mean": rand(E, 7),
        "directed_scale": (2 * rand(E, E) - 0.5).masked_fill(rand(E, E) < 0.1, 0.0),
        "directed_loss": (rand(E, E) * 8).round() / 8 if stands_in else 1 - rand(E, E) / 4,
        "ace_gsp": rand(E) + 0.5,
        "ace_rcr": rand(E) * 4 + 0.5,
    }


def layer(name, **changes):
    similarity = torch.rand(E, E, generator=torch.Generator().manual_seed(9))
    knobs = {"statistics": statistics(), **KNOBS[name], **changes}
    return Layer(E, similarity=similarity, **knobs)


def kinds_of(*kinds):
    return torch.tensor(kinds, dtype=torch.int8)


def read(ids, weights):
    return set(ids[weights > 0].flatten().tolist())


@pytest.mark.parametrize("name", [name for name in RULES if name != "sere"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_brute_force(name, data):
    rows = data.draw(st.integers(0, 7))
    ids, weights, scores = draw(rows, data.draw(st.integers(0, 10**6)))
    kinds = [data.draw(st.sampled_from([REROUTABLE] * 4 + [EXACT, PADDING])) for _ in range(rows)]
    if rows and data.draw(st.booleans()):
        ids[0, 1] = -1
    knobs = {
        "select_top_k": data.draw(st.integers(1, K)),
        "experts": data.draw(st.integers(1, E)),
        "tau": data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3])),
        "min_primary_experts": data.draw(st.integers(0, E)),
        "runners_up": data.draw(st.integers(1, E)),
        "beta": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "max_per_rank": data.draw(st.sampled_from([None, 1, 2, 4])),
        "balance_ranks": data.draw(st.booleans()),
        "owner": data.draw(st.sampled_from([None, OWNER])),
        "normalise_over": data.draw(st.integers(1, E)),
        "rcr_scale": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "lead": data.draw(st.sampled_from([None, 0.0, 0.5, 0.75, 1.0])),
        "limit": data.draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
        "protect": data.draw(st.sampled_from([None, False, True])),
        "most": data.draw(st.sampled_from([None, 0, 2000, 50_000])),
        "guard": data.draw(st.booleans()),
        "statistics": statistics(data.draw(st.integers(0, 99)), data.draw(st.booleans())),
    }
    of_layer = Layer(E, **knobs)
    new_ids, new_weights = RULES[name].apply(ids, weights, scores, kinds_of(*kinds), of_layer)
    expected = rules_oracle.apply(
        name, ids.tolist(), weights.tolist(), scores.tolist(), kinds, of_layer
    )
    for row, (expected_ids, expected_weights) in enumerate(expected):
        assert new_ids[row].tolist() == expected_ids
        assert new_weights[row].tolist() == pytest.approx(expected_weights, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_leading_dimensions_are_steps_of_their_own(name):
    ids, weights, scores = draw(5, 3, shape=(2, 4))
    kinds = kinds_of(REROUTABLE, EXACT, REROUTABLE, PADDING, REROUTABLE)
    at_once = RULES[name].apply(ids, weights, scores, kinds, layer(name))
    for i in range(2):
        for j in range(4):
            alone = RULES[name].apply(ids[i, j], weights[i, j], scores[i, j], kinds, layer(name))
            assert torch.equal(at_once[0][i, j], alone[0])
            assert torch.equal(at_once[1][i, j], alone[1])


@pytest.mark.parametrize("name", RULES)
def test_exact_and_padding_rows_stay_bit_for_bit(name):
    ids, weights, scores = draw(8, 1)
    kinds = kinds_of(*[REROUTABLE, EXACT, PADDING, REROUTABLE] * 2)
    new_ids, new_weights = RULES[name].apply(ids, weights, scores, kinds, layer(name))
    fixed = kinds != REROUTABLE
    assert torch.equal(new_ids[fixed], ids[fixed])
    assert torch.equal(new_weights[fixed], weights[fixed])
    assert name == "none" or not torch.equal(new_ids, ids)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [1, 6])
def test_full_strength_is_the_identity(name, rows):
    ids, weights, scores = draw(rows, 2)
    kinds = torch.full((rows,), REROUTABLE, dtype=torch.int8)
    new_ids, new_weights = RULES[name].apply(ids, weights, scores, kinds, layer(name, **FULL[name]))
    assert torch.equal(new_ids, ids)
    assert torch.equal(new_weights, weights)


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("k1k2", "exfold", "mone", "spare")])
def test_weights_of_a_row_keep_their_sum_unless_beta_says_otherwise(name):
    ids, weights, scores = draw(16, 4)
    weights *= torch.linspace(0.2, 1.0, 16)[:, None]  # a model that does not renormalise
    kinds = torch.full((16,), REROUTABLE, dtype=torch.int8)
    knobs = {"beta": 1.0} if name == "margin" else {}
    _, new_weights = RULES[name].apply(ids, weights, scores, kinds, layer(name, **knobs))
    assert torch.allclose(new_weights.sum(1), weights.sum(1))


@pytest.mark.parametrize("name", ["oea", "xshare", "lynx", "margin", "spare"])
def test_experts_of_a_row_are_distinct(name):
    ids, weights, scores = draw(6, 5)
    kinds = torch.full((6,), REROUTABLE, dtype=torch.int8)
    new_ids, new_weights = RULES[name].apply(ids, weights, scores, kinds, layer(name))
    for row_ids, row_weights in zip(new_ids, new_weights, strict=True):
        taken = row_ids[row_weights > 0].tolist()
        assert len(set(taken)) == len(taken) > 0
    assert len(read(new_ids, new_weights)) < len(read(ids, weights))


def test_batch_of_one():
    """What a lone row gets: ``margin`` and ``sere`` have a floor, the published rules have none."""
    ids, weights, scores = draw(1, 6)
    one = kinds_of(REROUTABLE)
    by_rank = {"balance_ranks": True, "owner": OWNER}
    for name, knobs in (("margin", {}), ("margin", by_rank), ("sere", {})):
        new_ids, new_weights = RULES[name].apply(
            ids, weights, scores, one, layer(name, min_primary_experts=K, **knobs)
        )
        assert torch.equal(new_ids, ids)
        assert torch.equal(new_weights, weights)
    for name in ("topk", "oea", "xshare", "lynx"):
        knobs = {"experts": 1, "select_top_k": 1}
        new_ids, new_weights = RULES[name].apply(ids, weights, scores, one, Layer(E, **knobs))
        assert read(new_ids, new_weights) == {ids[0, 0].item()}
        assert new_weights.sum().item() == pytest.approx(1.0)


def test_sere_is_the_reference():
    ids, weights, scores = draw(9, 7)
    kinds = torch.full((9,), REROUTABLE, dtype=torch.int8)
    of_layer = layer("sere", threshold=0.8)
    new_ids, new_weights = RULES["sere"].apply(ids, weights, scores, kinds, of_layer)
    expected = reroute(ids, weights, of_layer.similarity, select_top_k=1, threshold=0.8)
    expected, weights = merge_repeated(expected, weights)
    assert torch.equal(new_ids, expected)
    assert torch.equal(new_weights, weights)


def test_margin_by_hand():
    """Two rows, four experts, K = 2, one runner-up, beta 1, stand-ins at half their score."""
    scores = torch.tensor([[0.60, 0.20, 0.19, 0.01], [0.50, 0.02, 0.13, 0.35]])
    ids = torch.tensor([[0, 1], [0, 3]])
    weights = torch.tensor([[0.75, 0.25], [0.50 / 0.85, 0.35 / 0.85]])
    of_layer = Layer(4, tau=0.01, beta=1.0, fill=0.5, runners_up=1)
    # leads: row 0 of expert 1: (.20 - .19) / .80, squared .0002; row 1 of 3: (.35 - .13) / .85,
    # squared .067. So 1 is not kept, and row 0's next best kept one is 3 (2 is nobody's).
    new_ids, new_weights = RULES["margin"].apply(
        ids, weights, scores, kinds_of(REROUTABLE, REROUTABLE), of_layer
    )
    assert new_ids.tolist() == [[0, 3], [0, 3]]
    assert new_weights[0].tolist() == pytest.approx([0.6 / 0.605, 0.005 / 0.605])
    assert torch.equal(new_weights[1], weights[1])


def test_cap_of_xshare_by_hand():
    """Rank 0 holds experts 0..2, rank 1 the rest; 0 and 1 are first choices, above the cap of 1."""
    scores = torch.tensor([[0.5, 0.0, 0.3, 0.1, 0.1], [0.0, 0.5, 0.3, 0.05, 0.15]]).clamp(min=1e-6)
    ids, weights = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0.625, 0.375]] * 2)
    owner = torch.tensor([0, 0, 0, 1, 1])
    for cap, expected in ((None, [[0, 2], [1, 2]]), (1, [[0, 4], [1, 4]]), (3, [[0, 2], [1, 2]])):
        of_layer = Layer(5, experts=4, max_per_rank=cap, owner=owner)
        new_ids, _ = RULES["xshare"].apply(ids, weights, scores, kinds_of(1, 1), of_layer)
        assert new_ids.tolist() == expected


def test_margin_by_levels_by_hand():
    """The busiest rank reads two for its first choices, so the other may keep two as well."""
    first = UNIT + 1
    wanted = torch.tensor([first, first, 9, 8, 7, 3])
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = [first + 8, first + 7, 9 + 3, first + 8, first + 7, 9 + 3]
    assert of_level(wanted, owner).tolist() == expected
    assert torch.equal(of_level(wanted, None), wanted)
    asked = wanted * 2**16 + 1  # each is named once
    for units, third in ((11, True), (12, False)):
        of_layer = Layer(6, tau=units / UNIT, balance_ranks=True, owner=owner)
        assert keep(asked, of_layer).tolist() == [True, True, third, True, True, third]
    asked[4] -= 1  # and this one by nobody
    assert keep(asked, of_layer).tolist() == [True, True, False, True, False, False]


def test_first_choices_count_eight_times_where_ranks_are_in_balance():
    """Two rows; of their demand only that of the largest weight is multiplied."""
    scores = torch.tensor([[0.35, 0.15, 0.10, 0.40], [0.36, 0.30, 0.24, 0.10]])
    ids, weights = torch.tensor([[3, 0], [0, 1]]), torch.tensor([[0.53, 0.47], [0.55, 0.45]])
    kinds, owner = kinds_of(REROUTABLE, REROUTABLE), torch.tensor([0, 0, 1, 1])
    knobs = {"runners_up": 1, "balance_ranks": True, "owner": owner}
    alone = demand(ids, scores, kinds, Layer(4, **knobs))
    both = demand(ids, scores, kinds, Layer(4, **knobs), None, torch.tensor([[0], [0]]))
    row = [round((0.25 / 0.75) ** 2 * UNIT), round((0.12 / 0.66) ** 2 * UNIT)]
    assert both[3] == 8 * alone[3] == pytest.approx(8 * row[0], rel=1e-4)
    assert both[0] - alone[0] == pytest.approx(7 * row[1], rel=1e-4)
    assert both[1] == alone[1]
    asked = ask(ids, weights, scores, kinds, Layer(4, **knobs))
    assert wanted_of(asked).tolist() == both.tolist()
    protected = ask(ids, weights, scores, kinds, Layer(4, runners_up=1))
    assert wanted_of(protected).tolist() == [UNIT + 1, alone[1], 0, UNIT + 1]


@pytest.mark.parametrize("tau", [0.0, 0.002, 0.02, 0.2, 1.0])
def test_on_one_rank_a_level_is_an_expert(tau):
    ids, weights, scores = draw(9, 11)
    kinds = torch.full((9,), REROUTABLE, dtype=torch.int8)
    of_layer = layer("margin", tau=tau, balance_ranks=True)
    asked = ask(ids, weights, scores, kinds, of_layer)
    kept = is_named(asked) & (wanted_of(asked) > demand_units(tau))
    kept = kept | keep(asked, dataclasses.replace(of_layer, tau=1.0))  # the floor
    assert torch.equal(keep(asked, of_layer), kept)


def test_margin_does_not_depend_on_the_order_of_rows():
    ids, weights, scores = draw(64, 8)
    kinds = torch.full((64,), REROUTABLE, dtype=torch.int8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    of_layer = layer("margin")
    straight = RULES["margin"].apply(ids, weights, scores, kinds, of_layer)
    mixed = RULES["margin"].apply(ids[order], weights[order], scores[order], kinds, of_layer)
    assert torch.equal(straight[0][order], mixed[0])
    assert torch.equal(straight[1][order], mixed[1])


def test_lynx_by_hand():
    """Row 0 is certain of expert 0, row 1 hardly prefers 2 to 3: so 3 is worth more than 1."""
    scores = torch.tensor([[0.90, 0.05, 0.03, 0.02], [0.05, 0.05, 0.46, 0.44]])
    ids = torch.tensor([[0, 1], [2, 3]])
    weights = torch.tensor([[0.9, 0.05], [0.46, 0.44]]) / torch.tensor([[0.95], [0.9]])
    of_layer = Layer(4, experts=3, alpha=2.0, base=2.0, depth=8)
    new_ids, _ = RULES["lynx"].apply(
        ids, weights, scores, kinds_of(REROUTABLE, REROUTABLE), of_layer
    )
    assert new_ids.tolist() == [[0, 2], [2, 3]]


def test_dropped_slots_can_be_given_a_name():
    before = torch.tensor([[4, 7, 9], [-1, 2, 5]])
    after = torch.tensor([[4, -1, -1], [-1, 2, 5]])
    assert name_dropped(after, before).tolist() == [[4, 4, 4], [-1, 2, 5]]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.needs_scores])
def test_scores_are_asked_for(name):
    ids, weights, _ = draw(2, 0)
    with pytest.raises(ValueError, match="needs the gate's scores"):
        RULES[name].apply(ids, weights, None, kinds_of(1, 1), layer(name))


def both_steps(name, ids, weights, scores, of_layer):
    """A rule, and what it adds to the layer's output."""
    after = RULES[name].apply(ids, weights, scores, kinds_of(1, 1), of_layer)
    if RULES[name].output:
        RULES[name].output((ids, weights), after, of_layer)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.statistics])
def test_statistics_are_asked_for(name):
    ids, weights, scores = draw(2, 0)
    for lacking in RULES[name].statistics:
        given = {key: value for key, value in statistics().items() if key != lacking}
        of_layer = layer(name, statistics=given)
        with pytest.raises(ValueError, match=f"needs the layer's '{lacking}'"):
            both_steps(name, ids, weights, scores, of_layer)


def test_exfold_by_hand():
    """Norms decide who is kept; 1 goes to 0 with half its weight, to 2 against its sign."""
    ids, weights = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    scale, loss = torch.eye(3), torch.full((3, 3), 1e30)
    scale[1, 0], loss[1, 0], scale[1, 2], loss[1, 2] = 0.5, 0.8, -0.25, 0.9
    given = {"stand_in_scale": scale, "stand_in_loss": loss, "output_norm": torch.ones(3)}
    for norms, kept, expected, amount in (
        ([1.1, 1.0, 0.9], 2, [[0, 1], [-1, 1]], [[0.6, 0.4], [0.0, 0.3]]),
        ([1.1, 1.0, 2.0], 2, [[-1, 1], [2, 1]], [[0.0, 0.4], [0.7, 0.3]]),
        ([1.1, 1.0, 9.0], 1, [[-1, 2], [2, -1]], [[0.0, -0.1], [0.625, 0.0]]),
        ([9.0, 1.0, 1.0], 1, [[0, -1], [-1, 0]], [[0.8, 0.0], [0.0, 0.15]]),
    ):
        given["output_norm"] = torch.tensor(norms)
        of_layer = Layer(3, experts=kept, statistics=given)
        found = RULES["exfold"].apply(ids, weights, None, kinds_of(1, 1), of_layer)
        assert found[0].tolist() == expected
        assert torch.allclose(found[1], torch.tensor(amount), atol=1e-6)


def test_spare_by_hand():
    """Demand by weight: 0 and 1 alike, 2 less. 1 makes all but an eighth of what 0 makes."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]])
    ids = torch.tensor([[0, 2], [1, 2]])
    weights = scores.gather(1, ids)
    loss, scale = torch.ones(4, 4), torch.zeros(4, 4)
    loss[1, 0], scale[1, 0], loss[2, 0], scale[2, 0] = 0.125, 0.5, 0.75, -0.25
    given = {"directed_loss": loss, "directed_scale": scale}
    # shares: 2/3 of 0 and of 1, and 1/3 of 2 in either row; squared 0.444, and 0.222 for both
    for tau, limit, protect, expected, amount in (
        (0.05, 0.8, True, [[0, 2], [1, 2]], [[0.4, 0.2], [0.4, 0.2]]),
        (0.06, 0.8, False, [[0, 2], [0, 2]], [[0.4, 0.2], [0.2, 0.2]]),
        (0.17, 0.8, True, [[0, -1], [1, 0]], [[0.35, 0.0], [0.4, -0.05]]),
        (0.17, 0.7, True, [[0, 2], [1, 2]], [[0.4, 0.2], [0.4, 0.2]]),
        (0.3, 0.7, True, [[0, -1], [1, -1]], [[0.4, 0.0], [0.4, 0.0]]),
        (0.5, 0.1, False, [[0, -1], [0, -1]], [[0.4, 0.0], [0.6, 0.0]]),
    ):
        of_layer = Layer(
            4, tau=tau, limit=limit, protect=protect, lead=0.0, statistics=given, runners_up=1
        )
        found = RULES["spare"].apply(ids, weights, scores, kinds_of(1, 1), of_layer)
        assert found[0].tolist() == expected
        assert torch.allclose(found[1], torch.tensor(amount), atol=1e-6)


def test_novices_are_what_dropped_experts_give_on_average():
    ids, weights, scores = draw(6, 12)
    ids[0, 0] = -1
    of_layer = layer("mone")
    kinds = kinds_of(*[REROUTABLE] * 5, EXACT)
    after = RULES["mone"].apply(ids, weights, scores, kinds, of_layer)
    added = RULES["mone"].output((ids, weights), after, of_layer)
    mean = statistics()["output_mean"]
    for row in range(6):
        expected = torch.zeros(7)
        for old, new, weight in zip(ids[row], after[0][row], weights[row], strict=True):
            if old >= 0 and new < 0:
                expected += weight * mean[old]
        assert torch.allclose(added[row], expected, atol=1e-6)
    assert not added[0].any(), "a row with a sentinel is exact"
    assert not added[5].any()
    assert added[1:5].any()


def test_every_key_is_a_knob():
    fields = set(Layer.__dataclass_fields__)
    for rule in RULES.values():
        # What `loss` means is in the artifact: a rule is given tau.
        assert set(rule.required) <= set(rule.keys) <= fields | {"loss"}


@pytest.mark.parametrize("protect", [True, False])
def test_what_rows_ask_under_spare_adds_up_over_ranks(protect):
    """Also where each rank's rows want two experts as much as is told apart, which is no more."""
    ids, weights, scores = draw(16, 13)
    scores[:, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 1)
    scores[:, 2:] = 0
    ids[:] = torch.tensor([0, 1, 2])
    for tau, kinds, count in (
        (1.0, kinds_of(*[REROUTABLE] * 16), 2 if protect else 1),
        (0.5, kinds_of(*[REROUTABLE] * 16), 2),
        (1.0, kinds_of(*[REROUTABLE] * 15, EXACT), 3),
    ):
        weights = scores.gather(1, ids)
        of_layer = layer("spare", protect=protect, tau=tau, min_primary_experts=0, limit=0.0)
        whole = RULES["spare"].apply(ids, weights, scores, kinds, of_layer)
        for first in (0, 1, 6, 16):
            asked = sum(
                spare.ask(ids[part], weights[part], scores[part], kinds[part], of_layer)
                for part in (slice(first), slice(first, None))
            )
            kept = spare.keep(asked, of_layer)
            assert kept.sum() == count
            found = spare.stand_in(kept, ids, weights, scores, kinds, of_layer)
            assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))
