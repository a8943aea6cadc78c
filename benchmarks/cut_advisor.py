"""How well `limbeck traces advise` predicts what a cut keeps of the gain: 24 regimes, half of them to fit its rule.

A regime (`_advisor_cells.py`) is a pair of built-in models, a kind of traces and a learning rate. Measured: the scores
on 300 held-out problems of the base student, of students on whole traces and on half of all tokens, 3 seeds each; gain
kept = (half - base) / (whole - base) of the means, clipped to [-0.5, 1.1]. Predicted: by the look alone, from the rule
whose weights (`limbeck/sweep/gain.py`) come from the fit half. A regime whose whole traces gain less than 0.15 counts
for the recommendation only.

Peers: advisors that look at nothing. `the fraction alone` predicts for every test regime the mean of the fit half;
`never cut` recommends no cut. Bound: a cell's own noise, the standard deviation of gain kept over seeds.

    python benchmarks/cut_advisor.py [--quick] [--out benchmarks/results] [--scratch runs/advisor]

The map is stored (`results/cut_advisor_cells.jsonl`, `results/cut_advisor_looks.jsonl`); what is missing of it is made
first, some minutes a regime. `--quick` reads it, and trains one regime's first seed anew beside its stored figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _advisor_cells import BASE, CELLS, COMMON, RATES, SHARE, WHOLE, Bench, Cell, read_rows, train_rows, work
from _process import conditions, markdown, publish

from limbeck.sweep.cut_facts import CutFacts
from limbeck.sweep.gain import ENOUGH, HALF_WIDTH, HIGHEST, LOWEST, WEIGHTS, Start, predict, terms_of
from limbeck.sweep.recommend import consider, start_of
from limbeck.sweep.seen import CutAdviceConfig, look_at

RESULTS = Path(__file__).parent / "results"
CELLS_FILE, LOOKS = RESULTS / "cut_advisor_cells.jsonl", RESULTS / "cut_advisor_looks.jsonl"
LEAST_GAIN = 0.15
KEPT, LOST = 0.85, 0.15
"""A half that keeps so much should be recommended; one that loses more than the other must not be."""
POLICIES = {COMMON: "common_length", SHARE: "lead"}
RIDGE = 0.02


class Place(NamedTuple):
    """One regime with what was measured and what was seen."""

    cell: Cell
    base: float
    scores: Mapping[str, np.ndarray]
    """Of each arm by seed, [seeds]."""
    start: Start
    facts: Mapping[str, CutFacts]
    """Of each arm that was trained."""

    @property
    def gain(self) -> float:
        """Of whole traces."""
        return float(self.scores[WHOLE].mean()) - self.base

    @property
    def counts(self) -> bool:
        """Whether whole traces gain enough for a share of it to mean something."""
        return self.gain >= LEAST_GAIN

    def kept(self, arm: str = COMMON) -> float:
        """Gain kept by an arm, clipped; of whole traces that gain nothing, whether the cut is as good."""
        lost = float(self.scores[WHOLE].mean() - self.scores[arm].mean())
        ratio = 1 - lost / max(self.gain, LEAST_GAIN)
        return float(np.clip(ratio, LOWEST, HIGHEST))

    def noise(self) -> float | None:
        """Standard error of gain kept by the common length, from the seeds alone; None with one seed."""
        if min(len(self.scores[arm]) for arm in (COMMON, WHOLE)) < 2:
            return None
        both = [self.scores[arm].std(ddof=1) / len(self.scores[arm]) ** 0.5 for arm in (COMMON, WHOLE)]
        return float(np.hypot(*both)) / max(self.gain, LEAST_GAIN)

    @property
    def is_cut(self) -> bool:
        """Whether the half is recommended."""
        return self.predicted() >= ENOUGH

    def predicted(self, arm: str = COMMON, weights: Mapping[str, float] = WEIGHTS) -> float:
        """Gain kept as the rule has it."""
        return predict(self.facts[arm], self.start, weights).value


def see(cell: Cell, bench: Bench) -> dict[str, Any]:
    """One look at a regime: what the rule reads."""
    seen = look_at(CutAdviceConfig(distill=bench.config(cell), most_traces=100))
    start = start_of(seen)
    cuts = {arm: consider(seen, start, policy, 0.5, "sequence") for arm, policy in POLICIES.items()}
    facts = {arm: cut.facts._asdict() for arm, cut in cuts.items()}
    cost = {"seconds": seen.seconds, "of_an_epoch": seen.flops / seen.epoch_flops}
    return {"cell": cell.name, "start": start._asdict(), **facts, **cost, "free": seen.free._asdict()}


def look_rows(bench: Bench) -> None:
    """Look at the regimes that were not; of two that differ in the rate alone, once."""
    known = {row["cell"] for row in read_rows(LOOKS)}
    for cell in CELLS:
        if cell.rate == RATES[0] and cell.name not in known:
            row = see(cell, bench)
            with LOOKS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def start_at(row: Mapping[str, Any], cell: Cell) -> Start:
    """What the rule reads of a look, at the rate of a regime."""
    start = Start(**row["start"])
    return start._replace(travel=start.travel * cell.rate / RATES[0])


def read_map() -> list[Place]:
    """Every regime that was both trained and looked at."""
    rows, looks = read_rows(CELLS_FILE), {row["cell"]: row for row in read_rows(LOOKS)}
    places = []
    for cell in CELLS:
        same = cell._replace(rate=RATES[0])  # base and look do not depend on the rate
        base, scores = _scores(rows, same, BASE), {arm: _scores(rows, cell, arm) for arm in (WHOLE, COMMON, SHARE)}
        if same.name in looks and len(base) and len(scores[WHOLE]) and len(scores[COMMON]):
            seen = looks[same.name]
            facts = {arm: CutFacts(**seen[arm]) for arm in POLICIES if len(scores[arm])}
            places.append(Place(cell, float(base[0]), scores, start_at(seen, cell), facts))
    return places


def _scores(rows: Sequence[Mapping[str, Any]], cell: Cell, arm: str) -> np.ndarray:
    return np.array([row["score"] for row in rows if row["cell"] == cell.name and row["arm"] == arm])


def fit_weights(places: Sequence[Place], names: Sequence[str]) -> dict[str, float]:
    """Weights >= 0 that predict gain kept best in squares, pulled a little to 0: of both policies, by turns."""
    rows, losses = [], []
    for place in places:
        for arm, facts in place.facts.items():
            terms = terms_of(facts, place.start)
            rows.append([terms[name] for name in names])
            losses.append(1 - place.kept(arm))
    x, y, weights = np.array(rows), np.array(losses), np.zeros(len(names))
    for _ in range(2000):
        for number in range(len(names)):
            rest = y - x @ weights + x[:, number] * weights[number]
            weights[number] = max(0.0, x[:, number] @ rest / (x[:, number] @ x[:, number] + RIDGE * len(y)))
    return dict(zip(names, weights.tolist(), strict=True))


def half_width(places: Sequence[Place], names: Sequence[str]) -> float:
    """Half of the interval: 9 of 10 errors are below it when each regime is predicted from all the others."""
    errors = []
    for number, place in enumerate(places):
        weights = fit_weights([*places[:number], *places[number + 1 :]], names)
        errors += [abs(place.predicted(arm, weights) - place.kept(arm)) for arm in place.facts]
    return float(np.quantile(errors, 0.9))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank."""
    below = [np.array([[(v < x) + 0.5 * (v == x) for v in values] for x in values]) for values in (first, second)]
    return float(np.corrcoef(*(table.sum(1) for table in below))[0, 1])


def recommended(places: Sequence[Place]) -> dict[str, float]:
    """What following the rule at the half would lose at worst, and how many of the good cuts it finds."""
    lost = [1 - place.kept() for place in places if place.is_cut]
    good = [place.is_cut for place in places if place.kept() >= KEPT]
    return {
        "recommended": len(lost),
        "worst_recommended_loss": max(lost, default=0.0),
        "bad_recommendations": sum(loss > LOST for loss in lost),
        "good_cuts": len(good),
        "good_cuts_found": float(np.mean(good)) if good else 1.0,
    }


def judge(places: Sequence[Place], fit: Sequence[Place]) -> dict[str, float | None]:
    """The figures of the rule and of the idle advisors on some regimes, by the common length at 0.5."""
    counted = [place for place in places if place.counts]
    kept, predicted = [p.kept() for p in counted], [p.predicted() for p in counted]
    alone = float(np.mean([p.kept() for p in fit if p.counts]))
    by_share = [p for p in counted if SHARE in p.facts]
    share = [p.predicted(SHARE) for p in by_share], [p.kept(SHARE) for p in by_share]
    return {
        "regimes": len(places),
        "counted": len(counted),
        "spearman": spearman(predicted, kept),
        "mae": _mean_error(predicted, kept),
        "spearman_share": spearman(*share) if by_share else None,
        "mae_share": _mean_error(*share) if by_share else None,
        "in_interval": float(np.mean([abs(p.predicted() - p.kept()) <= HALF_WIDTH for p in counted])),
        "noise": _mean([noise for p in counted if (noise := p.noise()) is not None]),
        "mae_fraction_alone": _mean_error([alone] * len(kept), kept),
        **recommended(places),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _mean_error(predicted: Sequence[float], kept: Sequence[float]) -> float:
    return float(np.mean(np.abs(np.subtract(predicted, kept))))


def table_of(places: Sequence[Place]) -> str:
    """A row a regime."""
    rows = []
    for place in places:
        trained = place.scores.values()
        scores = [f"{values.mean():.3f} ({len(values)})" if len(values) else "-" for values in trained]
        kept = [f"{place.kept(arm):.2f}, {place.predicted(arm):.2f}" if arm in place.facts else "-" for arm in POLICIES]
        cut = "cut" if place.is_cut else "do not cut"
        advice = cut if place.counts else f"({cut})"
        rows.append([place.cell.name, place.cell.half, f"{place.base:.3f}", *scores, *kept, advice])
    columns = ["regime", "half", "base", "whole (seeds)", "common half", "share half"]
    return markdown([*columns, "common: kept, predicted", "share: kept, predicted", "advice"], rows)


def anew(directory: Path) -> dict[str, Any]:
    """The first seed of the first regime, trained and looked at now, beside what is stored."""
    cell, bench, file = CELLS[0], Bench(directory), directory / "rows.jsonl"
    wanted = [(cell, BASE, 0), (cell, WHOLE, 0), (cell, COMMON, 0)]
    train_rows(wanted, bench, file)
    made = {row["arm"]: row["score"] for row in read_rows(file)}
    stored = {
        row["arm"]: row["score"] for row in read_rows(CELLS_FILE) if row["cell"] == cell.name and row["seed"] == 0
    }
    seen = see(cell, bench)
    (before,) = (row for row in read_rows(LOOKS) if row["cell"] == cell.name)
    kept = {
        when: predict(CutFacts(**row[COMMON]), Start(**row["start"])).value
        for when, row in (("stored", before), ("anew", seen))
    }
    scores = {arm: {"stored": stored[arm], "anew": made[arm]} for arm in made}
    return {"cell": cell.name, **scores, "predicted": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the stored map, and one regime anew, under 60 seconds")
    parser.add_argument("--out", type=Path, help="directory for the results, such as benchmarks/results")
    parser.add_argument("--scratch", type=Path, help="directory that lets an interrupted call go on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop filling the map after so long")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    header = conditions(1, ["torch", "transformers"])
    with tempfile.TemporaryDirectory() as temporary:
        scratch = flags.scratch or Path(temporary)
        checked = anew(scratch) if flags.quick else None
        if not flags.quick and train_rows(list(work()), Bench(scratch), CELLS_FILE, flags.seconds):
            look_rows(Bench(scratch))
    places = read_map()
    halves = {half: [place for place in places if place.cell.half == half] for half in ("fit", "test")}
    keys = judge(halves["test"], halves["fit"])
    counted = [place for place in halves["fit"] if place.counts]
    details = {
        "weights": dict(WEIGHTS),
        "weights_fitted_now": fit_weights(counted, list(WEIGHTS)),
        "half_width": HALF_WIDTH,
        "half_width_now": half_width(counted, list(WEIGHTS)),
        "fit": judge(halves["fit"], halves["fit"]),
        "anew": checked,
    }
    publish("cut_advisor", __doc__, header, table_of(places), keys, details, flags.out)


if __name__ == "__main__":
    main()
