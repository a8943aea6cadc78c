"""Mixed bits against every assignment there is."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.compress.quantize.grid import Grid
from limbeck.compress.quantize.mixed import Option, choose, quantized_bytes
from limbeck.errors import CompressionError, ConfigError

options = st.builds(Option, st.floats(0, 10), st.integers(1, 60))
layers = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4)


def totals(layers, picks):
    chosen = [options[pick] for options, pick in zip(layers, picks, strict=True)]
    return sum(option.loss for option in chosen), sum(option.size for option in chosen)


@given(layers, st.integers(0, 200))
def test_the_best_assignment_within_the_budget(layers, above):
    budget = sum(min(option.size for option in options) for options in layers) + above
    loss, size = totals(layers, choose(layers, budget))
    every = [totals(layers, picks) for picks in itertools.product(*(range(len(options)) for options in layers))]
    assert size <= budget
    assert loss == pytest.approx(min(loss for loss, size in every if size <= budget))


def test_large_sizes_stay_in_the_budget_and_near_the_best():
    draw = random.Random(0)
    layers = []
    for _ in range(200):
        weights, scale = draw.randint(10**5, 10**7), draw.random()
        layers.append([Option(scale * 4.0 ** (4 - bits) * weights, weights * bits // 8 + 1) for bits in (3, 4, 8)])
    budget = sum(options[1].size for options in layers)
    loss, size = totals(layers, choose(layers, budget))
    assert 0.995 * budget < size <= budget
    # A price on bytes bounds the loss from below, whatever the assignment.
    prices = [10.0**exponent for exponent in range(-6, 4)]
    prices = [price * step / 10 for price in prices for step in range(10, 100)]
    bound = max(
        sum(min(o.loss + price * o.size for o in options) for options in layers) - price * budget for price in prices
    )
    assert loss <= 1.01 * bound
    assert loss < totals(layers, [1] * 200)[0]


def test_what_cannot_be():
    with pytest.raises(CompressionError, match="smallest options take 7 bytes, more than the budget of 6"):
        choose([[Option(1.0, 7)]], 6)
    with pytest.raises(ConfigError, match="every loss must be a finite number"):
        choose([[Option(float("nan"), 1)]], 6)
    assert choose([], 0) == []
    assert quantized_bytes(10, 64, Grid(bits=4, group_size=32)) == 320 + 40
