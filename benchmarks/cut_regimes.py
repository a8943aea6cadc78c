"""Where a cut pays: the map of cuts over regimes, from stored cells, and one cell trained anew beside its figures.

A regime is a base student and the traces that it learns from; an arm is what is kept of the traces. Gain kept is (score
- base) / (whole - base), over the mean of the seeds, with an interval from resampled seeds and problems. Cuts stand
beside fewer whole traces at its FLOPs. Cells are trained by `_cells.py` and kept in `results/cut_cells.jsonl`.

    python benchmarks/cut_regimes.py [--quick] [--out DIR] [--scratch DIR]

`--quick` prints the stored map and trains the first cell of the capable regime anew. Without it, the cells of MAP that
are not in the store are trained first; what is there is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cells import Cell, Regime, key_of, read_cells, train_cell, train_cells
from _process import conditions, markdown, publish
from cut_methods import ARMS, REGIMES
from matplotlib.ticker import MultipleLocator

from limbeck.config import build, to_dict
from limbeck.report.drawing import LIGHT, panels, render

WHOLE, HALF, FEWER = "whole", "common length 0.5", "whole at the cost of the half"
SHOWN = (WHOLE, HALF, "share 0.5", FEWER)
MAP: list[Cell] = [
    (REGIMES[regime], arm, ARMS[arm], seed) for regime in ("capable", "novice") for seed in range(3) for arm in SHOWN
]
RESAMPLES = 2000


def gain(cut: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Gain kept by the mean of some seeds, with a 95 % interval over seeds and problems."""
    scores, full = (np.array([_digits(line["right"]) for line in lines]) for lines in (cut, whole))
    base = _digits(cut[0]["base_right"])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        problems = rng.integers(0, len(base), len(base))
        means = [table[rng.integers(0, len(table), len(table))][:, problems].mean() for table in (scores, full)]
        if means[1] > base[problems].mean():
            drawn.append((means[0] - base[problems].mean()) / (means[1] - base[problems].mean()))
    value = (scores.mean() - base.mean()) / (full.mean() - base.mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)


def _digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text])


def regimes_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Regime -> arm -> its lines, one a seed."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        arms = found.setdefault(name_of(build(Regime, line["regime"])), {})
        arms.setdefault(line["arm"], []).append(line)
    return found


def name_of(regime: Regime) -> str:
    """What a regime differs in from the capable one."""
    plain, own = to_dict(Regime()), to_dict(regime)
    parts = [f"{field} {value}" for field, value in own.items() if value != plain[field]]
    return _SAID.get(", ".join(parts), ", ".join(parts))


_SAID = {"": "capable", "student tiny-student": "novice", "spread 0.0": "equal lengths"}


def rows_of(arms: Mapping[str, Sequence[Mapping[str, Any]]], regime: str) -> list[dict[str, Any]]:
    """A row an arm of one regime: score, gain kept, cost over whole traces, three rates."""
    rows, whole = [], arms.get(WHOLE)
    for arm, lines in arms.items():
        mean = {key: float(np.mean([line[key] for line in lines])) for key in _MEANS}
        row: dict[str, Any] = {"regime": regime, "arm": arm, "seeds": len(lines), "base": lines[0]["base"], **mean}
        if whole:
            full = float(np.mean([line["score"] for line in whole]))
            row["gain"] = gain(lines, whole) if full > lines[0]["base"] else None
            row["cost"] = mean["flops"] / float(np.mean([line["flops"] for line in whole]))
            row["memory"] = mean["peak_bytes"] / float(np.mean([line["peak_bytes"] for line in whole]))
        rows.append(row)
    return rows


_MEANS = ("score", "derivation_right", "answer_as_derived", "stop_rate", "flops", "peak_bytes")


def keys_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that stand for the map."""

    def gained(regime: str, arm: str) -> Any:
        return next((row["gain"] for row in rows if (row["regime"], row["arm"]) == (regime, arm)), None)

    def best(regime: str) -> Any:
        cuts = [row for row in rows if row["regime"] == regime and row.get("gain") and row["cost"] <= 0.45]
        top = max(cuts, key=lambda row: row["gain"][0], default=None)
        return top and {"method": top["arm"], "gain_kept": top["gain"], "cost": top["cost"], "seeds": top["seeds"]}

    return {
        "gain_kept_half_capable": gained("capable", HALF),
        "gain_kept_equal_cost_capable": gained("capable", FEWER),
        "gain_kept_half_novice": gained("novice", HALF),
        "best_method_capable": best("capable"),
        "best_method_novice": best("novice"),
    }


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The map for people."""
    columns = ["regime", "arm", "seeds", "base", "score", "gain kept (95 %)", "FLOPs", "memory"]
    columns += ["derivation right", "answer as derived", "stopped"]
    cells = []
    for row in rows:
        gained = "{:.2f} ({:.2f} to {:.2f})".format(*row["gain"]) if row.get("gain") else "–"
        shares = [f"{row[key]:.2f}" if key in row else "–" for key in ("cost", "memory")]
        rates = [f"{row[key]:.2f}" for key in ("derivation_right", "answer_as_derived", "stop_rate")]
        scores = [str(row["seeds"]), f"{row['base']:.2f}", f"{row['score']:.2f}"]
        cells.append([row["regime"], row["arm"], *scores, gained, *shares, *rates])
    return markdown(columns, cells)


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Gain kept with its interval, a line an arm and its cost, a panel a regime."""
    known = [row for row in rows if row.get("gain") and row["arm"] != WHOLE]
    titles = list(dict.fromkeys(row["regime"] for row in known))
    figure, axes = panels(titles, share_x=True)
    arms = list(dict.fromkeys(row["arm"] for row in known))
    figure.set_size_inches(7.5, 0.34 * len(arms) + 1.1)
    for title, place in zip(titles, axes, strict=True):
        place.axvline(1, color=LIGHT.muted, linewidth=1)
        for row in (row for row in known if row["regime"] == title):
            value, low, high = row["gain"]
            line, colour = arms.index(row["arm"]), LIGHT.lines[1 if row["arm"].startswith("whole at") else 0]
            place.plot(value, line, marker="o", color=colour)
            place.hlines(line, low, high, color=colour, linewidth=1.6)
            place.annotate(f"{row['cost']:.2f}", (high, line), (5, -3), textcoords="offset points", fontsize=8)
        place.set_yticks(range(len(arms)), arms)
        place.set_ylim(len(arms) - 0.5, -0.5)
        place.xaxis.set_major_locator(MultipleLocator(0.2))
        place.set_xlim(0, 1.2)
        place.set_xlabel("gain kept, and FLOPs (whole traces: 1)")
        place.xaxis.label.set_fontsize(8)
    file.write_bytes(render(figure, "png"))


def again(store: Sequence[Mapping[str, Any]], scratch: Path) -> str:
    """One stored cell trained anew, beside what is stored."""
    stored = next(line for line in store if (line["arm"], line["seed"]) == (HALF, 0))
    regime = build(Regime, stored["regime"])
    made = train_cell((regime, stored["arm"], stored["changes"], stored["seed"]), scratch)
    names = ("score", "derivation_right", "answer_as_derived", "stop_rate", "flops", "validation_ce")
    rows = [[name, f"{stored[name]:.6g}", f"{made[name]:.6g}"] for name in names]
    what = f"{name_of(regime)}, {stored['arm']}, seed {stored['seed']}"
    return f"One cell anew ({what}):\n\n" + markdown(["", "stored", "now"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the stored map, and one cell trained anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where students are kept; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="directory for the results and the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        if not options.quick:
            train_cells(MAP, scratch)
        lines = list({key_of(line): line for line in read_cells()}.values())
        note = again(lines, Path(temporary))
    rows = [row for regime, arms in regimes_of(lines).items() for row in rows_of(arms, regime)]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(rows, options.out / "cut_regimes.png")
    publish("cut_regimes", __doc__, header, f"{table_of(rows)}\n\n{note}", keys_of(rows), rows, options.out)


if __name__ == "__main__":
    main()
