"""What a stage will cost: tokens, FLOPs by part, memory by term, seconds, and what had to be assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.ledger import FLOP_PARTS


@dataclass(frozen=True, slots=True)
class Prediction:
    """The cost of one stage before it runs, in the terms of the ledger."""

    stage: str
    """The command that would run."""
    tokens: int = 0
    """Tokens that the stage reads or trains on, as the ledger counts them."""
    new_tokens: int = 0
    """Tokens that it generates."""
    steps: int = 0
    """Optimizer steps."""
    flops: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(FLOP_PARTS, 0))
    """By part: teacher, student, head, sampling."""
    solver_flops: int = 0
    """Products of calibration and solvers of a compression, which the ledger does not count."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes at the highest moment, by what holds them: weights, gradients, optimizer, activations, ..."""
    seconds: float = 0.0
    """On the hardware that was asked about."""
    notes: Sequence[str] = ()
    """What was assumed."""

    @property
    def total_flops(self) -> int:
        """FLOPs of all parts."""
        return sum(self.flops.values())

    @property
    def peak_bytes(self) -> int:
        """The highest memory: the terms' sum."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the ledger's names."""
        return {
            "stage": self.stage,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "flops": {**self.flops, "total": self.total_flops},
            "solver_flops": self.solver_flops,
            "peak_bytes": {**self.memory, "total": self.peak_bytes},
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


def total(stage: str, parts: Sequence[Prediction]) -> Prediction:
    """Stages one after the other as one: costs add up, the highest memory stays; every note once."""
    highest = max(parts, key=lambda part: part.peak_bytes)
    return Prediction(
        stage=stage,
        tokens=sum(part.tokens for part in parts),
        new_tokens=sum(part.new_tokens for part in parts),
        steps=sum(part.steps for part in parts),
        flops={name: sum(part.flops[name] for part in parts) for name in FLOP_PARTS},
        solver_flops=sum(part.solver_flops for part in parts),
        memory=highest.memory,
        seconds=sum(part.seconds for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def flops_of(**parts: int) -> dict[str, int]:
    """FLOPs by part, those that are not named 0."""
    return {**dict.fromkeys(FLOP_PARTS, 0), **parts}
