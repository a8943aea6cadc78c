"""Plans: every piece once and after what it needs, and the cheapest way by the costs."""

import pytest
from made_models import made_model

from limbeck.engine.decoder import Decoder
from limbeck.engine.plan import PATHS, Costs, PrefixAndItems, make_plan, measure_costs
from limbeck.engine.weights import weights_of

FLAT = Costs((1, 64, 256, 1024), (1.0, 1.0, 1.0, 1.0), 0.0)
"""A pass costs the same whatever is in it."""
STEEP = Costs((1, 64, 256, 1024), (0.01, 0.64, 2.56, 100.0), 0.0)
"""Passes beyond 256 tokens fall out of the cache."""
WORKS = [
    PrefixAndItems([(0, 8), (8, 16), (16, 19)], 1, [5, 0, 40, 5]),
    PrefixAndItems([], 0, [7, 3]),
    PrefixAndItems([(0, 8)], 1, [2]),
]


@pytest.mark.parametrize("pass_tokens", [1, 20, 1000])
@pytest.mark.parametrize("path", ["cached", "shared", "packed"])
def test_all_is_computed_once_and_in_order(path, pass_tokens):
    plan = make_plan(WORKS, FLAT, path, pass_tokens)
    pieces = [piece for pieces in plan.passes for piece in pieces]
    assert len(pieces) == len(set(pieces))
    assert {(p.work, p.item) for p in pieces if p.item is not None} == {(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)}
    assert [p.span for p in pieces if p.item is None] == [(8, 16), (16, 19)]
    assert {p.span for p in pieces if p.item is not None} == {(19, 24), (19, 59), (0, 7), (0, 3), (8, 10)}
    last_block = max(number for number, piece in enumerate(pieces) if piece.item is None)
    assert all(piece.work != 0 for piece in pieces[:last_block] if piece.item is not None)
    for members in plan.passes:
        assert len(members) == 1 or sum(p.span[1] - p.span[0] for p in members) <= pass_tokens


def test_single_takes_nothing_from_the_cache():
    plan = make_plan(WORKS, FLAT, "single")
    assert len(plan.passes) == 7
    assert [piece.span for piece in plan.passes[1]] == [(0, 8), (8, 16), (16, 19)]  # the empty item
    assert [piece.span for piece in plan.passes[-1]] == [(0, 8), (8, 10)]


def test_the_cheapest_way_wins():
    work = [PrefixAndItems([(start, start + 64) for start in range(0, 512, 64)], 0, [32] * 16)]
    assert make_plan(work, FLAT).path == "packed" and len(make_plan(work, FLAT).passes) == 1
    small = make_plan(work, STEEP)
    assert max(sum(p.span[1] - p.span[0] for p in pieces) for pieces in small.passes) <= 256
    costs = {path: make_plan(work, FLAT, path).seconds for path in PATHS}
    assert costs == {"single": 16.0, "cached": 17.0, "shared": 2.0, "packed": 1.0}
    assert make_plan([], FLAT).passes == []
    # One item alone costs the same in any way; what it leaves in the cache is worth having.
    assert make_plan([PrefixAndItems([(0, 8)], 0, [4])], FLAT).path != "single"


def test_attention_counts():
    costs = Costs((1, 64), (0.0, 0.0), 1.0)
    work = [PrefixAndItems([(0, 10)], 0, [2, 3])]
    assert make_plan(work, costs, "packed").seconds == 10 * 10 + 2 * 12 + 3 * 13
    assert make_plan(work, costs, "single").seconds == 2 * 10 * 10 + 2 * 12 + 3 * 13


def test_costs_are_measured():
    costs = measure_costs(Decoder(weights_of(made_model("llama"))), repeats=1)
    assert len(costs.rows) == len(costs.seconds) and 0 < costs.seconds[0] <= costs.seconds[-1] < 60
    assert costs.of_pass(2048, 0) == pytest.approx(2 * costs.seconds[-1])
    assert costs.seconds[1] <= costs.of_pass(40, 0) <= costs.seconds[2]
