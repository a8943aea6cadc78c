"""The int8 product: exact in integers, no overflow, as good as W8A8 can be, and the same bits in any batch."""

import pytest
import torch

from limbeck.engine.int8 import Int8Linear
from limbeck.errors import ModelError
from limbeck.models.quantized import rounded_inputs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(96, 64), (33, 47), (1, 2), (576, 1536)])
def test_a_row_has_its_bits_in_any_batch(shape, count, threads):
    threads(count)
    torch.manual_seed(0)
    layer = Int8Linear.rounded(torch.randn(shape), torch.randn(shape[0]))
    rows = torch.randn(70, shape[1]) * torch.logspace(-3, 3, 70)[:, None]
    whole = layer(rows)
    for start, stop in [(0, 1), (69, 70), (3, 10), (1, 66), (35, 70)]:
        assert torch.equal(layer(rows[start:stop]), whole[start:stop])
    order = torch.randperm(70)
    assert torch.equal(layer(rows[order]), whole[order])
    padded = torch.cat([rows, torch.full((5, shape[1]), 1e20)])
    assert torch.equal(layer(padded)[:70], whole)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_long_sums_do_not_saturate(sign):
    """1024 products of the largest codes: far beyond 16 bits."""
    layer = Int8Linear.rounded(torch.full((3, 1024), sign))
    found = layer(torch.ones(2, 1024))
    torch.testing.assert_close(found, torch.full((2, 3), sign * 1024), rtol=0.005, atol=0)
    assert torch.equal(
        Int8Linear(torch.full((2, 64), 63, dtype=torch.int8), torch.ones(2))(torch.zeros(1, 64)), torch.zeros(1, 2)
    )


def test_error_is_that_of_ideal_w8a8_with_outliers():
    torch.manual_seed(1)
    weight, rows = torch.randn(256, 512), torch.randn(128, 512)
    rows[:, [3, 77, 200, 400]] *= 40
    exact = rows.double() @ weight.double().T
    scales = weight.abs().amax(1, keepdim=True) / 63
    ideal = rounded_inputs(rows, "int", None) @ ((weight / scales).round() * scales).T

    def error(found):
        return float((found - exact).norm() / exact.norm())

    ours = error(Int8Linear.rounded(weight)(rows))
    assert ours == pytest.approx(error(ideal), rel=0.01)
    plain = torch.ops.quantized.linear_dynamic(rows, Int8Linear.rounded(weight).packed, reduce_range=True)
    assert ours < 0.7 * error(plain)


def test_codes_that_could_overflow_are_refused():
    with pytest.raises(ModelError, match=r"q_proj: int8 codes up to 127.*limbeck quantize"):
        Int8Linear(torch.full((2, 4), 127, dtype=torch.int8), torch.ones(2), where="q_proj")


def test_joined_layers_equal_each_alone():
    torch.manual_seed(2)
    parts = [
        (torch.randint(-63, 64, (outputs, 32), dtype=torch.int8), torch.rand(outputs) + 0.1) for outputs in (16, 8, 40)
    ]
    rows = torch.randn(9, 32)
    joined = Int8Linear.joined(parts, None, "")(rows)
    assert torch.equal(joined, torch.cat([Int8Linear(*part)(rows) for part in parts], 1))
