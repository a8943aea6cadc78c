"""Bring a list of stages up to date: say of each whether and why it runs, run it in a process of its own, remember it.

A stage's process has all the memory that it is charged for, and a crash ends one stage. Killed anywhere, the next call
takes finished stages from their records, a stage that ended without one from its manifest, and goes on with the rest.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import RECORDS, Checkpoint, write_json
from limbeck.config import config_hash
from limbeck.errors import ConfigError
from limbeck.models.load import BUILT_IN, GGUF_ALIASES, locate
from limbeck.pipeline.carry import carry_out, remove_working, say
from limbeck.pipeline.hashes import FileHashes
from limbeck.pipeline.record import (
    RAN,
    RECORD_OF,
    STATE,
    begin,
    end,
    has_ended,
    key_of,
    make_record,
    read_record,
    why,
    write_record,
)
from limbeck.pipeline.task import OUT, Task, named, resolved
from limbeck.runner.process import in_process

HASHES, LOCK = "hashes.json", "lock"
UNKNOWN = "not there yet"
"""Stands for the hash of what an earlier stage has still to write."""
Predict = Callable[[Task], Mapping[str, Any] | None]
"""seconds, flops, tokens and peak_bytes that a stage is expected to take; None where that is not known."""


class Planned(NamedTuple):
    """A stage and what is to be done with it."""

    stage: Task
    reason: str | None
    """Why it runs; None when it does not."""
    is_certain: bool
    """False where it runs only if an earlier stage, which runs, gives something else than before."""


class Pipeline:
    """A list of stages and where each of them stands."""

    def __init__(self, stages: Sequence[Task], out: Path) -> None:
        """Read what an earlier call has left in `out`; nothing is written."""
        self.stages, self.out = stages, out
        self.hashes = FileHashes(out / STATE / HASHES)
        self.records = {stage.name: record for stage in stages if (record := read_record(out, stage.name))}
        self._sources = {stage.name: self._stages_before(stage) for stage in stages}

    def plan(self) -> list[Planned]:
        """What would run, from what is on disk."""
        planned: list[Planned] = []
        running: list[str] = []
        for stage in self.stages:
            reason, is_certain = self._reason(stage), True
            waits = [name for name in running if name in self._sources[stage.name]]
            if reason is None and waits:
                is_certain = bool(stage.follows)
                reason = f"after {', '.join(waits)}" + ("" if is_certain else ", if that gives other files")
            if reason is not None:
                running.append(stage.name)
            planned.append(Planned(stage, reason, is_certain))
        return planned

    def advance(self, predict: Predict) -> list[str]:
        """Run what has to run, in order; returns the names of those stages.

        Args:
          predict: asked about every stage that may run before the first one does, for the time left, and about each
            again right before it runs, when what it reads is there; that answer is kept beside what it took.
        Raises: what a stage raises, and stages that ended before it are not run again; ConfigError where another call
          is at work in the same directory.
        """
        with _alone(self.out):
            return self._advance(predict)

    def _advance(self, predict: Predict) -> list[str]:
        expected = {planned.stage.name: self._seconds(planned, predict) for planned in self.plan()}
        ran: list[str] = []
        for number, stage in enumerate(self.stages, start=1):
            reason = self._reason(stage)
            head = f"[{number}/{len(self.stages)}] {stage.name}"
            if reason is None:
                say(f"{head}: unchanged")
            else:
                left = sum(expected.values())
                say(f"{head}: {reason}" + (f" (about {left:,.0f} s to go)" if left >= 1 else ""))
                write_json(self.out / STATE / RAN, ran)
                self._run(stage, predict(stage))
                ran.append(stage.name)
            del expected[stage.name]
        self.hashes.save()
        return ran

    def inputs(self, stage: Task) -> dict[str, str]:
        """Hash of everything that a stage reads, by the name that its config has for it."""
        found = {name: value for name in named(stage.config) if (value := self._input(stage, name)) is not None}
        for name in stage.follows:
            record = self.records.get(name)
            found[RECORD_OF + name] = record.identity if record else UNKNOWN
        return found

    def _reason(self, stage: Task) -> str | None:
        return why(stage, self.records.get(stage.name), self.inputs(stage), self.out, self.hashes)

    def _input(self, stage: Task, name: str) -> str | None:
        if name.startswith(OUT):
            record = self.records.get(self._writer(stage, name).name)
            return record.gives if record else UNKNOWN
        files = _files_of(name)
        return config_hash({"files": [(file.name, self.hashes.of(file)) for file in files]}) if files else None

    def _writer(self, stage: Task, name: str) -> Task:
        """The stage before `stage` that writes what is called `name`."""
        place = name.removeprefix(OUT) + "/"
        before = [other for other in self.stages[: self.stages.index(stage)] if other.place]
        found = [other for other in before if place.startswith(other.place + "/")]
        if found:
            return max(found, key=lambda other: len(other.place))
        known = ", ".join(OUT + other.place for other in self.stages if other.place)
        raise ConfigError(f"{stage.name}: {name} is written by no stage before it; this recipe has {known}.")

    def _stages_before(self, stage: Task) -> set[str]:
        """Names of the stages that one depends on."""
        return {self._writer(stage, name).name for name in named(stage.config) if name.startswith(OUT)} | {
            *stage.follows
        }

    def _run(self, stage: Task, predicted: Mapping[str, Any] | None) -> None:
        inputs, directory = self.inputs(stage), stage.directory(self.out)
        is_begun = begin(self.out, stage, key_of(stage, inputs))
        if not is_begun:
            self._clear(stage, directory)
        measured: dict[str, Any] = {}
        if not (is_begun and has_ended(self.out, stage)):
            config = resolved(stage.config, self.out)
            arguments = (stage.call, config, directory, is_begun)
            measured = in_process(carry_out, *arguments) if stage.is_isolated else carry_out(*arguments)
        if has_ended(self.out, stage):
            measured = with_ledger(directory, measured)
        record = make_record(stage, inputs, self.out, self.hashes, measured, predicted)
        write_record(self.out, record)
        self.records[stage.name] = record
        end(self.out, stage)
        self.hashes.save()

    def _clear(self, stage: Task, directory: Path) -> None:
        """Put away what an attempt of another key left; a finished output stays until the new one is complete."""
        if stage.is_filled_in_place or not stage.place:
            return
        remove_working(directory)
        if stage.name in self.records and directory.exists() and not Checkpoint(directory).is_finished:
            shutil.rmtree(directory)  # ours by the record, but its manifest is gone

    def _seconds(self, planned: Planned, predict: Predict) -> float:
        """What a stage took last time, or else what it is expected to take; 0 where it does not run for certain."""
        if planned.reason is None or not planned.is_certain:
            return 0.0
        record = self.records.get(planned.stage.name)
        known = predict(planned.stage) or {} if record is None else record.measured
        return float(known.get("seconds") or 0.0)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other call advances the same directory during the block."""
    (out / STATE).mkdir(parents=True, exist_ok=True)
    with (out / STATE / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{out}: another pipeline is at work there; wait, or choose another --out.") from error
        yield


def with_ledger(directory: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage took, with what its ledger counted: tokens, FLOPs, and the highest memory within its phases."""
    ledger = Checkpoint(directory).manifest.get("ledger") or {}
    peak = max(ledger.get("peak_bytes", {}).get("total", 0), measured.get("peak_bytes", 0))
    flops, seconds = ledger.get("flops", {}).get("total"), sum(ledger.get("seconds", {}).values())
    counted = {"seconds": seconds, "tokens": ledger.get("tokens"), "flops": flops}
    return {name: value for name, value in counted.items() if value} | {**measured, "peak_bytes": peak}


def _files_of(name: str) -> list[Path]:
    """What is read under a name that no stage writes: a file, the files of a model, or all below a directory of traces.

    Nothing for a hub id and for a task that makes its traces, which stand for themselves.
    """
    if name in BUILT_IN or name in GGUF_ALIASES:
        place = locate(name)
        path = Path(place.path) / (place.gguf_file or "")
    else:
        path = Path(name).expanduser()
    if path.is_file():
        return [path]
    is_model = (path / "config.json").is_file()
    found = path.glob("*") if is_model else path.rglob("*")
    return sorted(file for file in found if file.is_file() and not (is_model and file.name in RECORDS))
