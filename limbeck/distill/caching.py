"""The stage `limbeck teacher cache`: traces in, what the teacher says about them on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint
from limbeck.config import checked
from limbeck.distill.data import UNCUT
from limbeck.distill.privileged import check_privileged, privileged
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.stage import How
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.reading import Translation, translate
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import Example, make_example
from limbeck.traces.counts import tell
from limbeck.traces.fit import fit
from limbeck.traces.render import RenderConfig
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.supervise import Preset, SupervisionConfig
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig


@checked
class CacheStageConfig:
    """Whose words on which tokens are stored, and in which form."""

    teacher: str
    """Directory, alias (tiny-teacher, smollm2-135m) or hub id of the teacher; its tokenizer renders the traces, or that
    of cache.tokenizer."""
    traces: TraceConfig
    """Where the traces come from."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which traces are used."""
    max_trace_tokens: int | None = None
    """Leave out traces that are longer than this in tokens, before any cut."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens; runs that read the cache must render in the same way."""
    truncation: TruncationConfig = UNCUT
    """Which part of every trace is stored. Uncut traces serve every cut at the end; other cuts (keep_ending, middle)
    make other sequences, which are added by calling the command again with that cut and the same directory."""
    segments: Preset = "cot+answer"
    """Segments whose positions are stored; prompt+cot+answer stores all."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """What is kept at a position."""

    def __post_init__(self) -> None:
        if self.cache.privileged:
            check_privileged(self.cache.privileged)
        if self.cache.tokenizer and "prompt" in self.segments:
            raise ConfigError(
                f"segments {self.segments}: with cache.tokenizer the teacher reads the prompt in its own template, so "
                "that there are no targets in it; choose cot+answer, cot or answer"
            )

    @property
    def tokenizer(self) -> str:
        """The model whose tokenizer renders the traces."""
        return self.cache.tokenizer or self.teacher

    def asked(self, examples: Sequence[Example], traces: Sequence[Trace], tokenizer: Any) -> list[Stored]:
        """The sequences and positions that the teacher is asked about, and what it is shown beside them.

        Raises: as `privileged`.
        """
        if not self.cache.privileged:
            return [Stored(example.sample.input_ids, example.kd_weight > 0) for example in examples]
        by_key = {trace.key: trace for trace in traces}
        return privileged(examples, by_key, tokenizer, self.render, self.cache.privileged)

    def translated(
        self, samples: Sequence[Sample], asked: Sequence[Stored], traces: Sequence[Trace]
    ) -> Translation | None:
        """What the teacher reads in place of the samples of the traces; None where it reads them themselves.

        Raises: ConfigError for traces of several turns or with tools.
        """
        if not self.cache.tokenizer:
            return None
        if any(trace.has_turns for trace in traces):
            raise ConfigError(
                "cache.tokenizer translates one reply to a prompt; traces of several turns or with tools are not for it"
            )
        return translate(self.teacher, self.tokenizer, samples, asked, traces, self.render)


def run(config: CacheStageConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Bring the cache in `out` to hold what `config` asks for; a call that was interrupted goes on.

    Raises: PairError when `out` is the cache of another teacher or form, and what reading and rendering raise.
    """
    traces, read = read_traces(config.traces)
    traces, selected = select_traces(traces, config.select)
    tokenizer = load_tokenizer(config.tokenizer)
    samples, _, notes = render_traces(traces, tokenizer, config.render, config.max_trace_tokens, config.traces.on_bad)
    tell([*read.lines(), *selected.lines(), *notes])
    segments = SupervisionConfig(preset=config.segments)
    cut = fit(config.truncation, samples)
    examples = [make_example(sample, cut, segments) for sample in samples]
    asked = config.asked(examples, traces, tokenizer)
    translation = config.translated([example.sample for example in examples], asked, traces)
    write_cache(config.teacher, config.cache, asked, out, config, how.on, translation)
    return Checkpoint(out)
