"""Several sources in one plan: how often each is read, in which order, and for which teacher."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.mix import Mix, Portion
from limbeck.distill.plan import plan_steps

SOURCES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=4)
PLAN = {
    "batch_size": 3,
    "batch_tokens": None,
    "microbatch_tokens": 60,
    "layout": "packed",
    "bucket_batches": 2,
    "seed": 4,
}


def laid(sources):
    """Lengths of all examples, and their sources."""
    return [n for own in sources for n in own], [k for k, own in enumerate(sources) for _ in own]


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.floats(0.1, 3.0), st.integers(1, 6), st.integers(0, 99))
def test_a_source_is_read_evenly_over_its_passes(sources, epochs, num_epochs, seed):
    lengths, origins = laid(sources)
    mix = Mix.of(lengths, origins, [Portion()] * (len(sources) - 1) + [Portion(epochs)])
    read = np.concatenate([mix.epoch(number, seed) for number in range(num_epochs)])
    assert len(read) == num_epochs * mix.size
    for number, own in enumerate(mix.members):
        times = Counter(int(i) for i in read if origins[i] == number)
        assert sum(times.values()) == num_epochs * mix.counts[number]
        seen = [times[int(i)] for i in own]
        assert max(seen) - min(seen) <= 1
    assert mix.counts[-1] == max(1, round(epochs * len(sources[-1])))


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.lists(st.floats(0.05, 0.3), min_size=1, max_size=3))
def test_a_share_is_one_of_tokens(sources, shares):
    sources = [[20] * 40, *sources][: len(shares) + 1]
    shares = shares[: len(sources) - 1]
    lengths, origins = laid(sources)
    mix = Mix.of(lengths, origins, [Portion(), *(Portion(share=share) for share in shares)])
    means = [np.mean(own) for own in sources]
    total = mix.tokens(lengths)
    for count, mean, share in zip(mix.counts[1:], means[1:], shares, strict=True):
        # Whole examples, so half of one either way; every source's rounding is in the total.
        slack = mean / 2 + share * sum(means) / 2 + mean * (count == 1)
        assert abs(count * mean - share * total) <= slack + 1e-9


def test_a_mix_of_whole_passes_reads_what_one_source_would():
    lengths, origins = laid([[5, 9, 2], [7, 7], [3]])
    mix = Mix.of(lengths, origins, [Portion()] * 3)
    steps = plan_steps(lengths, epochs=2.0, mix=mix, **PLAN)
    assert sorted(i for step in steps for i in step.indices) == sorted([*range(6), *range(6)])
    assert steps == plan_steps(lengths, epochs=2.0, mix=mix, **PLAN)
    assert steps != plan_steps(lengths, epochs=2.0, mix=mix, **{**PLAN, "seed": 5})


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_microbatch_is_for_one_teacher(world_size):
    lengths, teachers = [6] * 20, [0, 1] * 10
    plain = plan_steps(lengths, epochs=1.0, world_size=world_size, **PLAN)
    steps = plan_steps(lengths, epochs=1.0, world_size=world_size, teachers=teachers, **PLAN)
    assert [sorted(step.indices) for step in steps] == [sorted(step.indices) for step in plain]
    groups = [group for step in steps for rank in step.microbatches for group in rank]
    assert all(len({teachers[i] for i in group}) == 1 for group in groups)
