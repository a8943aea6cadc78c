"""What a run that is under way keeps beside its model: metrics.jsonl, states to resume from, the best weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from limbeck.config import config_hash, to_dict
from limbeck.distill.data import fingerprint
from limbeck.distill.guard import Guard
from limbeck.distill.output import keep_lines
from limbeck.distill.parallel import ParallelConfig, total_cost, wait
from limbeck.distill.saving import Saving
from limbeck.distill.setup import Run
from limbeck.distill.state import load_state, take_state
from limbeck.distill.trackers import Tracker, open_tracker
from limbeck.distill.validation import validate
from limbeck.errors import LimbeckError
from limbeck.ledger import Ledger
from limbeck.models.sharded import is_sharded


class Records:
    """Validates, logs, saves and guards a run, step by step; on every rank, of which the first one writes.

    Leaving its block waits for the state under way.
    """

    def __init__(self, run: Run, directory: Path) -> None:
        """Records of `run` in `directory`; the weights that it starts from are the first that the guard knows."""
        self._run, self._directory, training = run, directory, run.config.training
        self._metrics = directory / "metrics.jsonl"
        self._identity = _identity(run)
        self._saving = Saving(directory, training.keep_states)
        self._with_kd = training.keep_best == "kd"
        self._guard: Guard | None = None
        self._trackers: list[Tracker] = []
        if run.ranks.is_first:
            name, tree = directory.stem, to_dict(run.config)
            self._trackers = [open_tracker(kind, name, directory, tree) for kind in training.track]
        self._start: dict[str, Any] = {}
        if training.keep_best is not None or run.data.sources:
            self._start = {"step": 0, **validate(run, with_kd=self._with_kd)}
        if training.keep_best is not None:
            column = f"validation_{training.keep_best}"
            self._guard = Guard(directory, column, training.patience, run.ranks.is_first)
            self._guard.begin(self._start, run.student.model)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._saving.finish()

    def begin(self, resume: bool) -> int:
        """Go on from the last state where asked; returns the number of steps that are done."""
        run = self._run
        # The saved cost is that of all ranks, so only one of them goes on from it.
        ledger = run.ledger if run.ranks.is_first else Ledger(run.ranks.device)
        model, optimizer = run.student.model, run.optimizer
        resumed = load_state(self._directory, model, optimizer, ledger, self._identity) if resume else None
        first = resumed.step if resumed else 0
        if resumed and resumed.rollouts is not None and run.rollouts is not None:
            run.rollouts.restore(resumed.rollouts)
        if resumed and resumed.share is not None and run.stop_control is not None:
            run.stop_control.share = resumed.share
        if run.ranks.is_first:
            keep_lines(self._metrics, first)
        if self._guard is not None and first:
            self._guard.replay(map(json.loads, self._metrics.read_text(encoding="utf-8").splitlines()[:first]))
        return first

    def needs_weights(self, step: int) -> bool:
        """Whether the weights behind a step are validated or saved."""
        training = self._run.config.training
        every = training.validate_every_steps, training.save_every_steps
        return step == len(self._run.steps) or any(_is_due(step, number) for number in every)

    def add(self, row: dict[str, Any]) -> bool:
        """Take in the metrics of a step, and validate and save where it is time; returns whether it was the last."""
        run, training, step = self._run, self._run.config.training, row["step"]
        is_last = step == len(run.steps)
        if is_last or _is_due(step, training.validate_every_steps):
            row |= validate(run, with_kd=self._with_kd)
        if self._guard is not None:
            self._guard.watch(row, run.student.model)
            is_last = is_last or self._guard.is_over
        if run.ranks.is_first:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._track(row)
        if not is_last and _is_due(step, training.save_every_steps):
            self._save(step, goes_on=True)
        return is_last

    def _track(self, row: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        speed = row["tokens"] / max(1e-9, self._run.ledger.seconds_so_far)
        for tracker in self._trackers:
            tracker.log(row["step"], {**numbers, "tokens_per_second": speed})

    def leave(self, step: int) -> NoReturn:
        """Save what is there, for whoever goes on.

        Raises: LimbeckError, which says how.
        """
        if not _is_due(step, self._run.config.training.save_every_steps):
            self._save(step, goes_on=False)
        if problem := self._saving.finish():
            raise LimbeckError(f"asked to end (SIGTERM): {problem}; --resume goes on from the state before, if any.")
        raise LimbeckError(f"asked to end (SIGTERM): saved behind step {step}; --resume goes on.")

    def end(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give the model the weights that are kept: those of the last step, `row`, or the best; returns its metrics.

        Of several sources `start_ce_of` has the held-out CE of each before the first step.
        """
        for tracker in self._trackers:
            tracker.close()
        kept = row
        if self._guard is not None:
            wait(self._run.ranks)
            self._guard.load_best(self._run.student.model)
            kept = self._guard.best or row
        return {**kept, "start_ce_of": self._start["validation_ce_of"]} if self._run.data.sources else kept

    def _save(self, step: int, goes_on: bool) -> None:
        """Save behind a step; whether training `goes_on` meanwhile."""
        run, cost = self._run, total_cost(self._run.ledger, self._run.ranks)
        if run.ranks.is_first or is_sharded(run.student.model):
            with run.ledger.phase("saving"):
                rollouts = None if run.rollouts is None else run.rollouts.state()
                share = None if run.stop_control is None else run.stop_control.share
                model, optimizer = run.student.model, run.optimizer
                self._saving.finish()  # so that there is one copy at a time
                self._saving.begin(
                    take_state(step, model, optimizer, cost, self._identity, rollouts, share, copies=goes_on)
                )
        if self._guard is not None:
            self._guard.saved(step)


def _identity(run: Run) -> str:
    """Of all that decides the result; how processes share the work does not, so a run may go on on others."""
    config: Any = run.config
    alone = to_dict(replace(config, training=replace(config.training, parallel=ParallelConfig(), track=())))
    del alone["training"]["keep_states"]
    return config_hash({"config": alone, "traces": fingerprint(run.data.train), **run.identity})


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
