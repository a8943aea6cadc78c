"""Weights of traces by a column of their record: the formulas, and what each adds to the loss of a step."""

import pytest
import torch
from tiny_runs import run_config

from limbeck.distill.data import prepare
from limbeck.distill.microbatch import StepLoss, step_totals, supervised_rows
from limbeck.errors import ConfigError, TraceFormatError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.batch import collate
from limbeck.traces.sample_weight import SampleWeightConfig, sample_weight
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import Trace, write_jsonl

RATES = (0.25, 0.5, 1.0, 0.75, 0.125)


def trace_of(value):
    return Trace(messages=({"role": "user", "content": "?"},), cot="a", answer="b", metadata={"pass_rate": value})


@pytest.mark.parametrize(
    ("formula", "rate", "expected"),
    [
        *(("variance", 0.5, 1.0), ("variance", 0.25, 0.75), ("variance", 1.0, 0.0)),
        *(("one_minus", 0.2, 0.8), ("value", 3.5, 3.5), ("value", 0, 0.0)),
    ],
)
def test_formulas(formula, rate, expected):
    assert sample_weight(trace_of(rate), SampleWeightConfig(formula=formula)) == pytest.approx(expected)


@pytest.mark.parametrize("value", [1.5, -0.1, "half", None, float("nan")])
def test_what_is_no_rate_is_refused_by_place(value):
    with pytest.raises(TraceFormatError, match="pass_rate"):
        sample_weight(trace_of(value), SampleWeightConfig())


@pytest.fixture
def rated(tmp_path):
    traces = generate(len(RATES), 3, 1, 3)
    made = [
        Trace(messages=t.messages, cot=t.cot, answer=t.answer, metadata={"pass_rate": rate})
        for t, rate in zip(traces, RATES, strict=True)
    ]
    write_jsonl(made, tmp_path / "rated.jsonl")
    return str(tmp_path / "rated.jsonl")


def data_of(source, **changes):
    config = run_config({"traces": {"source": source}, "num_validation": 0, **changes})
    return prepare(config, symbol_tokenizer()), config


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
def test_a_step_is_the_weighted_mean_of_its_sequences(rated, normalization, layout):
    data, config = data_of(
        rated, **{"supervision.sample_weight": {"formula": "one_minus"}, "loss.normalization": normalization}
    )
    rates = [rate for rate in RATES if rate < 1]
    assert [e.sample.weight for e in data.train] == pytest.approx([1 - rate for rate in rates])
    loss = StepLoss(config.loss, 0.0, step_totals(data.train, normalization))
    batch = collate(data.train, layout, 0)
    found = supervised_rows(batch, loss)
    width = batch.input_ids.shape[1]
    starts = torch.tensor([0, *batch.sequence_lengths]).cumsum(0)
    own = torch.bucketize(found.rows, starts, right=True) - 1 if layout == "packed" else found.rows // width
    sums = torch.zeros(len(rates), dtype=torch.float64).index_add_(0, own, found.ce_coef.double())
    counts = [float((e.ce_weight > 0).sum()) if normalization == "token_mean" else 1.0 for e in data.train]
    expected = torch.tensor([(1 - rate) * n for rate, n in zip(rates, counts, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(sums, expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_traces_that_weigh_nothing_go_with_a_word(rated):
    data, _ = data_of(rated, **{"supervision.sample_weight": {"column": "pass_rate"}})
    assert len(data.train) == len(RATES) - 1
    assert any("1 of 5 traces weigh 0" in note for note in data.notes)


def test_only_traces_of_a_domain(rated):
    data, _ = data_of(rated, **{"select.where": {"pass_rate": "0.5"}})
    assert len(data.train) == 1 and any("4 pass_rate is not 0.5" in note for note in data.notes)
    with pytest.raises(ConfigError, match="no trace is left"):
        data_of(rated, **{"select.where": {"domain": "math"}})
