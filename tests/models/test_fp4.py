"""Four-bit floats: the nearest value, ties to the even one, in the bytes that other libraries read."""

import pytest
import torch

from limbeck.compress.quantize.grid import Grid
from limbeck.errors import ShapeError
from limbeck.models import fp4

EVERY = torch.tensor([sign * value for sign in (1.0, -1.0) for value in fp4.VALUES])


def test_the_nearest_value_is_taken_and_the_even_one_of_two():
    numbers = torch.linspace(-7, 7, 5601)
    found = fp4.round_to_nearest(numbers)
    assert set(found.abs().tolist()) == set(fp4.VALUES)
    best = (numbers[:, None].clamp(-6, 6) - EVERY).abs().amin(1)
    torch.testing.assert_close((found - numbers.clamp(-6, 6)).abs(), best, rtol=0, atol=1e-6)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4.round_to_nearest(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert fp4.round_to_nearest(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


def test_bytes_hold_every_value():
    codes = EVERY[torch.randint(len(EVERY), (5, 12), generator=torch.Generator().manual_seed(2))]
    packed = fp4.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 6)
    assert torch.equal(fp4.unpack(packed).float(), codes)
    assert fp4.pack(torch.tensor([[0.5, -6.0]])).tolist() == [[0xF1]]
    with pytest.raises(ShapeError, match="even I"):
        fp4.pack(torch.zeros(2, 3))


def test_rounding_and_bytes_are_those_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    utils = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    numbers = torch.randn(6, 32, generator=torch.Generator().manual_seed(5)) * 3
    theirs = utils.cast_to_fp4(numbers.clone())
    ours = fp4.round_to_nearest(numbers)
    assert torch.equal(ours, theirs)
    assert torch.equal(fp4.pack(ours), helpers.pack_fp4_to_uint8(theirs.to(torch.bfloat16)))


def test_powers_of_two_lose_at_most_a_seventh_of_the_largest_weight():
    largest = torch.linspace(0.01, 9.0, 2000)
    scales = fp4.power_of_two(largest / fp4.LARGEST)
    assert torch.equal(scales, scales.log2().round().exp2())
    units = largest / scales
    assert units.min() > 3.5 - 1e-5 and units.max() <= 7 + 1e-5
    assert torch.equal(fp4.from_exponents(fp4.to_exponents(scales)), scales)


def test_a_global_scale_puts_the_largest_group_at_the_end_of_e4m3():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    grid = Grid(kind="float", group_size=16, scale_dtype=torch.float8_e4m3fn).fitted(weight)
    stored = grid.scales(weight) * grid.global_scale
    assert float(stored.max()) == pytest.approx(448.0, rel=1e-6)
    torch.testing.assert_close(stored, stored.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    assert grid.fitted(weight / 1000).global_scale == pytest.approx(1000 * grid.global_scale, rel=1e-5)
