"""What a run read of each of its sources, and what it forgot: the held-out loss of each before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.distill.setup import Run


def source_rows(run: Run, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a source: what the steps that were made read of it, and its held-out CE in nats a token.

    Args:
      run: after its last step.
      kept: metrics of the weights that are written, with the CE of each source before (`Records.end`).
    Returns: `source`, `sequences`, `tokens` (None where the cut moves, since steps then cut anew), `ce_before`,
      `ce_after` (None where nothing of it is held out) and `forgotten`, how much the CE rose, at least 0.
    """
    origins = np.array([example.sample.origin for example in run.data.train])
    lengths = np.array([len(example) for example in run.data.train])
    made = run.steps[: run.ledger.counts["steps"]]
    read = np.array([index for step in made for index in step.indices], dtype=np.int64)
    rows = []
    for number, name in enumerate(run.data.sources):
        own = read[origins[read] == number]
        before, after = kept["start_ce_of"][name], kept["validation_ce_of"][name]
        rows.append(
            {
                "source": name,
                "sequences": len(own),
                "tokens": int(lengths[own].sum()) if run.data.moving is None else None,
                "ce_before": before,
                "ce_after": after,
                "forgotten": None if after is None else max(0.0, after - before),
            }
        )
    return rows


def source_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The same for the console, a line a source."""
    for row in rows:
        tokens = "" if row["tokens"] is None else f", {row['tokens']:,} tokens"
        loss = ""
        if row["ce_after"] is not None:
            loss = f"; held-out CE {row['ce_before']:.4f} before, {row['ce_after']:.4f} after"
            loss += f" ({row['forgotten']:.4f} nats a token forgotten)" if row["forgotten"] else ""
        yield f"{row['source']}: {row['sequences']} sequences{tokens}{loss}"
