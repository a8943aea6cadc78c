"""The plan of steps on chosen cases; what holds for all inputs is in test_plan_properties.py."""

import pytest

from limbeck.distill.plan import plan_steps
from limbeck.errors import ConfigError
from limbeck.optim.growing_batch import BatchGrowth

SETTINGS = {
    "epochs": 1.0,
    "batch_size": 4,
    "batch_tokens": None,
    "microbatch_tokens": 100,
    "layout": "packed",
    "bucket_batches": 4,
    "seed": 0,
}


def plan(lengths, **changes):
    return plan_steps(lengths, **{**SETTINGS, **changes})


def seen(steps):
    return sorted(index for step in steps for index in step.indices)


def test_one_epoch_reads_every_example_once():
    assert seen(plan([5] * 11)) == list(range(11))
    assert [len(step.indices) for step in plan([5] * 8)] == [4, 4]


@pytest.mark.parametrize(("epochs", "expected"), [(0.5, 5), (1.3, 13), (2.0, 20), (0.01, 1)])
def test_partial_epochs(epochs, expected):
    steps = plan([7] * 10, epochs=epochs)
    assert len(seen(steps)) == expected
    assert all(seen(steps).count(i) in (int(epochs), int(epochs) + 1) for i in range(10))


def test_limits_take_the_place_of_epochs():
    assert len(plan([5] * 10, max_steps=7)) == 7
    assert len(plan([5] * 10, max_steps=2, epochs=9.0)) == 2
    tokens = [5 * len(step.indices) for step in plan([5] * 10, max_tokens=101)]
    assert sum(tokens) >= 101 > sum(tokens[:-1])
    assert len(plan([5] * 10, max_tokens=10_000, max_steps=3)) == 3


def test_equal_tokens_of_whole_epochs_end_with_the_epoch():
    lengths = [3, 9, 4, 11, 8, 2, 6]
    assert plan(lengths, max_tokens=2 * sum(lengths)) == plan(lengths, epochs=2.0)


def test_one_giant_sequence_goes_alone():
    steps = plan([10, 5000, 10, 10], microbatch_tokens=50)
    groups = [group for step in steps for rank in step.microbatches for group in rank]
    assert (1,) in groups and seen(steps) == [0, 1, 2, 3]
    steps = plan([10, 5000, 10, 10], batch_size=None, batch_tokens=30)
    assert (1,) in [step.indices for step in steps]


def test_windows_hold_like_with_like_and_one_batch_a_window_does_not():
    lengths = [1, 100] * 32
    sorted_steps = plan(lengths, bucket_batches=16)
    assert all(len({lengths[i] for i in step.indices}) == 1 for step in sorted_steps)
    random_steps = plan(lengths, bucket_batches=1)
    assert any(len({lengths[i] for i in step.indices}) == 2 for step in random_steps)


def test_epochs_and_seeds_differ_in_their_order():
    first, second = (plan([5] * 16, epochs=2.0)[i : i + 4] for i in (0, 4))
    assert [step.indices for step in first] != [step.indices for step in second]
    assert plan([5] * 16) != plan([5] * 16, seed=1)


def test_a_rank_may_have_nothing():
    steps = plan([5, 6, 7], batch_size=1, world_size=2)
    assert all(sorted(map(len, step.microbatches)) == [0, 1] for step in steps)


def test_no_example_is_refused():
    with pytest.raises(ConfigError, match="no trace is left to train on"):
        plan([], max_steps=3)


def test_growing_batches_take_the_row_of_epochs_in_order():
    steps = plan([5] * 10, growth=BatchGrowth(2, 0.5, 4), max_steps=8)
    assert [len(step.indices) for step in steps] == [2, 2, 3, 3, 4, 4, 4, 4]
    row = [index for step in steps for index in sorted(step.indices)]
    assert sorted(row[:10]) == list(range(10)), "the first epoch reads every example once"


def test_growing_batches_of_tokens_stay_within_their_size():
    lengths = [3, 9, 4, 7, 5, 6, 8]
    growth = BatchGrowth(10, 2.0, 30)
    steps = plan(lengths, batch_size=None, batch_tokens=10, growth=growth, max_steps=20)
    for number, step in enumerate(steps):
        tokens = sum(lengths[i] for i in step.indices)
        assert tokens <= growth.size_at(number)
        assert tokens > growth.size_at(number) - max(lengths)


def test_growing_batches_end_with_the_epochs():
    assert seen(plan([5] * 10, growth=BatchGrowth(2, 1.0, 8), epochs=2.0)) == sorted([*range(10), *range(10)])
