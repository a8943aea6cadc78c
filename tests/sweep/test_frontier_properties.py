"""The frontier against its definition, written plainly."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from limbeck.sweep.frontier import on_frontier

# A few values, so that ties are common.
VALUE = st.one_of(st.integers(0, 4).map(float), st.floats(-1e6, 1e6), st.just(math.nan))
POINTS = st.lists(st.tuples(VALUE, VALUE), max_size=12)


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and (a[0] < b[0] or a[1] > b[1])


@given(POINTS)
def test_equals_the_definition(points: list[tuple[float, float]]) -> None:
    expected = [
        not math.isnan(point[0]) and not math.isnan(point[1]) and not any(dominates(other, point) for other in points)
        for point in points
    ]
    assert on_frontier([c for c, _ in points], [q for _, q in points]) == expected


@given(POINTS, st.floats(0.01, 100))
def test_unit_of_the_cost_does_not_matter(points: list[tuple[float, float]], factor: float) -> None:
    points = [(round(c * 4) if not math.isnan(c) else c, q) for c, q in points]
    flags = on_frontier([c for c, _ in points], [q for _, q in points])
    assert on_frontier([c * factor for c, _ in points], [q for _, q in points]) == flags


@given(POINTS)
def test_something_is_on_it_when_anything_was_measured(points: list[tuple[float, float]]) -> None:
    measured = any(not math.isnan(c + q) for c, q in points)
    assert any(on_frontier([c for c, _ in points], [q for _, q in points])) == measured
