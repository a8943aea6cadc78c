"""Where traces come from: files, directories, the hub, and tasks that make their own.

`read_traces` names the format of each record, parses it, and deals with bad ones as `on_bad` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from limbeck.config import checked, is_address
from limbeck.errors import ConfigError, TraceFormatError, nearest
from limbeck.stores import local_path
from limbeck.traces.containers import decode
from limbeck.traces.counts import ReadCounts, Tally
from limbeck.traces.directory import trace_files
from limbeck.traces.files import COMPRESSIONS, SUFFIXES, Located, kind_of, read_file
from limbeck.traces.gym import read_gym
from limbeck.traces.hub import is_hub_id, is_saved_dataset, read_hub, read_saved
from limbeck.traces.parse import FORMATS, detect, parse_record, with_known_names
from limbeck.traces.prompts import prompt_alone
from limbeck.traces.recheck import SOURCE as BUILTIN_RECHECK
from limbeck.traces.recheck import RecheckConfig, generate_rechecked
from limbeck.traces.record import Parsed
from limbeck.traces.synthetic import OPERATORS, generate
from limbeck.traces.thought import Markers
from limbeck.traces.trace import Trace
from limbeck.traces.turns import Turns, choose_turns
from limbeck.traces.unwrap import Inner, inner_records

GYM_PREFIX = "reasoning-gym:"
BUILTIN_CHAIN = "builtin:chain"
BUILT_IN = (BUILTIN_CHAIN, BUILTIN_RECHECK)
NOTE = ""
"""The place of what is said about files and not about a record."""


@checked
class TraceConfig:
    """Where traces are read from, and how."""

    source: str
    """A file (.jsonl, .ndjson or .json, plain or compressed, or .parquet); a directory of such files, or one that
    datasets.save_to_disk wrote; reasoning-gym:TASK, builtin:chain or builtin:recheck, which make traces;
    else a hub id (owner/name); or the address of a file or directory on a store that fsspec knows (s3://, gs://,
    hf://), which is copied here first. Only the last two use the network."""
    format: str = "auto"
    """Format of the records: limbeck, messages, sharegpt, prompt_completion, text, columns, gsm8k, reasoning_gym, or
    prompts without a reply; auto finds it for each record."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields to rename before parsing, their name to ours, such as llm_response to completion."""
    markers: tuple[str, str] | None = None
    """The strings before and after the thought; null finds think tags and Sky-T1 tags."""
    subset: str | None = None
    """Configuration of a hub data set, or folder of a directory, where it has several."""
    split: str | None = None
    """Split to read; null takes train, or the only one, and no file for tests beside others."""
    turns: Turns = "auto"
    """Which turns of the assistant are trained: the last, all that are not marked otherwise, or auto: all of a chat
    that uses tools, the last of any other."""
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
    recheck: RecheckConfig = field(default_factory=RecheckConfig)
    """Problems and traces of builtin:recheck."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConfigError("source: empty; expected a path, a hub id, reasoning-gym:TASK or a built-in task")
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"format: unknown format {self.format!r}; {nearest(self.format, ('auto', *FORMATS))}")
        if self.markers is not None and not _are_markers(*self.markers):
            raise ConfigError(f"markers: {list(self.markers)}; expected two different strings, neither of them blank")
        if self.source.startswith("builtin:") and self.source not in BUILT_IN:
            raise ConfigError(f"source: no such task {self.source!r}; {nearest(self.source, BUILT_IN)}")
        self._check_number()

    def _check_number(self) -> None:
        if self.num_traces is not None and self.num_traces < 1:
            raise ConfigError(f"num_traces: {self.num_traces}; expected 1 or more")
        if self.makes_traces and self.num_traces is None:
            raise ConfigError(f"num_traces: not set; {self.source} needs the number of traces to make")

    @property
    def makes_traces(self) -> bool:
        """Whether the source is a task that makes its traces."""
        return self.source in BUILT_IN or self.source.startswith(GYM_PREFIX)


def read_traces(config: TraceConfig) -> tuple[list[Trace], ReadCounts]:
    """All traces of a source, in its order, and what became of its records.

    Raises: TraceFormatError, naming file, line and reason, for a bad record when `on_bad` is error, for a
        source that cannot be read, and when nothing is left; ConfigError for a task that does not exist.
    """
    return _collect(config, _parse_all(config, partial(_parse, config)))


def read_problems(config: TraceConfig) -> tuple[list[Trace], ReadCounts]:
    """The prompts of a source with their references; a reply is not needed, and one that is there is no matter.

    Raises: as `read_traces`, of records that hold no prompt.
    """
    return _collect(config, _parse_all(config, partial(_parse_problem, config)))


def _from(trace: Trace, where: str) -> Trace:
    return trace if trace.source else replace(trace, source=where)


def _collect(config: TraceConfig, found: Iterable[tuple[str, Parsed]]) -> tuple[list[Trace], ReadCounts]:
    tally = Tally()
    traces: list[Trace] = []
    for where, parsed in found:
        if where == NOTE:
            tally.about_files.append(parsed.problem or "")
            continue
        is_used = tally.count(where, parsed, keep_bad=config.on_bad == "keep")
        if parsed.problem is not None and config.on_bad == "error":
            raise TraceFormatError(f"{tally.first_problem}. Mend it, or set on_bad to skip or keep.")
        if is_used and parsed.trace is not None:
            traces.append(_from(parsed.trace, where))
        if len(traces) == config.num_traces:
            break
    if not traces:
        raise TraceFormatError(
            f"{config.source}: no trace is left of {tally.read}; the first problem is {tally.first_problem}."
        )
    return traces, tally.counts(len(traces))


def _parse_all(config: TraceConfig, parse: Callable[[Any], list[Parsed]]) -> Iterator[tuple[str, Parsed]]:
    """Every reply of the source; each record is asked for its format."""
    if config.source in BUILT_IN:
        _refuse_splits(config, "a task that makes its traces")
        yield from ((trace.source, Parsed(trace)) for trace in _make_traces(config))
        return
    for located in _locate(config):
        if located.where == NOTE or located.problem is not None:
            yield located.where, Parsed(None, located.problem)
            continue
        yield from _unwrapped(located, parse)


def _make_traces(config: TraceConfig) -> list[Trace]:
    num_traces = config.num_traces or 0
    if config.source == BUILTIN_RECHECK:
        return generate_rechecked(num_traces, config.seed, config.recheck)
    return generate(
        num_traces,
        config.seed,
        config.chain_min_steps,
        config.chain_max_steps,
        operators=config.chain_operators,
        random_labels=config.chain_random_labels,
    )


def _of_inner(where: str, inner: Inner, parse: Callable[[Any], list[Parsed]]) -> Iterator[tuple[str, Parsed]]:
    """The replies of the records inside one, after a note on what else is in it."""
    names, records, left_out = inner
    if left_out:
        yield NOTE, Parsed(None, f"{where}: not read, set a source of its own: {', '.join(left_out)}")
    for name, record in zip(names, records, strict=True):
        yield from ((f"{where}, {name}", parsed) for parsed in parse(record))


def _unwrapped(located: Located, parse: Callable[[Any], list[Parsed]]) -> Iterator[tuple[str, Parsed]]:
    """The replies of a record, or of the records inside it where it is none itself."""
    found = parse(located.record)
    if all(parsed.trace is None and parsed.problem is not None for parsed in found):
        for inner in inner_records(located.record):
            if any(parsed.trace is not None for record in inner[1][:20] for parsed in parse(record)):
                yield from _of_inner(located.where, inner, parse)
                return
    yield from ((located.where, parsed) for parsed in found)


def _parse(config: TraceConfig, record: Any) -> list[Parsed]:
    try:
        record = _rename(_read_text(record), config.fields)
        name = config.format if config.format != "auto" else detect(record)
    except TraceFormatError as error:
        return [Parsed(None, str(error))]
    markers = Markers(*config.markers) if config.markers else None
    return [choose_turns(parsed, config.turns, markers) for parsed in parse_record(record, name, markers)]


def _parse_problem(config: TraceConfig, record: Any) -> list[Parsed]:
    """The prompt of a record, once: what is wrong with its reply is no problem."""
    found = _parse(config, record)
    good = next((parsed for parsed in found if parsed.trace is not None), None)
    if good is None:
        try:
            renamed = _rename(_read_text(record), config.fields)
            if not isinstance(renamed, Mapping):
                return found[:1]
            (good,) = prompt_alone(renamed)
        except TraceFormatError:
            return found[:1]
    if good.trace is not None and good.trace.uses_tools:
        return [Parsed(None, "tools: prompts with tools or their answers are trained on, not answered here")]
    return [good._replace(problem=None, notes=())]


def _locate(config: TraceConfig) -> Iterator[Located]:
    if config.source.startswith(GYM_PREFIX):
        _refuse_splits(config, "a task that makes its traces")
        return read_gym(config.source.removeprefix(GYM_PREFIX), config.num_traces or 0, config.seed)
    path = path_of(config.source)
    if is_address(config.source):
        return (_from_store(located, path, config.source) for located in _locate_path(path, config))
    return _locate_path(path, config)


def path_of(source: str) -> Path:
    """Where a source lies that is no task: its path, or the copy of what is on a store."""
    return local_path(source, (*SUFFIXES, *COMPRESSIONS, ".arrow"))


def _from_store(located: Located, copy: Path, address: str) -> Located:
    return located._replace(where=located.where.replace(str(copy), address))


def _locate_path(path: Path, config: TraceConfig) -> Iterator[Located]:
    if path.is_file():
        _refuse_splits(config, "a single file")
        return read_file(path)
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved(path, config.split, config.subset)
        return _read_directory(path, config)
    if is_hub_id(config.source):
        return read_hub(config.source, config.subset, config.split)
    raise TraceFormatError(
        f"{config.source}: no such file or directory; expected a path, a hub id (owner/name), "
        f"{GYM_PREFIX}TASK or {' or '.join(BUILT_IN)}."
    )


def _read_directory(path: Path, config: TraceConfig) -> Iterator[Located]:
    """The records of its files; a .json file in which there is none is a file of another purpose, and told."""
    found = trace_files(path, config.split, config.subset)
    yield from (Located(NOTE, None, note) for note in found.notes)
    for file in found.files:
        located = read_file(file)
        if (kind_of(file) or ("", ""))[0] == ".json":
            entries = list(located)
            parse = partial(_parse, config)
            if not any(p.trace for entry in entries[:20] for _, p in _unwrapped(entry, parse)):
                yield Located(NOTE, None, f"{file}: not read: it holds no record of a known format")
                continue
            located = iter(entries)
        yield from located


def _refuse_splits(config: TraceConfig, kind: str) -> None:
    for name in ("split", "subset"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: {getattr(config, name)!r}, but {config.source} is {kind}; leave {name} out.")


def _read_text(record: Any) -> Any:
    """The object that a record holds as JSON text; other records as they are."""
    if not isinstance(record, str) or not record.lstrip().startswith("{"):
        return record
    try:
        return decode(record)
    except ValueError:
        return record


def _rename(record: Any, fields: Mapping[str, str]) -> Any:
    """The record with its fields under our names; a renamed field replaces one that had the name."""
    if not isinstance(record, Mapping):
        return record
    if not fields:
        return with_known_names(record)
    for name in fields:
        if name not in record:
            keys = ", ".join(str(key) for key in record)[:200] or "none"
            raise TraceFormatError(f"missing field: {name!r} of fields; the record's keys are {keys}")
    rest = {key: value for key, value in record.items() if key not in fields}
    return with_known_names({**rest, **{ours: record[theirs] for theirs, ours in fields.items()}})


def _are_markers(start: str, end: str) -> bool:
    return bool(start.strip()) and bool(end.strip()) and start != end
