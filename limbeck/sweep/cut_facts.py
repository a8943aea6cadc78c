"""What a cut keeps of what was seen: learning, derivations, ends, cost. Pure functions of samples, look and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.sweep.look import Look
from limbeck.traces.sample import Sample
from limbeck.traces.truncate import TruncationConfig, truncate


class CutFacts(NamedTuple):
    """Shares of the whole traces, 0 to 1."""

    tokens: float
    """Of all tokens that stay in context."""
    divergence: float
    """Of the divergence over all responses: how much of what can be learnt is still there."""
    derivations: float | None
    """Of the known first derivations, how many end within the cut; None where none is known."""
    ends: float
    """Of the traces, how many keep their end."""
    censored: float
    """Of the traces, how many lose their end although others are still seen at its place: there the text that is left
    says "go on" where the teacher would have stopped."""


def facts_of(
    samples: Sequence[Sample], look: Look, derivations: Sequence[int | None], cut: TruncationConfig
) -> CutFacts:
    """What `cut` keeps.

    Args:
      samples: n whole traces, those that were looked at.
      look: what was seen in them.
      derivations: one past the last token of each trace's first derivation, None where it is not known.
      cut: fitted to the traces where it looks at them together.
    """
    lengths = np.array([len(sample) for sample in samples])
    kept = [truncate(sample, cut).kept for sample in samples]
    seen = np.array([int((k == np.arange(len(k))).sum()) for k in kept])
    has_end = np.array([bool(len(k)) and int(k[-1]) == n - 1 for k, n in zip(kept, lengths, strict=True)])
    starts = np.cumsum([0, *lengths[:-1]])
    is_kept = np.zeros(int(lengths.sum()), dtype=bool)
    for start, k in zip(starts, kept, strict=True):
        is_kept[start + k] = True
    places = starts[look.owner] + look.token
    total = float(look.divergence.sum())
    known = [is_kept[start + end - 1] for start, end in zip(starts, derivations, strict=True) if end is not None]
    return CutFacts(
        tokens=float(sum(map(len, kept)) / lengths.sum()),
        divergence=float(look.divergence[is_kept[places]].sum()) / total if total else 1.0,
        derivations=float(np.mean(known)) if known else None,
        ends=float(has_end.mean()),
        censored=float(np.mean(~has_end & (lengths <= seen.max()))),
    )


def spread_of(lengths: Sequence[int]) -> dict[str, float]:
    """How the lengths of traces in tokens differ; `ratio` is the 95th over the 5th percentile."""
    low, median, high = np.percentile(lengths, (5, 50, 95))
    return {"p5": float(low), "median": float(median), "p95": float(high), "ratio": float(high / low)}
