"""Guard against over-fitting: the weights of the lowest held-out loss are kept, and a run that gets no better ends.

Weights go to a file named by their step, in the working directory. Which step is best follows from metrics.jsonl alone,
so a resumed run reads it off there; the file that its state relies on stays until the next state is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

BEST_PREFIX = "best-"


class Guard:
    """The best validation so far, and how many since were no better."""

    def __init__(self, directory: Path, column: str, patience: int | None) -> None:
        """Watch `column` of the metrics; with `patience`, give up after so many validations without a lower value."""
        self.step, self.value, self._misses = 0, math.inf, 0
        self._directory, self._column, self._patience = directory, column, patience
        self._saved_step = 0

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the metrics of the steps before the state that a run goes on from."""
        for row in rows:
            self._is_better(row)
        self._saved_step = self.step

    def watch(self, row: Mapping[str, Any], model: nn.Module | None) -> None:
        """Take in the metrics of a step; if best, keep the weights of `model`, given on the rank that writes."""
        if self._is_better(row) and model is not None:
            weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            partial = self._directory / f"{BEST_PREFIX}partial"
            save_file(weights, partial)
            partial.replace(self._file(self.step))
            self._tidy()

    def saved(self) -> None:
        """Note that a state was saved: from now on a resumed run starts with today's best."""
        self._saved_step = self.step
        self._tidy()

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self._misses >= self._patience

    @torch.no_grad()
    def load_best(self, model: nn.Module) -> None:
        """Put the best weights back into `model`; the last ones stay where no validation had a finite loss."""
        if self.step:
            weights = load_file(self._file(self.step))
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])

    def _is_better(self, row: Mapping[str, Any]) -> bool:
        value = row.get(self._column)
        if value is None:
            return False
        if value < self.value:
            self.step, self.value, self._misses = row["step"], value, 0
            return True
        self._misses += 1
        return False

    def _file(self, step: int) -> Path:
        return self._directory / f"{BEST_PREFIX}{step:08d}.safetensors"

    def _tidy(self) -> None:
        needed = {self._file(self.step), self._file(self._saved_step)}
        for file in self._directory.glob(BEST_PREFIX + "*.safetensors"):
            if file not in needed:
                file.unlink()
