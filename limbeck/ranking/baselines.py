"""What a model has to beat: scores of the same candidates by means that read no text, or only count its words.

    random order          an order drawn at random: its NDCG is not 0
    item rate             share of yes of the item in training, drawn to the mean by 5 labels
    item and member rates the sum of both log-odds; the member's is of its whole past
    factor model          `factors`
    BM25                  `bm25`, where requests have a query
    LightGBM              gradient-boosted trees on features and rates, by LambdaRank and by log-loss; needs the extra
                          `lightgbm`

All learn from the training part alone. Very long logs are read from their latest requests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from limbeck.progress import say
from limbeck.ranking.arrays import Arrays, arrays_of
from limbeck.ranking.bm25 import Bm25
from limbeck.ranking.factors import fit_factors
from limbeck.ranking.interaction import Features, Interaction, Request
from limbeck.ranking.signals import smoothed
from limbeck.ranking.split import Split

MOST_REQUESTS = 100_000
"""Training requests that are read, the latest ones."""
_CATEGORIES = 1000
"""Different texts of a feature that trees take as categories; one with more is left out."""


def baseline_scores(split: Split, asked: Sequence[Request], seed: int = 0) -> dict[str, np.ndarray]:
    """float [M] by name: each baseline's scores of all candidates of the asked requests.

    Args:
      split: its training part is learned from; the factor model keeps the epoch that is best on the validation part.
      asked: requests of the validation or the test part.
      seed: of the random order, the factor model and the trees.
    """
    if len(split.train) > MOST_REQUESTS:
        say(f"note: baselines read the latest {MOST_REQUESTS} of {len(split.train)} training requests")
    learned = split.train[-MOST_REQUESTS:]
    (train, validation, test), num_items = arrays_of([learned, split.validation, asked])
    found = {
        "random order": np.random.default_rng(seed).random(len(test.items)),
        "item rate": item_rates(train, test, num_items),
        "item and member rates": _log_odds(item_rates(train, test, num_items)) + _log_odds(member_rates(train, test)),
        "factor model": fit_factors(train, validation, num_items, seed).scores(test),
    }
    if any(request.query for request in asked[:1]):
        found["BM25"] = _bm25(learned, asked)
    if importlib.util.find_spec("lightgbm") is None:
        say("note: no LightGBM baseline; install the extra: pip install 'limbeck[lightgbm]'")
        return found
    own = [_cross_rates(train, num_items), item_rates(train, test, num_items)]
    inputs = [
        np.column_stack([table, rates, member_rates(train, part)])
        for table, rates, part in zip(feature_tables(learned, asked), own, (train, test), strict=True)
    ]
    return found | _trees(train, inputs[0], inputs[1], seed)


def item_rates(train: Arrays, asked: Arrays, num_items: int) -> np.ndarray:
    """float [M]: the smoothed share of yes of every candidate's item among the training candidates."""
    shown = np.bincount(train.items, minlength=num_items)
    yes = np.bincount(train.items, train.labels, minlength=num_items)
    return smoothed(yes, shown, float(train.labels.mean()))[asked.items]


def _cross_rates(train: Arrays, num_items: int) -> np.ndarray:
    """Item rates for the training rows themselves, each half of the requests by the other: none knows its own label."""
    found, is_odd = np.empty(len(train.items)), train.owners % 2 == 1
    for half in (is_odd, ~is_odd):
        known = train._replace(items=train.items[~half], labels=train.labels[~half])
        found[half] = item_rates(known, train, num_items)[half]
    return found


def member_rates(train: Arrays, asked: Arrays) -> np.ndarray:
    """float [M]: the smoothed share of yes of the member's whole past, which is known when a request comes."""
    return smoothed(asked.own_yes, asked.own_shown, float(train.labels.mean()))[asked.owners]


def feature_tables(train: Sequence[Request], asked: Sequence[Request]) -> list[np.ndarray]:
    """float [M F] of the features of context, member and item: numbers as they are, other texts by their number.

    A feature that is no number and has too many different texts for categories is left out; NaN where there is none.
    """
    rows = [list(_rows(part)) for part in (train, asked)]
    names = dict.fromkeys(name for row in rows[0] for name in row)
    columns: list[list[np.ndarray]] = [[], []]
    for name in names:
        values = [[row.get(name) for row in part] for part in rows]
        known = {value: number for number, value in enumerate(sorted({v for v in values[0] if v is not None}))}
        numbers = {value: _number(value) for part in values for value in part if value is not None}
        if all(np.isfinite(number) for number in numbers.values()):
            as_number = numbers
        elif len(known) <= _CATEGORIES:
            as_number = {value: float(number) for value, number in known.items()}
        else:
            continue
        for part, column in zip(values, columns, strict=True):
            column.append(np.array([np.nan if v is None else as_number.get(v, np.nan) for v in part]))
    return [np.column_stack(c) if c else np.zeros((len(r), 0)) for c, r in zip(columns, rows, strict=True)]


def _rows(requests: Sequence[Request]) -> Iterator[dict[str, str]]:
    for request in requests:
        shared = _named("context", request.context) | _named("member", request.member)
        yield from (shared | _named("item", candidate.item) for candidate in request.candidates)


def _named(kind: str, features: Features) -> dict[str, str]:
    return {f"{kind} {name}": value for name, value in features.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _trees(train: Arrays, inputs: np.ndarray, asked: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    import lightgbm  # an extra

    found = {}
    sizes = np.bincount(train.owners)
    for title, objective in (("LightGBM (LambdaRank)", "lambdarank"), ("LightGBM (log-loss)", "binary")):
        is_list = objective == "lambdarank"
        labels = _levels(train.grades) if is_list else train.labels
        data = lightgbm.Dataset(inputs, labels, group=sizes if is_list else None)
        settings: dict[str, Any] = {
            "objective": objective,
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 50,
            "seed": seed,
            "deterministic": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        found[title] = np.asarray(lightgbm.train(settings, data, num_boost_round=200).predict(asked))
    return found


def _levels(grades: np.ndarray) -> np.ndarray:
    """Grades as LambdaRank takes them: 0, 1, 2, ... in their order."""
    return np.minimum(np.unique(grades, return_inverse=True)[1], 30)


def _bm25(train: Sequence[Request], asked: Sequence[Request]) -> np.ndarray:
    texts = {c.item_id: _text(c) for part in (train, asked) for request in part for c in request.candidates}
    number = {item: place for place, item in enumerate(texts)}
    ranker = Bm25(texts.values())
    found = [ranker.scores(request.query)[[number[c.item_id] for c in request.candidates]] for request in asked]
    return np.concatenate(found)


def _text(candidate: Interaction) -> str:
    return " ".join(candidate.item.values())


def _log_odds(rates: np.ndarray) -> np.ndarray:
    held = np.clip(rates, 1e-6, 1 - 1e-6)
    return np.log(held / (1 - held))
