"""Guard against over-fitting: the weights of the lowest held-out loss are kept, and a run that gets no better ends.

The weights that training starts from take part, as step 0: a run never ends worse than it began. Weights go to a file
named by their step, in the working directory. Which step is best follows from the start and metrics.jsonl, so a resumed
run reads it off there; the files that states rely on stay as long as they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.checkpoint import STATE_PREFIX
from limbeck.models.sharded import copy_whole_, whole_tensor

BEST_PREFIX = "best-"


class Guard:
    """The best validation so far, and how many since were no better."""

    def __init__(self, directory: Path, column: str, patience: int | None, writes: bool = True) -> None:
        """Watch `column` of the metrics; with `patience`, give up after so many validations without a lower value.

        On several processes all watch the same metrics, and one of them `writes`.
        """
        self.best: Mapping[str, Any] | None = None
        """Metrics of the best step; None before the first validation with a finite loss."""
        self._misses = 0
        self._directory, self._column, self._patience, self._writes = directory, column, patience, writes
        self._bests: list[Mapping[str, Any]] = []
        """Metrics of every step that was the best so far."""
        self._saved_step = 0
        """Of the newest state, which may still be under way."""

    def begin(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Take in the weights that training starts from, as `watch` does; what an interrupted run left stays."""
        if self._is_better(row):
            self._write(row, model)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the metrics of the steps before the state that a run goes on from."""
        for row in rows:
            self._is_better(row)

    def watch(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Take in the metrics of a step; if best, keep the weights of `model`."""
        if self._is_better(row):
            self._write(row, model)
            self._tidy()

    def saved(self, step: int) -> None:
        """Note that a state of `step` is saved or under way: a run resumed from it starts with the best until then."""
        self._saved_step = step
        self._tidy()

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self._misses >= self._patience

    @torch.no_grad()
    def load_best(self, model: nn.Module) -> None:
        """Put the best weights back into `model`; the last ones stay where no validation had a finite loss."""
        if self.best is not None:
            weights = load_file(self._file(self.best))
            for name, parameter in model.named_parameters():
                if name in weights:
                    copy_whole_(parameter, weights[name])

    def _is_better(self, row: Mapping[str, Any]) -> bool:
        value = row.get(self._column)
        if value is None:
            return False
        if value < (math.inf if self.best is None else self.best[self._column]):
            self.best, self._misses = row, 0
            self._bests.append(row)
            return True
        self._misses += 1
        return False

    def _write(self, row: Mapping[str, Any], model: nn.Module) -> None:
        weights = {name: whole_tensor(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
        if not self._writes:
            return
        weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
        partial = self._directory / f"{BEST_PREFIX}partial"
        save_file(weights, partial)
        partial.replace(self._file(row))

    def _best_until(self, step: int) -> list[Mapping[str, Any]]:
        """What a run resumed from the state of `step` takes for the best; none before the first validation."""
        return [row for row in self._bests if row["step"] <= step][-1:]

    def _file(self, row: Mapping[str, Any]) -> Path:
        return self._directory / f"{BEST_PREFIX}{row['step']:08d}.safetensors"

    def _tidy(self) -> None:
        if not self._writes:
            return
        states = [int(path.name.removeprefix(STATE_PREFIX)) for path in self._directory.glob(STATE_PREFIX + "*")]
        needed = {self._file(row) for step in (self._saved_step, *states) for row in self._best_until(step)}
        needed |= {self._file(row) for row in self._bests[-1:]}
        for file in self._directory.glob(BEST_PREFIX + "*.safetensors"):
            if file not in needed:
                file.unlink()
