"""What is looked at before a cut is advised: traces through both models, derivations, the student's own texts.

1. At most `most_traces` traces, spread over the source, are read whole by teacher and student (look.py).
2. First derivations: where a teacher that is asked behind every line already gives the known answer (`traces probe`),
   or else where the answer is first written down.
3. The student answers some of the prompts by itself (free_run.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.config import checked
from limbeck.distill.config import DistillConfig
from limbeck.distill.pair import check_pair
from limbeck.distill.preflight import check_templates
from limbeck.engine.backends import decoder_of
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.anatomy import Sizes, sizes_of
from limbeck.models.load import load_model, load_tokenizer, vocabulary_size
from limbeck.progress import track
from limbeck.sweep.free_run import FreeRun, run_freely
from limbeck.sweep.look import Look, look
from limbeck.sweep.travel import Pair, steps_of, travel
from limbeck.teacher.live import LiveTeacher
from limbeck.traces.probe import ProbeConfig, probe_trace
from limbeck.traces.render import stop_ids
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import PROMPT, Sample
from limbeck.traces.select import select_traces
from limbeck.traces.sources import read_traces
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import exact_fraction


@checked
class CutAdviceConfig:
    """A distillation, and how closely its traces are looked at."""

    distill: DistillConfig
    """The run that is asked about: student, teacher, traces, rates and steps; its own cut does not matter."""
    most_traces: int = 200
    """Traces that are read, spread evenly over the source."""
    most_prompts: int = 32
    """Prompts that the student answers by itself, and traces whose derivations are verified by the teacher."""
    fractions: tuple[float, ...] = (0.25, 0.35, 0.5, 0.6, 0.75)
    """Shares of the tokens that are considered."""

    def __post_init__(self) -> None:
        if self.most_traces < 2 or self.most_prompts < 1:
            raise ConfigError("most_traces must be at least 2 and most_prompts at least 1")
        if not self.fractions or any(not 0 < exact_fraction(share) < 1 for share in self.fractions):
            raise ConfigError(f"fractions must be shares between 0 and 1; found {list(self.fractions)}")
        if self.distill.student.model is None:
            raise ConfigError("traces advise looks at an existing student; set distill.student.model")
        if self.distill.teacher.model is None:
            raise ConfigError("traces advise reads with the teacher's model; set distill.teacher.model")
        if self.distill.sources:
            raise ConfigError("traces advise looks at one source at a time; leave distill.sources out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """All that is known of a run before it is trained."""

    samples: Sequence[Sample]
    look: Look
    derivations: Sequence[int | None]
    """One past the last token of each trace's first derivation."""
    derived_by: str
    """teacher, text or nothing: how they were found."""
    free: FreeRun
    travel: float | None
    steps: int
    pair: Pair
    seconds: float
    flops: int
    """Of looking."""
    epoch_flops: int
    """Of one training pass over the whole source."""


def look_at(config: CutAdviceConfig) -> Seen:
    """Read, render and run everything that the advice rests on."""
    start, distill = time.perf_counter(), config.distill
    names = (str(distill.student.model), str(distill.teacher.model))
    tokenizer = load_tokenizer(names[0])
    student, teacher = (load_model(name, layout="packed") for name in names)
    check_pair(distill, student, tokenizer)
    check_templates(distill, tokenizer)
    everything, traces, samples = _traces(config, tokenizer)
    vocab = vocabulary_size(tokenizer)
    pair = Pair(sizes_of(student, vocab), sizes_of(teacher, vocab))
    mean_tokens = float(np.mean(list(map(len, samples))))
    steps = steps_of(distill.training, everything, mean_tokens)
    moved = travel(student, distill, steps)
    ends = {*stop_ids(tokenizer, distill.render), *_first_token(tokenizer, distill.render.end_marker)}
    found, first = look(LiveTeacher(student, vocab), LiveTeacher(teacher, vocab), samples, sorted(ends), vocab)
    few = range(0, len(traces), max(1, len(traces) // config.most_prompts))[: config.most_prompts]
    longest = max(int(np.sum(sample.segment_ids != PROMPT)) for sample in samples)
    asked = [traces[number] for number in few]
    free, second = run_freely(student, tokenizer, asked, distill.render, longest, pair.student)
    derivations, derived_by, third = _derivations(distill, teacher, tokenizer, traces, samples, few, pair.teacher)
    whole = sum(_training_flops(pair, sample, np.arange(len(sample))) for sample in samples)
    return Seen(
        samples=samples,
        look=found,
        derivations=derivations,
        derived_by=derived_by,
        free=free,
        travel=moved,
        steps=steps,
        pair=pair,
        seconds=time.perf_counter() - start,
        flops=sum(sum(ledger.flops.values()) for ledger in (first, second, third)),
        epoch_flops=round(whole * everything / len(samples)),
    )


def _traces(config: CutAdviceConfig, tokenizer: Any) -> tuple[int, list[Trace], list[Sample]]:
    """How many traces the run has, and those that are looked at with their samples."""
    distill = config.distill
    traces, _ = select_traces(read_traces(distill.traces)[0], distill.select)
    places = np.unique(np.linspace(0, len(traces) - 1, config.most_traces).round().astype(int))
    chosen = [traces[place] for place in places]
    rendered = render_traces(chosen, tokenizer, distill.render, distill.max_trace_tokens, distill.traces.on_bad)
    by_key = {trace.key: trace for trace in chosen}
    samples = [sample for sample in rendered.samples if np.sum(sample.segment_ids != PROMPT) > 1]
    if any(sample.turns for sample in samples):
        raise ConfigError(f"{distill.traces.source}: a cut is judged on one response a trace; set traces.turns last.")
    if len(samples) < 2:
        raise ConfigError(
            f"{distill.traces.source}: {len(samples)} of {len(chosen)} traces have a response; a cut is judged on "
            "several, at least 2: give traces with thought and answer."
        )
    return len(traces), [by_key[sample.trace_key] for sample in samples], samples


def _first_token(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)[:1]


def _derivations(
    distill: DistillConfig,
    teacher: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    samples: Sequence[Sample],
    few: Sequence[int],
    sizes: Sizes,
) -> tuple[list[int | None], str, Ledger]:
    """Where first derivations end, by the teacher for a few traces; by the text for all where it is never sure."""
    name, ledger, decoder = str(distill.teacher.model), Ledger(), decoder_of(teacher)
    probing = ProbeConfig(traces=distill.traces, teacher=name, render=distill.render, every_tokens=4)
    found: list[int | None] = [None] * len(samples)
    for number in track(few, "verifying derivations"):
        answer = probe_trace(decoder, tokenizer, traces[number], probing, sizes, ledger)
        found[number] = None if answer is None else round(answer[1] * len(samples[number]))
    if any(end is not None for end in found):
        return found, "teacher", ledger
    written = [sample.derivation_end for sample in samples]
    return written, "text" if any(end is not None for end in written) else "nothing", ledger


def _training_flops(pair: Pair, sample: Sample, kept: np.ndarray) -> int:
    return pair.training_flops(len(kept), int(np.sum(sample.segment_ids[kept] != PROMPT)))
