"""The frontier on cases that can be checked by eye."""

from __future__ import annotations

import math

import pytest

from limbeck.sweep.frontier import on_frontier


def test_no_runs() -> None:
    assert on_frontier([], []) == []


def test_one_run_is_on_it() -> None:
    assert on_frontier([3.0], [0.0]) == [True]


def test_dearer_and_worse_is_off() -> None:
    assert on_frontier([1, 2, 3, 4], [0.2, 0.6, 0.5, 0.9]) == [True, True, False, True]


def test_order_of_the_runs_does_not_matter() -> None:
    assert on_frontier([4, 3, 1, 2], [0.9, 0.5, 0.2, 0.6]) == [True, False, True, True]


def test_equal_quality_at_more_cost_is_off() -> None:
    assert on_frontier([1, 2], [0.5, 0.5]) == [True, False]


def test_equal_cost_leaves_the_better() -> None:
    assert on_frontier([1, 1, 1], [0.5, 0.7, 0.7]) == [False, True, True]


def test_unmeasured_runs_are_off_and_beat_nothing() -> None:
    assert on_frontier([1, math.nan, 2], [math.nan, 0.9, 0.1]) == [False, False, True]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="shorter"):
        on_frontier([1, 2], [0.5])
