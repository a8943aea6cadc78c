"""Where traces come from: files, directories, the hub, and tasks that make their own.

`read_traces` names the format of each record, parses it, and deals with bad ones as `on_bad` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from limbeck.config import checked
from limbeck.errors import ConfigError, TraceFormatError, nearest
from limbeck.traces.files import Located, read_file, trace_files
from limbeck.traces.gym import read_gym
from limbeck.traces.hub import is_hub_id, is_saved_dataset, read_hub, read_saved
from limbeck.traces.parse import FORMATS, detect, parse_record
from limbeck.traces.record import Parsed
from limbeck.traces.synthetic import OPERATORS, generate
from limbeck.traces.thought import Markers
from limbeck.traces.trace import Trace

GYM_PREFIX = "reasoning-gym:"
BUILTIN_CHAIN = "builtin:chain"


@checked
class TraceConfig:
    """Where traces are read from, and how."""

    source: str
    """A .jsonl, .json or .parquet file; a directory of .jsonl or .parquet files, or one that
    datasets.save_to_disk wrote; reasoning-gym:TASK or builtin:chain, which make traces; else a hub id
    (owner/name), the only source that uses the network."""
    format: str = "auto"
    """Format of the records: limbeck, messages, sharegpt, prompt_completion, columns, gsm8k, reasoning_gym, or prompts
    without a reply; auto finds it."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields to rename before parsing, their name to ours, such as llm_response to completion."""
    markers: tuple[str, str] | None = None
    """The strings before and after the thought; null finds think tags and Sky-T1 tags."""
    subset: str | None = None
    """Configuration of a hub data set, where it has several."""
    split: str | None = None
    """Split to read; null takes train, or the only one."""
    on_bad: Literal["error", "skip", "keep"] = "error"
    """What to do with a bad record: stop, skip it, or keep it if only thought or end marker is missing."""
    num_traces: int | None = None
    """At most this many traces are read; a source that makes traces makes this many and needs the number."""
    seed: int = 0
    """Seed of a source that makes traces."""
    chain_min_steps: int = 4
    """Fewest steps of a problem of builtin:chain."""
    chain_max_steps: int = 6
    """Most steps of a problem of builtin:chain."""
    chain_operators: str = OPERATORS
    """Operators in the problems of builtin:chain: one or more of + - *."""
    chain_random_labels: bool = False
    """Label the steps of builtin:chain from a random letter on instead of from a."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConfigError("source: empty; expected a path, a hub id, reasoning-gym:TASK or builtin:chain")
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"format: unknown format {self.format!r}; {nearest(self.format, ('auto', *FORMATS))}")
        if self.markers is not None and not _are_markers(*self.markers):
            raise ConfigError(f"markers: {list(self.markers)}; expected two different strings, neither of them blank")
        if self.source.startswith("builtin:") and self.source != BUILTIN_CHAIN:
            raise ConfigError(f"source: no such task {self.source!r}; {nearest(self.source, (BUILTIN_CHAIN,))}")
        if self.num_traces is not None and self.num_traces < 1:
            raise ConfigError(f"num_traces: {self.num_traces}; expected 1 or more")
        if self.makes_traces and self.num_traces is None:
            raise ConfigError(f"num_traces: not set; {self.source} needs the number of traces to make")

    @property
    def makes_traces(self) -> bool:
        """Whether the source is a task that makes its traces."""
        return self.source == BUILTIN_CHAIN or self.source.startswith(GYM_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCounts:
    """What became of the records of a source; a record may hold several replies, and each counts."""

    read: int
    """Replies seen."""
    kept: int
    """Traces handed on, those with a problem among them."""
    skipped: int
    """Replies left out."""
    kept_bad: int
    """Traces kept in spite of a problem."""
    reasons: Mapping[str, int]
    """How many replies had each problem, skipped or kept."""


def read_traces(config: TraceConfig) -> tuple[list[Trace], ReadCounts]:
    """All traces of a source, in its order, and what became of its records.

    Raises: TraceFormatError, naming file, line and reason, for a bad record when `on_bad` is error, for a
        source that cannot be read, and when nothing is left; ConfigError for a task that does not exist.
    """
    traces: list[Trace] = []
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    first_problem = ""
    for where, parsed in _parse_all(config):
        counts["read"] += 1
        if parsed.problem is not None:
            first_problem = first_problem or f"{where}: {parsed.problem}"
            if config.on_bad == "error":
                raise TraceFormatError(f"{first_problem}. Mend it, or set on_bad to skip or keep.")
            reasons[parsed.problem.partition(":")[0]] += 1
        if parsed.trace is None or (parsed.problem is not None and config.on_bad == "skip"):
            counts["skipped"] += 1
            continue
        counts["kept_bad"] += parsed.problem is not None
        traces.append(parsed.trace if parsed.trace.source else replace(parsed.trace, source=where))
        if len(traces) == config.num_traces:
            break
    if not traces:
        raise TraceFormatError(
            f"{config.source}: no trace is left of {counts['read']}; the first problem is {first_problem}."
        )
    return traces, ReadCounts(
        read=counts["read"],
        kept=len(traces),
        skipped=counts["skipped"],
        kept_bad=counts["kept_bad"],
        reasons=dict(reasons),
    )


def _parse_all(config: TraceConfig) -> Iterator[tuple[str, Parsed]]:
    """Every reply of the source; the first record of a file that fits a format settles it for that file."""
    if config.source == BUILTIN_CHAIN:
        _refuse_splits(config, "a task that makes its traces")
        made = generate(
            config.num_traces or 0,
            config.seed,
            config.chain_min_steps,
            config.chain_max_steps,
            operators=config.chain_operators,
            random_labels=config.chain_random_labels,
        )
        yield from ((trace.source, Parsed(trace)) for trace in made)
        return
    markers = Markers(*config.markers) if config.markers else None
    settled: dict[str, str] = {}
    for located in _locate(config):
        try:
            if located.problem is not None:
                raise TraceFormatError(located.problem)
            record = _rename(located.record, config.fields)
            name = config.format if config.format != "auto" else settled.get(located.file) or detect(record)
            settled[located.file] = name
        except TraceFormatError as error:
            yield located.where, Parsed(None, str(error))
            continue
        for parsed in parse_record(record, name, markers):
            yield located.where, parsed


def _locate(config: TraceConfig) -> Iterator[Located]:
    if config.source.startswith(GYM_PREFIX):
        _refuse_splits(config, "a task that makes its traces")
        return read_gym(config.source.removeprefix(GYM_PREFIX), config.num_traces or 0, config.seed)
    path = Path(config.source)
    if path.is_file():
        _refuse_splits(config, "a single file")
        return read_file(path)
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved(path, config.split)
        return (located for file in trace_files(path, config.split) for located in read_file(file))
    if is_hub_id(config.source):
        return read_hub(config.source, config.subset, config.split)
    raise TraceFormatError(
        f"{config.source}: no such file or directory; expected a path, a hub id (owner/name), "
        f"{GYM_PREFIX}TASK or {BUILTIN_CHAIN}."
    )


def _refuse_splits(config: TraceConfig, kind: str) -> None:
    for name in ("split", "subset"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: {getattr(config, name)!r}, but {config.source} is {kind}; leave {name} out.")


def _rename(record: Any, fields: Mapping[str, str]) -> Any:
    """The record with its fields under our names; a renamed field replaces one that had the name."""
    if not fields or not isinstance(record, Mapping):
        return record
    for name in fields:
        if name not in record:
            keys = ", ".join(str(key) for key in record)[:200] or "none"
            raise TraceFormatError(f"missing field: {name!r} of fields; the record's keys are {keys}")
    rest = {key: value for key, value in record.items() if key not in fields}
    return {**rest, **{ours: record[theirs] for theirs, ours in fields.items()}}


def _are_markers(start: str, end: str) -> bool:
    return bool(start.strip()) and bool(end.strip()) and start != end
