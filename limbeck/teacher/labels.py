"""Targets over a few entries alone, such as the two labels of a scorer: their logits, whatever they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.teacher.dense import DenseTargets


@dataclass(frozen=True, slots=True)
class LabelTargets(DenseTargets):
    """Logits [N E] of the entries that a loss is over, as the hidden states of a head that changes nothing."""

    @classmethod
    def of(cls, logits: Tensor) -> LabelTargets:
        """Of E entries each."""
        return cls(logits, torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device))

    @classmethod
    def of_log_odds(cls, log_odds: Tensor) -> LabelTargets:
        """Of a yes and a no that differ by log-odds [N]."""
        return cls.of(torch.stack([log_odds / 2, -log_odds / 2], 1))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> LabelTargets:
        return LabelTargets(change(self.hidden), self.head_weight)

    def over(self, entries: Tensor) -> LabelTargets:
        return self

    def head_flops(self, vocab: int) -> int:
        return 0
