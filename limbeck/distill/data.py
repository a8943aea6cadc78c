"""Traces to examples: read, select, split, render, cut. All of it happens once, before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from limbeck.distill.config import DistillConfig
from limbeck.distill.moving_cut import MovingCut
from limbeck.distill.rollouts import Prompts
from limbeck.errors import ConfigError
from limbeck.traces.batch import Example, make_example
from limbeck.traces.fit import fit
from limbeck.traces.render import RenderConfig, render_prompt
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.select import select_traces, split_traces, validation_size
from limbeck.traces.sources import read_traces
from limbeck.traces.stats import cut_losses
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

UNCUT = TruncationConfig()
RESPONSE = SupervisionConfig(preset="cot+answer")
NOTED_SHARE = 0.05


class Data(NamedTuple):
    """What a run reads."""

    train: list[Example]
    validation: list[Example]
    """Uncut, thought and answer supervised, whatever the run's own cut and supervision are."""
    counts: dict[str, Any]
    """What was read, dropped and cut, for the manifest."""
    prompts: Prompts | None = None
    """Of the training examples, where the student is to write rollouts."""
    validation_groups: list[list[Example]] | None = None
    """The held-out examples as they are to be validated together; None: grouped by length."""
    moving: MovingCut | None = None
    """The cut of every step, where it moves; `train` then holds the longest cuts."""
    notes: Sequence[str] = ()
    """What was left out, put together or held out, for the console."""


def prepare(config: DistillConfig, tokenizer: Any) -> Data:
    """All examples of a run.

    Raises: ConfigError when no supervised token is left, and what reading and rendering raise.
    """
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    held_out = validation_size(len(traces), config.num_validation)
    train_traces, validation_traces = split_traces(traces, config.split_seed, num_validation=held_out)
    if config.training.keep_best is not None and not validation_traces:
        raise ConfigError(
            f"training.keep_best needs held-out traces, and of {len(traces)} none is; set num_validation."
        )
    train, dropped, notes = render_traces(
        train_traces, tokenizer, config.render, config.max_trace_tokens, config.traces.on_bad
    )
    validation, _, _ = render_traces(
        validation_traces, tokenizer, config.render, config.max_trace_tokens, config.traces.on_bad
    )
    cut, moving = cuts_of(config, train)
    examples = [make_example(sample, cut, config.supervision) for sample in train]
    _check_supervised(examples, config.kd_ratio)
    counts = {
        "read": asdict(read),
        "selected": asdict(selected),
        "left_out": dropped,
        "train_traces": len(train),
        "validation_traces": len(validation),
        **cut_counts(train, examples, cut),
    }
    uncut = [make_example(sample, UNCUT, RESPONSE) for sample in validation]
    prompts = None if config.on_policy is None else _prompts(train_traces, train, tokenizer, config.render)
    told = [*read.lines(), *selected.lines(), *notes, *parts_left_out(counts, len(traces))]
    return Data(examples, uncut, counts, prompts, moving=moving, notes=told)


def cuts_of(config: DistillConfig, samples: Sequence[Sample]) -> tuple[TruncationConfig, MovingCut | None]:
    """The cut of some whole samples, fitted to them; where it moves, the longest one and that of every step."""
    if not config.moves_cut:
        return fit(config.truncation, samples), None
    raised = None if config.stop_control is None else config.stop_control.raises
    moving = MovingCut.of(samples, config.truncation, config.supervision, config.cut_schedule, raised)
    return moving.longest(), moving


def _check_supervised(examples: Sequence[Example], kd_ratio: float) -> None:
    ce, kd = kd_ratio < 1, kd_ratio > 0
    if not any((ce and e.ce_weight.any()) or (kd and e.kd_weight.any()) for e in examples):
        raise ConfigError(
            f"no supervised token is left in {len(examples)} traces after truncation; supervise another segment or "
            "keep more."
        )


def _prompts(traces: Sequence[Trace], samples: Sequence[Sample], tokenizer: Any, config: RenderConfig) -> Prompts:
    """The prompt of each sample, whatever the cut has left of it."""
    messages = {trace.key: trace.messages for trace in traces}
    ids = [render_prompt(tokenizer, messages[sample.trace_key], config) for sample in samples]
    return Prompts(ids, float(np.mean([len(s) - len(p) for s, p in zip(samples, ids, strict=True)])))


def fingerprint(examples: Sequence[Example]) -> str:
    """Sixteen hex digits of the examples' tokens, in order: a resumed run must read the same ones."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "big"))
        digest.update(example.sample.input_ids.tobytes())
    return digest.hexdigest()[:16]


def parts_left_out(counts: Mapping[str, Any], num_traces: int) -> list[str]:
    """The parts above NOTED_SHARE that are held out, or that no loss is left of, one line each."""
    notes = []
    if counts["validation_traces"] > NOTED_SHARE * num_traces:
        notes.append(
            f"{counts['validation_traces']} of {num_traces} traces are held out for validation and not trained "
            "(num_validation)"
        )
    if counts["without_any_supervision"] > NOTED_SHARE * counts["train_traces"]:
        notes.append(
            f"{counts['without_any_supervision']} of {counts['train_traces']} traces have no supervised token left "
            "after the cut, so they give no loss; keep more, or cut another unit (truncation.unit)"
        )
    return notes


def cut_counts(samples: Sequence[Sample], examples: Sequence[Example], truncation: TruncationConfig) -> dict[str, Any]:
    """What the cut took from the traces: tokens, and shares of traces that lost marker, answer, derivation."""
    return {
        "tokens_before_cut": sum(len(sample) for sample in samples),
        "tokens_after_cut": sum(len(example) for example in examples),
        **cut_losses(samples, truncation),
        "without_any_supervision": sum(not (e.ce_weight.any() or e.kd_weight.any()) for e in examples),
    }
