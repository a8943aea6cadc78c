"""Scores of the pairs of some requests, and all that is measured on them; how they are kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.evaluate.metrics import Interval
from limbeck.ranking import metrics, retrieval
from limbeck.ranking.auc import delong_test
from limbeck.ranking.interaction import Request

SCORES = "scores.jsonl"
K = 5
"""Ranks of NDCG, of recall and of the churn."""


class Scored(NamedTuple):
    """One model's scores of all N pairs of some requests, in their order."""

    owner: np.ndarray
    """int [N]: the number of a pair's request, from 0."""
    labels: np.ndarray
    """bool [N]."""
    log_odds: np.ndarray
    """float [N]."""
    probability: np.ndarray
    """float [N]."""
    label_mass: np.ndarray
    """float [N]."""
    grades: np.ndarray
    """float [N]: how relevant each is, at least 0."""


def measures(scored: Scored, k: int = K, seed: int = 0) -> dict[str, Any]:
    """All metrics of some scores; an interval is NAME, NAME_low and NAME_high, or None and NAME_reason."""
    log_odds, probability, labels, owner = scored.log_odds, scored.probability, scored.labels, scored.owner
    by_request = {
        "mrr": retrieval.reciprocal_rank,
        "map": retrieval.average_precision,
        f"recall_at_{k}": retrieval.recall(k),
    }
    found = {
        "requests": len(np.unique(owner)),
        "pairs": len(labels),
        "positives": int(labels.sum()),
        **flat("auc", metrics.auc_interval(log_odds, labels, owner, seed)),
        **flat("request_auc", metrics.request_auc(log_odds, labels, owner, seed)),
        **flat(f"ndcg_at_{k}", metrics.ndcg(log_odds, scored.grades, owner, k, seed)),
    }
    for name, measure in by_request.items():
        found |= flat(name, metrics.mean_of_requests(measure, log_odds, labels, owner, seed))
    return {
        **found,
        **flat("log_loss", metrics.log_loss(probability, labels, owner, seed)),
        **flat("calibration_error", metrics.calibration_error(probability, labels, owner, seed=seed)),
        "mean_label_mass": float(scored.label_mass.mean()),
        "least_label_mass": float(scored.label_mass.min()),
    }


def compare(scored: Scored, other: Scored, k: int = K, seed: int = 0) -> dict[str, Any]:
    """AUC and ranking of one model against another's, on the same pairs; names as in `measures`."""
    labels, owner = scored.labels, scored.owner
    by_request = {
        "mrr": retrieval.reciprocal_rank,
        "map": retrieval.average_precision,
        f"recall_at_{k}": retrieval.recall(k),
    }
    found = flat("auc_difference", metrics.auc_difference(scored.log_odds, other.log_odds, labels, owner, seed))
    ours, theirs = (metrics.ndcg_of_requests(one.log_odds, scored.grades, owner, k) for one in (scored, other))
    found |= flat(f"ndcg_at_{k}_difference", metrics.difference_of_requests(ours, theirs, seed))
    for name, measure in by_request.items():
        ours, theirs = (metrics.of_requests(measure, one.log_odds, labels, owner) for one in (scored, other))
        found |= flat(f"{name}_difference", metrics.difference_of_requests(ours, theirs, seed))
    found |= flat("kendall_tau", metrics.kendall_tau(scored.log_odds, other.log_odds, owner, seed))
    found |= flat(f"top_{k}_churn", metrics.top_k_churn(scored.log_odds, other.log_odds, owner, k, seed))
    if min(labels.sum(), (~labels).sum()) >= 2:
        test = delong_test(scored.log_odds, other.log_odds, labels)
        found |= {"delong_standard_error": test.standard_error, "delong_p_value": test.p_value}
    return found


def write_scores(path: Path, requests: Sequence[Request], scored: Scored) -> None:
    """A line a pair."""
    pairs = [(request, candidate) for request in requests for candidate in request.candidates]
    with path.open("w", encoding="utf-8") as file:
        for index, (request, candidate) in enumerate(pairs):
            row = {
                "request_id": request.request_id,
                "item_id": candidate.item_id,
                "label": candidate.label,
                "grade": float(scored.grades[index]),
                "log_odds": float(scored.log_odds[index]),
                "probability": float(scored.probability[index]),
                "label_mass": float(scored.label_mass[index]),
            }
            file.write(json.dumps(row) + "\n")


def read_scores(out: Path) -> Scored:
    """The scores that `write_scores` wrote into a directory."""
    rows = [json.loads(line) for line in (out / SCORES).read_text(encoding="utf-8").splitlines()]
    names = {name: number for number, name in enumerate(dict.fromkeys(row["request_id"] for row in rows))}

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    return Scored(
        owner=np.array([names[row["request_id"]] for row in rows]),
        labels=column("label"),
        log_odds=column("log_odds"),
        probability=column("probability"),
        label_mass=column("label_mass"),
        grades=np.array([float(row.get("grade", row["label"])) for row in rows]),
    )


def flat(name: str, interval: Interval) -> dict[str, Any]:
    """An interval as plain values: NAME, NAME_low and NAME_high, or None and NAME_reason."""
    if interval.reason:
        return {name: None, f"{name}_reason": interval.reason}
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
