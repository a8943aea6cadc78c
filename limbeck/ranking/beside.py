"""A model's scores beside those of its baselines, and by slice: AUC and NDCG with intervals, and who is ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.evaluate.metrics import Interval, share_interval
from limbeck.ranking import metrics
from limbeck.ranking.interaction import Request
from limbeck.ranking.scored import Scored, flat

_SLICES = 12
"""Values of a feature that are told apart, the most frequent ones."""
_BINS = 10


def beside_baselines(scored: Scored, baselines: Mapping[str, np.ndarray], k: int, seed: int) -> dict[str, Any]:
    """Measures of each baseline, and the model's AUC and NDCG minus those of the best of them, paired by request.

    The best is chosen on the part that is measured, which favours the baselines.
    """
    name = f"ndcg_at_{k}"
    told = {title: _measured(scored, scores, k, seed) for title, scores in baselines.items()}
    found: dict[str, Any] = {"baselines": told}
    known = {title: row["auc"] for title, row in told.items() if row["auc"] is not None}
    if known:
        best = max(known, key=lambda title: known[title])
        other = baselines[best]
        over = metrics.auc_difference(scored.log_odds, other, scored.labels, scored.owner, seed)
        found |= {"best_baseline": best, "best_baseline_auc": known[best], **flat("auc_over_best_baseline", over)}
    known = {title: row[name] for title, row in told.items() if row[name] is not None}
    if known:
        best = max(known, key=lambda title: known[title])
        ours, theirs = (
            metrics.ndcg_of_requests(values, scored.grades, scored.owner, k)
            for values in (scored.log_odds, baselines[best])
        )
        over = metrics.difference_of_requests(ours, theirs, seed)
        found |= {"best_baseline_by_ndcg": best, **flat(f"{name}_over_best_baseline", over)}
    return found


def headline(row: Mapping[str, Any]) -> str:
    """Whether a model beats its best baseline, in a sentence that says by how much."""
    over = row.get("auc_over_best_baseline")
    if over is None:
        return f"{row['model']}: no baseline has an AUC here, and none is beaten."
    low, high = row["auc_over_best_baseline_low"], row["auc_over_best_baseline_high"]
    word = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told from"
    return (
        f"{row['model']} {word} the best baseline, {row['best_baseline']}: AUC {row['auc']:.4f} against "
        f"{row['best_baseline_auc']:.4f}, paired difference {over:+.4f} ({low:+.4f} to {high:+.4f})."
    )


def _measured(scored: Scored, scores: np.ndarray, k: int, seed: int) -> dict[str, Any]:
    return {
        **flat("auc", metrics.auc_interval(scores, scored.labels, scored.owner, seed)),
        **flat("request_auc", metrics.request_auc(scores, scored.labels, scored.owner, seed)),
        **flat(f"ndcg_at_{k}", metrics.ndcg(scores, scored.grades, scored.owner, k, seed)),
    }


def slices_of(
    scored: Scored, requests: Sequence[Request], features: Sequence[str], k: int, seed: int
) -> list[dict[str, Any]]:
    """AUC and NDCG of the pairs whose feature has a value, for its most frequent values; a pair's own features first.

    NDCG is that of the requests that are in the slice as a whole, and missing where there is none.
    """
    rows = []
    for feature in features:
        values = [_value(request, index, feature) for request in requests for index in range(len(request.candidates))]
        counted = Counter(value for value in values if value is not None)
        for value, _ in counted.most_common(_SLICES):
            chosen = np.array([one == value for one in values])
            part = Scored._make(column[chosen] for column in scored)
            split = set(scored.owner[chosen]) & set(scored.owner[~chosen])
            row = {"feature": feature, "value": value, "pairs": int(chosen.sum())}
            row |= _measured(part, part.log_odds, k, seed)
            rows.append(row if not split else {key: v for key, v in row.items() if "ndcg" not in key})
    return rows


def reliability(scored: Scored) -> list[dict[str, Any]]:
    """A reliability diagram: of each tenth of [0, 1], the mean score and the share of yes with its interval."""
    bins = np.minimum((scored.probability * _BINS).astype(int), _BINS - 1)
    rows = []
    for number in np.unique(bins):
        chosen = bins == number
        share: Interval = share_interval(scored.labels[chosen])
        row = {"mean_probability": float(scored.probability[chosen].mean()), "pairs": int(chosen.sum())}
        rows.append(row | flat("share_of_yes", share))
    return rows


def _value(request: Request, index: int, feature: str) -> str | None:
    candidate = request.candidates[index]
    for features in (candidate.item, request.context, request.member):
        if feature in features:
            return features[feature]
    return None
