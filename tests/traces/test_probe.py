"""Probing for the earliest point at which a teacher knows the answer, against naive recomputation of every prefix."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_runs import save_model

from limbeck.checkpoint import Checkpoint
from limbeck.engine.backends import decoder_of
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger, flop_counter
from limbeck.models.anatomy import sizes_of
from limbeck.models.load import load_model, load_tokenizer
from limbeck.traces import probe
from limbeck.traces.probe import ProbeConfig, answer_log_probs, checkpoints, probe_trace
from limbeck.traces.render import PROBED_CHARS, RenderConfig, render, render_located
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.synthetic import generate
from limbeck.traces.truncate import TruncationConfig, apply_cut, truncate

CHAIN = TraceConfig(source="builtin:chain", num_traces=6, seed=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher") / "model", sharpness=30.0)


def probed(name, trace, **fields):
    config = ProbeConfig(traces=CHAIN, teacher=name, **fields)
    model, tokenizer = load_model(name).eval(), load_tokenizer(name)
    located = render_located(trace, tokenizer, config.render)
    marks = checkpoints(located, config)
    tails = [probe._tail(tokenizer, config, trace.reference, probe._ends_line(located, mark)) for mark in marks]
    return config, model, tokenizer, located, marks, tails


@pytest.mark.parametrize(
    "fields",
    [
        {"every_tokens": 1},
        {"checkpoints": "tokens", "every_tokens": 7, "tail_tokens": 9},
        {"answer_template": "So {answer} ok", "tail_tokens": 1},
    ],
)
def test_equal_to_reading_every_prefix_anew(teacher, fields):
    for trace in generate(3, 5, 3, 6):
        config, model, _, located, marks, tails = probed(teacher, trace, **fields)
        ids = torch.from_numpy(located.sample.input_ids[: marks[-1]].astype(np.int64))
        ledger, decoder = Ledger(), decoder_of(model)
        with flop_counter() as counter:
            found = list(
                answer_log_probs(decoder, ids.tolist(), marks, tails, config.tail_tokens, sizes_of(model), ledger)
            )
        assert ledger.flops["teacher"] == pytest.approx(counter.get_total_flops(), rel=0.02)
        for mark, tail, log_prob in zip(marks, tails, found, strict=True):
            whole = torch.cat([ids[:mark], torch.tensor(tail.ids)])
            with torch.no_grad():
                log_probs = torch.log_softmax(model(whole[None]).logits[0].double(), -1)
            expected = sum(log_probs[mark + i - 1, tail.ids[i]].item() for i in tail.scored)
            assert log_prob == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_checkpoints_are_ends_of_lines(teacher):
    trace = generate(1, 5, 4, 4)[0]
    _, _, tokenizer, located, marks, tails = probed(teacher, trace, every_tokens=1)
    texts = [tokenizer.decode(located.sample.input_ids[:mark]) for mark in marks]
    assert len(marks) == trace.cot.count("\n") + 1
    assert all(text.endswith("\n") for text in texts)
    assert marks == sorted(set(marks)) and marks[-1] == located.sample.ending_start
    for tail in tails:
        assert tokenizer.decode(tail.ids) == f"</think>\n\n{trace.reference}"
        assert [tail.ids[i] for i in tail.scored] == tokenizer.encode(trace.reference)


def test_a_mark_inside_a_line_closes_it_first(teacher):
    trace = generate(1, 5, 4, 4)[0]
    _, _, tokenizer, located, marks, tails = probed(teacher, trace, checkpoints="tokens", every_tokens=3)
    for mark, tail in zip(marks, tails, strict=True):
        text = tokenizer.decode(located.sample.input_ids[:mark]) + tokenizer.decode(tail.ids)
        assert text.endswith(f"\n</think>\n\n{trace.reference}")
        assert not text.endswith(f"\n\n</think>\n\n{trace.reference}")


def test_cut_point_comes_back_as_the_same_tokens(teacher):
    tokenizer = load_tokenizer(teacher)
    for trace in generate(4, 8, 2, 6):
        _, _, _, located, marks, _ = probed(teacher, trace, checkpoints="tokens", every_tokens=2)
        for mark in marks:
            chars = int(located.ends[mark - 1])
            again = dataclasses.replace(trace, metadata={PROBED_CHARS: chars})
            sample = render(again, tokenizer, RenderConfig())
            assert sample.probed_end == mark
            kept = apply_cut(sample, truncate(sample, TruncationConfig(policy="probed")))
            assert len(kept) == kept.probed_end == mark
            ending = truncate(sample, TruncationConfig(policy="probed", keep_ending=True))
            assert len(ending.kept) == mark + len(sample) - sample.ending_start
            masked = truncate(sample, TruncationConfig(policy="probed", mask_only=True))
            assert len(masked.kept) == len(sample) and masked.supervised.sum() == mark


def test_without_a_cut_point_the_trace_stays_whole(teacher):
    sample = render(generate(1, 5, 4, 4)[0], load_tokenizer(teacher), RenderConfig())
    assert sample.probed_end is None
    assert len(truncate(sample, TruncationConfig(policy="probed")).kept) == len(sample)


def test_first_checkpoint_over_the_threshold_is_taken(teacher, monkeypatch):
    trace = generate(1, 5, 4, 4)[0]
    config, model, tokenizer, located, marks, _ = probed(teacher, trace, every_tokens=1)
    values = np.log([0.1, 0.89, 0.91, 0.2, *[0.99] * 20])
    asked = []

    def fake(*_):
        for value in values:
            asked.append(value)
            yield float(value)

    monkeypatch.setattr(probe, "answer_log_probs", fake)
    found = probe_trace(decoder_of(model), tokenizer, trace, config, sizes_of(model), Ledger())
    assert found == (int(located.ends[marks[2] - 1]), marks[2] / len(located.sample))
    assert len(asked) == 3
    wrong = dataclasses.replace(trace, correct=False)
    assert probe_trace(decoder_of(model), tokenizer, wrong, config, sizes_of(model), Ledger()) is None


def test_command_writes_cut_points_and_cost(tmp_path):
    """The built-in teacher closes a thought when it has begun to check: not before the derivation, soon after it."""
    config = ProbeConfig(traces=CHAIN, teacher="tiny-teacher", every_tokens=1)
    counts = probe.run(config, tmp_path / "out").manifest["counts"]
    assert counts["traces"] == counts["with_cut_point"] == 6
    traces, _ = read_traces(TraceConfig(source=str(tmp_path / "out")))
    for trace in traces:
        derived = trace.cot.index("\nSo ")
        checked = trace.cot.index("ok\n", derived) + len("ok\n")
        assert derived < trace.metadata[PROBED_CHARS] <= checked
    manifest = Checkpoint(tmp_path / "out").manifest
    assert manifest["ledger"]["flops"]["teacher"] > 0 and manifest["ledger"]["seconds"]["teacher"] > 0
    assert 0.4 < manifest["metrics"]["mean_kept_fraction"] < 0.8
    assert json.loads((tmp_path / "out/traces.jsonl").read_text().splitlines()[0])["limbeck_trace"] == 1


@pytest.mark.parametrize(
    "fields", [{"every_tokens": 0}, {"min_probability": 1.0}, {"answer_template": "none"}, {"tail_tokens": 0}]
)
def test_bad_settings_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ProbeConfig(traces=CHAIN, teacher="tiny-teacher", **fields)
