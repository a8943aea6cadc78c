"""Growing batches: sizes, resume, accumulation, and the equal learning-rate schedule."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ConfigError
from limbeck.optim import AccumulationSchedule, BatchGrowth, EqualLR, GrowingBatchSampler


def test_sizes_grow_linearly_to_the_largest():
    growth = BatchGrowth(4, growth=0.5, b_max=7)
    sizes = []
    for _ in range(9):
        sizes.append(growth.batch_size)
        growth.advance()
    assert sizes == [4, 4, 5, 5, 6, 6, 7, 7, 7]
    assert (growth.iterations, growth.samples) == (9, sum(sizes))


def test_noise_scale_grows_only_while_the_batch_is_too_noisy():
    growth = BatchGrowth(4, growth=1.0, mode="noise_scale")
    sizes = []
    for noisy in (False, True, True, False, True):
        growth.observe(noise_square=2.0 if noisy else 0.5, gradient_square=1.0)
        sizes.append(growth.batch_size)
        growth.advance()
    assert sizes == [4, 4, 5, 6, 6]
    resumed = BatchGrowth(4, growth=1.0, mode="noise_scale")
    resumed.load_state_dict(json.loads(json.dumps(growth.state_dict())))
    assert resumed.batch_size == growth.batch_size == 7


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 50),
    b0=st.integers(1, 9),
    rate=st.floats(0, 2),
    cut=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_a_resumed_sampler_goes_on_with_the_same_batches(size, b0, rate, cut, seed):
    def sampler():
        return GrowingBatchSampler(size, BatchGrowth(b0, rate), steps=20, seed=seed)

    whole = list(sampler())
    first = sampler()
    stream = iter(first)
    head = [next(stream) for _ in range(cut)]
    second = sampler()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + list(second) == whole


def test_every_epoch_is_a_permutation():
    sampler = GrowingBatchSampler(13, BatchGrowth(3, 0.4), steps=30, seed=1)
    row = [i for batch in sampler for i in batch]
    epochs = [row[start : start + 13] for start in range(0, len(row) - 13, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sampler.growth.samples == len(row)


def test_ranks_share_a_batch_out():
    def batches(rank, world_size):
        return list(GrowingBatchSampler(40, BatchGrowth(4, 2.0), steps=6, rank=rank, world_size=world_size))

    whole, parts = batches(0, 1), [batches(rank, 2) for rank in range(2)]
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    for batch, a, b in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(a + b)


def test_the_state_after_the_batches_really_used():
    sampler = GrowingBatchSampler(40, BatchGrowth(3, 0.5), steps=20, seed=2)
    whole = list(sampler)
    resumed = GrowingBatchSampler(40, BatchGrowth(3, 0.5), steps=20, seed=2)
    resumed.load_state_dict(sampler.state_dict(used=8))
    assert list(resumed) == whole[8:]


def test_a_data_loader_takes_the_sampler():
    data = torch.utils.data.TensorDataset(torch.arange(10.0))
    loader = torch.utils.data.DataLoader(data, batch_sampler=GrowingBatchSampler(10, BatchGrowth(2, 1.0), steps=4))
    assert [len(batch[0]) for batch in loader] == [2, 3, 4, 5]


def test_accumulation_rounds_up_and_counts_what_it_used():
    schedule = AccumulationSchedule(BatchGrowth(4, growth=1.0), micro_batch=4)
    counts = []
    for _ in range(6):
        counts.append(schedule.micro_batches)
        schedule.advance()
    assert counts == [1, 2, 2, 2, 2, 3]
    assert (schedule.iterations, schedule.samples, schedule.growth.samples) == (6, 48, 39)
    resumed = AccumulationSchedule(BatchGrowth(4, growth=1.0), micro_batch=4)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert (resumed.micro_batches, resumed.samples) == (schedule.micro_batches, 48)


def test_the_equal_learning_rate_falls_as_the_batch_would_grow():
    p = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([p], 0.3)
    scheduler = EqualLR(optimizer, BatchGrowth(2, 1.0, b_max=5))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.3 * 2 / size for size in (2, 3, 4, 5, 5)])
    again = EqualLR(torch.optim.SGD([p], 0.3), BatchGrowth(2, 1.0, b_max=5))
    again.load_state_dict(scheduler.state_dict())
    assert again.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize("wrong", [{"b0": 0}, {"b0": 4, "growth": -1}, {"b0": 4, "b_max": 3}, {"b0": 4, "mode": "x"}])
def test_growth_that_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigError, match="BatchGrowth"):
        BatchGrowth(**wrong)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_over_a_loader_has_its_batches_and_the_sizes_go_on_growing(workers):
    sampler = GrowingBatchSampler(40, BatchGrowth(2, 0.5), steps=6)
    data = torch.utils.data.TensorDataset(torch.arange(40))
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=workers)
    epochs = [[len(batch[0]) for batch in loader] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [6, 6, 6]
    assert len(loader) == len(sampler) == 6
    assert [size for epoch in epochs for size in epoch] == [2 + step // 2 for step in range(18)]


def test_an_iteration_that_was_left_early_is_not_counted_against_the_next():
    sampler = GrowingBatchSampler(40, BatchGrowth(2), steps=5)
    next(iter(sampler))
    assert len(list(sampler)) == 5


def test_an_endless_sampler_has_no_length():
    with pytest.raises(TypeError, match="endless"):
        len(GrowingBatchSampler(10, BatchGrowth(2)))


@pytest.mark.parametrize("cut", [0, 3, 5, 7, 11])
def test_a_sampler_resumed_in_any_epoch_ends_that_one_first(cut):
    def batches(sampler, epochs):
        return [list(sampler) for _ in range(epochs)]

    whole = batches(GrowingBatchSampler(17, BatchGrowth(2, 0.3), steps=5), 3)
    first = GrowingBatchSampler(17, BatchGrowth(2, 0.3), steps=5)
    for _ in range(cut // 5):
        list(first)
    stream = iter(first)
    head = [next(stream) for _ in range(cut % 5)]
    second = GrowingBatchSampler(17, BatchGrowth(2, 0.3), steps=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = batches(second, 3 - cut // 5)
    assert [head + rest[0], *rest[1:]] == whole[cut // 5 :]


def test_what_workers_fetched_ahead_in_a_later_epoch_is_given_back():
    sampler = GrowingBatchSampler(17, BatchGrowth(2, 0.3), steps=5)
    list(sampler)
    second = list(sampler)
    resumed = GrowingBatchSampler(17, BatchGrowth(2, 0.3), steps=5)
    resumed.load_state_dict(sampler.state_dict(used=7))
    assert list(resumed) == second[2:]
    with pytest.raises(ConfigError, match="used=3"):
        sampler.state_dict(used=3)
