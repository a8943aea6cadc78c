"""What a cut saves, what it keeps and when to use it: three sentences from the rows of a sweep over two regimes.

A regime is where a student starts: `capable` (it goes on and stops by itself, and is often wrong) or `novice` (it has
yet to learn how such texts run).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.report.rows import Estimate
from limbeck.report.units import percent, percent_interval

KEEPS_ENOUGH = 0.95
"""Share of the gain that a recommended cut keeps at least."""
Run = Mapping[str, Any]


def recommended(runs: Sequence[Run], regime: str = "capable") -> Run:
    """The cheapest run of a regime that keeps enough of the gain; whole traces where no cut does."""
    (whole,) = (run for run in _of(runs, regime) if _is_whole(run))
    cuts = [run for run in _of(runs, regime) if not _is_whole(run)]
    enough = [run for run in cuts if (run["gain_kept"] or 0.0) >= KEEPS_ENOUGH]
    return min(enough, key=lambda run: run["flops"], default=whole)


def cut_sentences(runs: Sequence[Run], shown: Run) -> list[str]:
    """The three sentences.

    Args:
      runs: rows of a sweep's summary with `regime`, those that failed left out.
      shown: the cut of the capable regime that they speak of; the novice had it too.
    """
    (whole,) = (run for run in _of(runs, "capable") if _is_whole(run))
    words = (("flops", "FLOPs"), ("train_seconds", "training seconds"), ("peak_bytes", "peak memory"))
    costs = [f"{percent(shown[key] / whole[key])} of the {word}" for key, word in words]
    saves = f"What a cut saves: {_named(shown)} took {costs[0]}, {costs[1]} and {costs[2]} of whole traces."
    scores = f"from a score of {shown['base_accuracy']:.2f} to {whole['accuracy']:.2f}"
    keeps = (
        f"What it keeps: {_kept(shown)} of what whole traces bring a student that can already go on and stop by itself "
        f"({scores}){_beside(runs, shown)}; the cheapest run that keeps {percent(KEEPS_ENOUGH)} of it is "
        f"{_named(recommended(runs))}."
    )
    return [saves, keeps, _when(runs, shown)]


def _when(runs: Sequence[Run], shown: Run) -> str:
    advice = "When to use it: where the student derives, answers what it derived and stops by itself, at a small rate"
    (novice,) = (run for run in _of(runs, "novice") if _cut(run) == _cut(shown))
    control = control_of(runs, novice)
    kept, fewer = _gain(novice), _gain(control) if control else None
    told = f"the same cut kept {_kept(novice)} of the gain of a novice{_beside(runs, novice)}"
    if kept is None and fewer is None:
        return f"{advice}; whole traces did not better the novice here, so that no cut had a gain to keep."
    if kept is None or fewer is None:
        return f"{advice}; {told}."
    if _holds(kept, fewer.value) or _holds(fewer, kept.value):
        return f"{advice}; {told}, which these problems cannot tell apart."
    return (
        f"{advice}; {told}, so {'it pays there too' if kept.value > fewer.value else 'whole traces come first there'}."
    )


def _holds(estimate: Estimate, value: float) -> bool:
    """Whether an interval holds a value; one without ends says nothing and may hold any."""
    low, high = estimate.low, estimate.high
    return low is None or high is None or low <= value <= high


def control_of(runs: Sequence[Run], cut: Run) -> Run | None:
    """Whole traces at the cost of a cut."""
    return next((run for run in runs if cut["name"] in run["control_of"]), None)


def _beside(runs: Sequence[Run], cut: Run) -> str:
    """What others at the same cost kept, in brackets."""
    control = control_of(runs, cut)
    share = [run for run in _of(runs, cut["regime"]) if _cut(run) == ("lead", cut["lead_fraction"]) and run is not cut]
    parts = [f"fewer whole traces at that cost {_kept(control)}"] if control else []
    parts += [f"the same share of each trace {_kept(run)}" for run in share]
    return f" ({', '.join(parts)})" if parts else ""


def _of(runs: Sequence[Run], regime: str) -> list[Run]:
    return [run for run in runs if run["regime"] == regime and not run["control"]]


def _cut(run: Run) -> tuple[str, Any]:
    return run.get("policy", "lead"), run["lead_fraction"]


def _is_whole(run: Run) -> bool:
    return run["lead_fraction"] == 1


def _named(run: Run) -> str:
    share = f"{100 * run['lead_fraction']:.3g} %"
    if _is_whole(run):
        return "whole traces"
    is_common = run.get("policy") == "common_length"
    return (
        f"one length for all traces that keeps {share} of all tokens"
        if is_common
        else f"the first {share} of each trace"
    )


def _gain(run: Run) -> Estimate | None:
    value = run["gain_kept"]
    return None if value is None else Estimate(value, run["gain_kept_low"], run["gain_kept_high"])


def _kept(run: Run) -> str:
    gain = _gain(run)
    return "an unknown share" if gain is None else percent_interval(gain)
