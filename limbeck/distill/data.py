"""Traces to examples: read, select, split, render, cut. All of it happens once, before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from limbeck.distill.config import DistillConfig
from limbeck.distill.rollouts import Prompts
from limbeck.errors import ConfigError
from limbeck.progress import track
from limbeck.traces.batch import Example, make_example
from limbeck.traces.render import RenderConfig, render, render_prompt
from limbeck.traces.sample import Sample
from limbeck.traces.select import select_traces, split_traces
from limbeck.traces.sources import read_traces
from limbeck.traces.stats import cut_losses
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

UNCUT = TruncationConfig()
RESPONSE = SupervisionConfig(preset="cot+answer")


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


def prepare(config: DistillConfig, tokenizer: Any) -> Data:
    """All examples of a run.

    Raises: ConfigError when no supervised token is left, and what reading and rendering raise.
    """
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    train_traces, validation_traces = split_traces(traces, config.split_seed, num_validation=config.num_validation)
    train, too_long = render_all(train_traces, tokenizer, config.render, config.max_trace_tokens)
    validation, _ = render_all(validation_traces, tokenizer, config.render, config.max_trace_tokens)
    examples = [make_example(sample, config.truncation, config.supervision) for sample in train]
    ce, kd = config.kd_ratio < 1, config.kd_ratio > 0
    if not any((ce and e.ce_weight.any()) or (kd and e.kd_weight.any()) for e in examples):
        raise ConfigError(
            f"no supervised token is left in {len(examples)} traces after truncation; supervise another segment or "
            "keep more."
        )
    counts = {
        "read": asdict(read),
        "selected": asdict(selected),
        "too_long": too_long,
        "train_traces": len(train),
        "validation_traces": len(validation),
        **cut_counts(train, examples, config.truncation),
    }
    uncut = [make_example(sample, UNCUT, RESPONSE) for sample in validation]
    prompts = None if config.on_policy is None else _prompts(train_traces, train, tokenizer, config.render)
    return Data(examples, uncut, counts, prompts)


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


def render_all(
    traces: Sequence[Trace], tokenizer: Any, config: RenderConfig, max_tokens: int | None
) -> tuple[list[Sample], int]:
    """Samples of the traces that are not too long, and how many were.

    Raises: ConfigError when all were too long.
    """
    samples = [render(trace, tokenizer, config) for trace in track(traces, "rendering")]
    kept = [sample for sample in samples if max_tokens is None or len(sample) <= max_tokens]
    if samples and not kept:
        shortest = min(len(sample) for sample in samples)
        raise ConfigError(f"max_trace_tokens {max_tokens} leaves out all traces; the shortest has {shortest} tokens.")
    return kept, len(samples) - len(kept)


def cut_counts(samples: Sequence[Sample], examples: Sequence[Example], truncation: TruncationConfig) -> dict[str, Any]:
    """What the cut took from the traces: tokens, and shares of traces that lost marker, answer, derivation."""
    return {
        "tokens_before_cut": sum(len(sample) for sample in samples),
        "tokens_after_cut": sum(len(example) for example in examples),
        **cut_losses(samples, truncation),
        "without_any_supervision": sum(not (e.ce_weight.any() or e.kd_weight.any()) for e in examples),
    }
