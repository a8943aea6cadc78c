"""What a cut shows of where traces end: the rate of ends at the places where a trace may end, kept by each cut.

Regime: `builtin:recheck`, whose traces may end behind every statement of the answer, by a draw that the prompt does not
tell; lengths from alike to spread by a factor of ten. Nothing is trained: the tokens that carry loss are counted with
their weights. Bound: the rate of whole traces at the places that the cut keeps. Peer: the share of each trace's own
length, as in arXiv 2512.21002.

    python benchmarks/cut_hazard.py [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _process import conditions, markdown, publish

from limbeck.models.load import load_tokenizer
from limbeck.traces.fit import fit
from limbeck.traces.recheck import RecheckConfig, generate_rechecked
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sample import Sample
from limbeck.traces.truncate import TruncationConfig, truncate

SPREADS = (0.0, 0.4, 0.8, 1.2)
CUTS: dict[str, dict[str, Any]] = {
    "share 0.5": {},
    "common length 0.5": {"policy": "common_length"},
    "common length 0.5, a tenth whole": {"policy": "common_length", "whole_fraction": 0.1},
    "random horizon 0.5": {"policy": "random_horizon"},
    "random horizon 0.5, weights up to 2": {"policy": "random_horizon", "max_weight": 2.0},
}


def rows_of(samples: Sequence[Sample], check_id: int, spread: float) -> Iterator[dict[str, Any]]:
    """What each cut keeps of some whole samples."""
    lengths = np.array([len(sample) for sample in samples])
    places = [_borders(sample, check_id) for sample in samples]
    for name, fields in CUTS.items():
        policy = fit(TruncationConfig(lead_fraction=0.5, **fields), samples)
        cuts = [truncate(sample, policy) for sample in samples]
        kept = np.array([len(cut.kept) for cut in cuts])
        shown = ends = reached = true = squares = 0.0
        # A cut sample keeps a beginning, so a place that is kept is at its own index.
        limit = kept.max()
        for cut, place, length in zip(cuts, places, kept, strict=True):
            weight = cut.loss_weight()[place[place < length]]
            is_end = (place == place[-1])[place < length]
            shown, ends = shown + weight.sum(), ends + weight[is_end].sum()
            squares += np.square(weight).sum()
            reached, true = reached + (place < limit).sum(), true + (place[-1] < limit)
        yield {
            "spread": spread,
            "cut": name,
            "longest_over_shortest": float(lengths.max() / lengths.min()),
            "tokens": float(kept.sum() / lengths.sum()),
            "longest": int(kept.max()),
            "ends_shown": float(ends / shown),
            "ends_true": float(true / reached),
            "effective_places": float(shown**2 / squares),
        }


def _borders(sample: Sample, check_id: int) -> np.ndarray:
    """Places whose token says whether the trace goes on: the first of a re-check, or of the end marker, last."""
    return np.append(np.flatnonzero(sample.input_ids[: sample.ending_start] == check_id), sample.ending_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 traces of each spread in the place of 2,000")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer("tiny-student")
    (check_id,) = tokenizer.encode("Check", add_special_tokens=False)
    rows: list[dict[str, Any]] = []
    for spread in SPREADS:
        traces = generate_rechecked(200 if options.quick else 2000, 1, RecheckConfig(spread=spread))
        rows += rows_of([render(trace, tokenizer, RenderConfig()) for trace in traces], check_id, spread)
    columns = ["spread", "longest / shortest", "cut", "tokens", "longest kept", "ends shown", "ends there", "places"]
    table = [
        [
            f"{row['spread']:g}",
            f"{row['longest_over_shortest']:.1f}",
            row["cut"],
            f"{row['tokens']:.3f}",
            str(row["longest"]),
            f"{row['ends_shown']:.3f}",
            f"{row['ends_true']:.3f}",
            f"{row['effective_places']:.0f}",
        ]
        for row in rows
    ]
    spread = [row for row in rows if row["spread"] == 0.8]
    keys = {f"ends_shown_{name.split()[0]}": row["ends_shown"] for row in spread[:2] for name in [row["cut"]]}
    header = conditions(1, ("numpy", "transformers"))
    publish("cut_hazard", __doc__, header, markdown(columns, table), keys, rows, options.out)


if __name__ == "__main__":
    main()
