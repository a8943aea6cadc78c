"""Noise is a function of (seed, step, parameter, element): shards agree with the whole, and different keys do not."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.optim import noise
from limbeck.optim.noise import NoiseKey, add_noise_, draw, parameter_id, round_stochastically, uniform
from limbeck.optim.sharding import Layout

CPU = torch.device("cpu")
KEY = NoiseKey(seed=3, step=7, parameter=parameter_id("layer.weight"))


def whole(*shape: int) -> Layout:
    return Layout(shape, shape, (0,) * len(shape))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(noise, "CPU_CHUNK", 64)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 40), columns=st.integers(1, 30), data=st.data())
def test_any_box_of_a_tensor_gets_the_noise_that_the_whole_tensor_gets(rows, columns, data):
    full = draw(KEY, whole(rows, columns), CPU)
    top, left = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    height, width = data.draw(st.integers(0, rows - top)), data.draw(st.integers(0, columns - left))
    box = draw(KEY, Layout((rows, columns), (height, width), (top, left)), CPU)
    assert torch.equal(box, full[top : top + height, left : left + width])


@settings(deadline=None, max_examples=40)
@given(numel=st.integers(1, 700), cuts=st.lists(st.integers(0, 700), max_size=4), stochastic=st.booleans())
def test_uneven_shards_end_with_the_bits_of_the_whole(numel, cuts, stochastic):
    dtype = torch.bfloat16 if stochastic else torch.float32
    value = torch.linspace(-2, 2, numel).to(dtype)
    expected = value.clone()
    add_noise_(expected, KEY, whole(numel), 0.3, stochastic=stochastic)
    bounds = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    shards = [value[start:stop].clone() for start, stop in itertools.pairwise(bounds)]
    for shard, start in zip(shards, bounds, strict=False):
        add_noise_(shard, KEY, Layout((numel,), (len(shard),), (start,)), 0.3, stochastic=stochastic)
    assert torch.equal(torch.cat(shards), expected)


def test_a_transposed_parameter_gets_the_noise_of_its_logical_elements():
    plain, transposed = torch.zeros(9, 17), torch.zeros(17, 9).T
    for value in (plain, transposed):
        add_noise_(value, KEY, whole(9, 17), 1.0)
    assert torch.equal(plain, transposed)


@pytest.mark.parametrize("field", ["seed", "step", "parameter", "stream"])
def test_every_part_of_the_key_changes_every_chunk(field):
    first = draw(KEY, whole(640), CPU).view(10, 64)
    other = draw(KEY._replace(**{field: getattr(KEY, field) + 1}), whole(640), CPU).view(10, 64)
    assert (first != other).float().mean(dim=1).min() > 0.9


def test_seeds_that_agree_in_their_low_32_bits_differ():
    assert not torch.equal(draw(KEY, whole(64), CPU), draw(KEY._replace(seed=KEY.seed + 2**40), whole(64), CPU))
    assert draw(KEY._replace(seed=-1), whole(3), CPU).isfinite().all()


def test_the_noise_is_standard_normal_and_uncorrelated(monkeypatch):
    monkeypatch.setattr(noise, "CPU_CHUNK", 65_536)
    sample = draw(KEY, whole(2_000_000), CPU).double()
    size = sample.numel()
    # Five standard errors of the first four moments of N(0, 1), and of the correlation at three lags.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(sample.pow(power).mean() - moment) < 5 * (variance / size) ** 0.5
    for lag in (1, 32_768, 65_536):
        assert abs((sample[:-lag] * sample[lag:]).mean()) < 5 / size**0.5
    tail = (sample.abs() > 4).double().mean()
    assert tail == pytest.approx(6.334e-5, rel=0.45)
    assert 4.5 < sample.abs().max() < 6.8


def test_the_noise_of_a_key_is_fixed_for_good():
    """A checkpoint from an older version must go on with the same noise."""
    expected = torch.tensor([-0.5408775, 0.4174076, 0.7885913, -0.3412867, -0.6950625])
    assert torch.allclose(draw(KEY, whole(5), CPU), expected, atol=1e-6)


def test_the_squared_norm_that_comes_back_is_that_of_what_was_added():
    value = torch.zeros(500, dtype=torch.float64)
    square = add_noise_(value, KEY, whole(500), 0.25)
    assert square == pytest.approx(float(value.square().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", [1.003, -3.14159, 0.013])
def test_stochastic_rounding_keeps_the_mean_and_goes_to_a_neighbour(dtype, center):
    value = torch.full((40_000,), center)
    bits = torch.randint(-(2**31), 2**31 - 1, (40_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    rounded = round_stochastically(value, bits, dtype).double()
    assert len(rounded.unique()) == 2
    gap = float(rounded.max() - rounded.min())
    assert float(rounded.min()) < center < float(rounded.max())
    assert abs(float(rounded.mean()) - float(value[0])) < 5 * gap / 2 / 40_000**0.5


def test_stochastic_rounding_leaves_representable_and_infinite_values():
    value = torch.tensor([0.5, -2.0, 0.0, float("inf"), float("-inf"), float("nan")])
    bits = torch.full((6,), -1, dtype=torch.int32)
    rounded = round_stochastically(value, bits, torch.bfloat16)
    assert torch.equal(rounded[:5], value[:5].bfloat16())
    assert rounded[5].isnan()


def test_uniform_numbers_fill_the_unit_interval():
    draws = torch.tensor([uniform(KEY._replace(step=step)) for step in range(2000)], dtype=torch.float64)
    assert 0 < draws.min() < 0.01
    assert 0.99 < draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 5 / (12 * 2000) ** 0.5
