"""Traces to examples: read, select, split, render, cut. All of it happens once, before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from limbeck.distill.config import DistillConfig, SourceConfig
from limbeck.distill.moving_cut import MovingCut
from limbeck.distill.rollouts import Prompts
from limbeck.errors import ConfigError
from limbeck.traces.batch import Example, make_example
from limbeck.traces.fit import fit
from limbeck.traces.render import RenderConfig, render_prompt
from limbeck.traces.rendering import Rendered, render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.sample_weight import sample_weight
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
    sources: tuple[str, ...] = ()
    """Names of the sources by their numbers, where there are several."""


class _Split(NamedTuple):
    """The traces of one source before they are rendered."""

    train: list[Trace]
    validation: list[Trace]
    counts: dict[str, Any]
    notes: list[str]

    @property
    def size(self) -> int:
        """Traces that were selected."""
        return len(self.train) + len(self.validation)


def prepare(config: DistillConfig, tokenizer: Any) -> Data:
    """All examples of a run.

    Raises: ConfigError when no supervised token is left, and what reading and rendering raise.
    """
    sources, names = config.all_sources, source_names(config)
    splits = _disjoint([_split(config, source) for source in sources], names)
    if config.training.keep_best is not None and not any(split.validation for split in splits):
        size = sum(split.size for split in splits)
        raise ConfigError(f"training.keep_best needs held-out traces, and of {size} none is; set num_validation.")
    train: list[Sample] = []
    validation: list[Sample] = []
    told: list[str] = []
    for number, (split, source) in enumerate(zip(splits, sources, strict=True)):
        samples, dropped, notes = _rendered(split.train, tokenizer, config, source)
        held_out = _rendered(split.validation, tokenizer, config, source).samples
        weights = _weights(split.train, config, source)
        train += [replace(sample, origin=number, weight=weights[sample.trace_key]) for sample in samples]
        validation += [replace(sample, origin=number) for sample in held_out]
        split.counts.update(left_out=dropped, train_traces=len(samples), validation_traces=len(held_out))
        told += [f"{names[number]}: {note}" if names else note for note in (*split.notes, *notes)]
    cut, moving = cuts_of(config, train)
    examples = [make_example(sample, cut, config.supervision) for sample in train]
    _check_supervised(examples, config.kd_ratio)
    counts = _joined(splits, names) | cut_counts(train, examples, cut)
    uncut = [make_example(sample, UNCUT, RESPONSE) for sample in validation]
    traces = [trace for split in splits for trace in split.train]
    prompts = None if config.on_policy is None else _prompts(traces, train, tokenizer, config.render)
    told += parts_left_out(counts, sum(split.size for split in splits))
    return Data(examples, uncut, counts, prompts, moving=moving, notes=told, sources=names)


def source_names(config: DistillConfig) -> tuple[str, ...]:
    """What the sources of a run are called, each once; none where there is one."""
    if not config.sources:
        return ()
    names: list[str] = []
    for source in config.all_sources:
        chosen = ", ".join(f"{column} {value}" for column, value in source.select.where.items())
        name = f"{source.traces.source} ({chosen})" if chosen else source.traces.source
        names.append(name if name not in names else f"{name} [{len(names) + 1}]")
    return tuple(names)


def _split(config: DistillConfig, source: SourceConfig) -> _Split:
    """The traces of a source, chosen, split, and without those that weigh nothing."""
    traces, read = read_traces(source.traces)
    traces, selected = select_traces(traces, source.select)
    held_out = validation_size(len(traces), config.num_validation)
    train, validation = split_traces(traces, config.split_seed, num_validation=held_out)
    notes = [*read.lines(), *selected.lines()]
    if (weighing := config.supervision.sample_weight) is not None:
        weighty = [trace for trace in train if sample_weight(trace, weighing) > 0]
        if not weighty:
            raise ConfigError(f"{source.traces.source}: all {len(train)} traces weigh 0 by {weighing.column}.")
        if len(weighty) < len(train):
            notes.append(f"{len(train) - len(weighty)} of {len(train)} traces weigh 0 by {weighing.column} and go")
        train = weighty
    return _Split(train, validation, {"read": asdict(read), "selected": asdict(selected)}, notes)


def _disjoint(splits: Sequence[_Split], names: Sequence[str]) -> list[_Split]:
    """The same without training traces whose prompt another source holds out.

    Raises: ConfigError where that leaves none of a source.
    """
    keys = [{trace.prompt_key for trace in split.validation} for split in splits]
    found = []
    for number, split in enumerate(splits):
        foreign = set().union(*(own for other, own in enumerate(keys) if other != number))
        train = [trace for trace in split.train if trace.prompt_key not in foreign]
        gone = len(split.train) - len(train)
        if split.train and not train:
            raise ConfigError(f"{names[number]}: all prompts of its traces are held out by another source.")
        note = [f"{gone} of {len(split.train)} traces are not trained: another source holds out their prompts"]
        found.append(split._replace(train=train, notes=split.notes + note * bool(gone)))
    return found


def _rendered(traces: Sequence[Trace], tokenizer: Any, config: DistillConfig, source: SourceConfig) -> Rendered:
    return render_traces(traces, tokenizer, config.render, config.max_trace_tokens, source.traces.on_bad)


def _weights(traces: Sequence[Trace], config: DistillConfig, source: SourceConfig) -> dict[str, float]:
    """What every trace weighs, by its key."""
    by = config.supervision.sample_weight
    return {trace.key: source.weight * (1.0 if by is None else sample_weight(trace, by)) for trace in traces}


def _joined(splits: Sequence[_Split], names: Sequence[str]) -> dict[str, Any]:
    """What became of the traces, with an entry a source where there are several."""
    if not names:
        return splits[0].counts
    numbers = {key: sum(split.counts[key] for split in splits) for key in ("train_traces", "validation_traces")}
    return numbers | {"sources": {name: split.counts for name, split in zip(names, splits, strict=True)}}


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
    """The prompt of each sample, whatever the cut has left of it.

    Raises: ConfigError for traces of several turns or with tools.
    """
    if any(trace.has_turns for trace in traces):
        raise ConfigError(
            "on_policy writes one reply to a prompt; traces of several turns or with tools are not for it"
        )
    messages = {trace.key: trace.messages for trace in traces}
    ids = [render_prompt(tokenizer, messages[sample.trace_key], config) for sample in samples]
    return Prompts(ids, float(np.mean([len(s) - len(p) for s, p in zip(samples, ids, strict=True)])))


def fingerprint(examples: Sequence[Example]) -> str:
    """Sixteen hex digits of the examples' tokens, in order: a resumed run must read the same ones."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "big"))
        digest.update(example.sample.input_ids.tobytes())
        if example.sample.weight != 1:
            digest.update(repr(example.sample.weight).encode())
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
