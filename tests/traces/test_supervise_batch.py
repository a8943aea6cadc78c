"""Weights of segments, examples, and the two layouts; then what they must leave the same in a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_tokenizers import byte_tokenizer
from torch import nn

from limbeck.errors import ConfigError
from limbeck.models.anatomy import head_of, hidden_states
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.tiny import ScratchConfig, scratch_model, symbol_tokenizer
from limbeck.traces.batch import Batch, Example, collate, make_example
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sample import ANSWER, COT, PADDING, PROMPT, Sample
from limbeck.traces.supervise import SegmentWeights, SupervisionConfig, token_weights
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

SEGMENTS = np.array([PROMPT, PROMPT, COT, COT, ANSWER], dtype=np.int8)
SAMPLE = Sample(input_ids=np.arange(1, 6, dtype=np.int32), segment_ids=SEGMENTS, ending_start=3)
ALL = np.ones(5, dtype=bool)
FULL, RESPONSE = TruncationConfig(), SupervisionConfig()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("prompt+cot+answer", [0, 1, 1, 1, 1]),
        ("cot+answer", [0, 0, 1, 1, 1]),
        ("prompt+cot", [0, 1, 1, 1, 0]),
        ("cot", [0, 0, 1, 1, 0]),
        ("answer", [0, 0, 0, 0, 1]),
        ("prompt+answer", [0, 1, 0, 0, 1]),
    ],
)
def test_the_papers_six_conditions(preset, expected):
    ce, kd = token_weights(SAMPLE, ALL, SupervisionConfig(preset=preset))
    assert ce.tolist() == kd.tolist() == expected
    assert ce.dtype == kd.dtype == np.float32


def test_ce_and_kd_have_weights_of_their_own_that_override_the_preset():
    config = SupervisionConfig(preset="answer", kd=SegmentWeights(prompt=0.25, cot=2.0))
    ce, kd = token_weights(SAMPLE, ALL, config)
    assert ce.tolist() == [0, 0, 0, 0, 1]
    assert kd.tolist() == [0, 0.25, 2, 2, 0]


def test_tokens_outside_the_cut_and_padding_weigh_nothing():
    ce, _ = token_weights(SAMPLE, np.array([True, True, False, True, False]), SupervisionConfig())
    assert ce.tolist() == [0, 0, 0, 1, 0]
    assert SegmentWeights(prompt=1, cot=1, answer=1).of(np.array([PADDING, ANSWER])).tolist() == [0, 1]


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(ConfigError, match="cot weight"):
        SegmentWeights(cot=weight)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'cot\+answer'"):
        SupervisionConfig(preset="cot+answers")


def example(length: int, first_id: int = 1) -> Example:
    sample = Sample(
        input_ids=np.arange(first_id, first_id + length, dtype=np.int32),
        segment_ids=np.sort(np.arange(length) % 3).astype(np.int8),
        ending_start=length,
    )
    return make_example(sample, FULL, SupervisionConfig(preset="prompt+cot+answer"))


def test_packed_puts_all_in_one_row():
    batch = collate([example(3), example(2, 10)], "packed", pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segment_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.ce_weight.tolist() == [[0, 1, 1, 0, 1]]
    assert batch.sequence_lengths == (3, 2) and batch.num_tokens == 5
    assert batch.target_rows().tolist() == [1, 2, 4]


def test_padded_pads_on_the_right_with_weight_zero():
    batch = collate([example(3), example(2, 10)], "padded", pad_id=2)
    assert batch.input_ids.tolist() == [[1, 2, 3], [10, 11, 2]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.segment_ids.tolist() == [[0, 1, 2], [0, 1, PADDING]]
    assert batch.kd_weight.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch.num_tokens == 5 and batch.target_rows().tolist() == [1, 2, 4]


def test_target_rows_are_those_with_either_weight():
    config = SupervisionConfig(ce=SegmentWeights(answer=1), kd=SegmentWeights(cot=0.5))
    batch = collate([make_example(SAMPLE, FULL, config)], "packed", pad_id=0)
    assert batch.target_rows().tolist() == [2, 3, 4]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_end_of_turn_keeps_its_label_though_it_is_the_padding_token(layout):
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    traces = [
        Trace(messages=({"role": "user", "content": "hi"},), cot=cot, answer=answer)
        for cot, answer in (("a", "b"), ("a longer one", "b c"), (None, ""))
    ]
    samples = [render(trace, tokenizer, RenderConfig()) for trace in traces]
    batch = collate([make_example(s, FULL, RESPONSE) for s in samples], layout, tokenizer.pad_token_id)
    ends = (batch.input_ids == tokenizer.eos_token_id) & (batch.segment_ids == ANSWER)
    assert int(ends.sum()) == 3
    assert batch.ce_weight[ends].tolist() == batch.kd_weight[ends].tolist() == [1, 1, 1]
    assert not batch.ce_weight[batch.segment_ids == PADDING].any()


SHAPE = ScratchConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, seed=3)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [render(t, symbol_tokenizer(), RenderConfig()) for t in generate(4, 5, 1, 4)]


def model(layout: str) -> nn.Module:
    made = scratch_model(SHAPE)
    if layout == "packed":
        made.set_attn_implementation(PACKED_ATTENTION)
    return made.double()


def states_of(made: nn.Module, batch: Batch) -> torch.Tensor:
    lengths = batch.sequence_lengths if batch.layout == "packed" else None
    return hidden_states(made, batch.input_ids, batch.positions, lengths)


def cross_entropy(made: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the weighted losses, written plainly."""
    rows = batch.target_rows()
    head = head_of(made)
    logits = states_of(made, batch).flatten(0, 1)[rows - 1] @ head.weight.T
    losses = nn.functional.cross_entropy(logits, batch.input_ids.flatten()[rows], reduction="none")
    return (losses * batch.ce_weight.flatten()[rows]).sum()


def loss_and_gradients(layout: str, examples: list[Example]) -> tuple[float, list[torch.Tensor]]:
    made = model(layout)
    loss = cross_entropy(made, collate(examples, layout, pad_id=0))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in made.parameters()]


def assert_same(a: tuple[float, list[torch.Tensor]], b: tuple[float, list[torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-9) and a[0] > 0
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("preset", ["prompt+cot+answer", "cot"])
def test_dropping_a_suffix_is_masking_it(samples, layout, preset):
    supervision = SupervisionConfig(preset=preset)

    def run(mask_only: bool) -> tuple[float, list[torch.Tensor]]:
        cut = TruncationConfig(lead_fraction=0.6, mask_only=mask_only)
        return loss_and_gradients(layout, [make_example(s, cut, supervision) for s in samples])

    assert_same(run(False), run(True))


def test_dropping_a_prefix_is_not_masking_it(samples):
    def loss(mask_only: bool) -> float:
        cut = TruncationConfig(policy="tail", lead_fraction=0.5, mask_only=mask_only)
        return loss_and_gradients("packed", [make_example(s, cut, RESPONSE) for s in samples])[0]

    assert abs(loss(False) - loss(True)) > 1e-3


def test_packed_is_padded(samples):
    cut = TruncationConfig(lead_fraction=0.8, keep_ending=True)
    examples = [make_example(s, cut, RESPONSE) for s in samples]
    assert len({len(e) for e in examples}) > 1
    packed, padded = (collate(examples, layout, pad_id=0) for layout in ("packed", "padded"))
    with torch.no_grad():
        rows = states_of(model("packed"), packed)[0].split(packed.sequence_lengths)
        for row, other, length in zip(rows, states_of(model("padded"), padded), padded.sequence_lengths, strict=True):
            torch.testing.assert_close(row, other[:length], rtol=1e-9, atol=1e-9)
    assert_same(loss_and_gradients("packed", examples), loss_and_gradients("padded", examples))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_neighbours_in_a_batch_do_not_see_each_other(samples, layout):
    examples = [make_example(s, FULL, RESPONSE) for s in samples]
    batch = collate(examples, layout, pad_id=0)
    starts = (
        np.cumsum([0, *batch.sequence_lengths[:-1]])
        if layout == "packed"
        else np.arange(4) * max(batch.sequence_lengths)
    )
    changed = batch.input_ids.clone()
    span = slice(int(starts[1]), int(starts[1]) + batch.sequence_lengths[1])
    changed.flatten()[span] = (changed.flatten()[span] + 1) % 50
    made = model(layout)
    with torch.no_grad():
        before = states_of(made, batch).flatten(0, 1)
        after = hidden_states(
            made, changed, batch.positions, batch.sequence_lengths if layout == "packed" else None
        ).flatten(0, 1)
    for index, (start, length) in enumerate(zip(starts, batch.sequence_lengths, strict=True)):
        same = torch.equal(before[start : start + length], after[start : start + length])
        assert same == (index != 1)


def test_padding_is_not_seen_and_needs_no_mask(samples):
    examples = [make_example(s, FULL, RESPONSE) for s in samples]
    made = model("padded")
    with torch.no_grad():
        one, other = (states_of(made, collate(examples, "padded", pad_id=pad)) for pad in (0, 7))
    real = collate(examples, "padded", pad_id=0).segment_ids != PADDING
    assert torch.equal(one[real], other[real]) and not torch.equal(one, other)


def test_a_packed_batch_of_a_model_with_other_attention_has_the_same_states(samples):
    batch = collate([make_example(s, FULL, RESPONSE) for s in samples], "packed", pad_id=0)
    torch.testing.assert_close(states_of(model("padded"), batch), states_of(model("packed"), batch))
