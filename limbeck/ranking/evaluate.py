"""The stage `rank evaluate`: a scorer and requests in, a score for every candidate and a summary with intervals out.

With a reference, another model that scores the same requests, the summary also has the difference in AUC with its
interval and DeLong's test, and how much of the ranking has moved: Kendall's tau and the churn of the best k.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_json, write_manifest
from limbeck.config import completed_by
from limbeck.engine.backend import Backend
from limbeck.engine.backends import load_decoder
from limbeck.engine.plan import Costs
from limbeck.engine.requests import Request as EngineRequest
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.errors import ConfigError
from limbeck.evaluate.metrics import Interval
from limbeck.ledger import Ledger
from limbeck.models.load import BUILT_IN, load_tokenizer, model_hash
from limbeck.progress import track
from limbeck.ranking import metrics
from limbeck.ranking.auc import delong_test
from limbeck.ranking.data import RankingDataConfig, best_auc, read_requests, training_of
from limbeck.ranking.featurize import EncodedRequest, FeaturizeConfig, Labels, encode_requests
from limbeck.ranking.request import Request
from limbeck.stage import How

SCORES = "scores.jsonl"
K = 5
"""Ranks of NDCG and of the churn."""
PASS_TOKENS = 2048
"""Of prefixes and candidates that are computed together."""


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with the data and features of the training it names."""
    like = tree.get("like") or tree.get("model")
    if tree.get("data") or not isinstance(like, str) or not Checkpoint(Path(like)).is_finished:
        return tree
    trained = training_of(Checkpoint(Path(like)))
    path = (trained or {}).get("data", {}).get("path")
    if path and not Path(path).exists():
        raise ConfigError(
            f"{Path(like) / MANIFEST}: trained on {path}, which is not there from {Path.cwd().name}/; name data.path, "
            "or call from where the training was called."
        )
    return {"features": trained["features"], **tree, "data": trained["data"]} if trained else tree


@completed_by(completed)
class RankEvaluateConfig:
    """Which scorer, on which requests."""

    model: str
    """Directory, alias or hub id."""
    data: RankingDataConfig | None = None
    """What is ranked; null takes the data and features that `like` was trained on."""
    features: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """How requests become text; has to be what the model was trained with."""
    like: str | None = None
    """Output of rank train to take data and features from; null takes the model itself, where it is one."""
    part: Literal["validation", "test"] = "test"
    """Part of the split that is scored."""
    reference: str | None = None
    """Another model to compare with on the same requests, such as the teacher or the scorer before pruning."""
    k: int = K
    """Ranks of NDCG and of the churn of the best k."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1; found {self.k}")
        named = self.like or self.model
        if self.data is None and "/" not in named and named not in BUILT_IN and not Path(named).exists():
            raise ConfigError(f"rank evaluate: {named}: no such directory of a model")
        if self.data is None:
            raise ConfigError("rank evaluate: name data, or as `like` the output of rank train to take it from")


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


def run(config: RankEvaluateConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `scores.jsonl`, `summary.json` and a manifest into `out`."""
    assert config.data is not None
    with output_directory(out, overwrite=how.overwrite) as working:
        split, counts = read_requests(config.data)
        requests = split.test if config.part == "test" else split.validation
        if not requests:
            raise ConfigError(f"rank evaluate: the {config.part} part is empty; set data.split.{config.part}_fraction")
        ledger = Ledger()
        scored = _score(config, config.model, requests, ledger)
        _write_scores(working / SCORES, requests, scored)
        summary = {"model": Path(config.model).name, "part": config.part, **measures(scored, config.k, config.seed)}
        summary["pairs_per_second"] = len(scored.log_odds) / ledger.seconds["scoring"]
        best = best_auc(requests)
        if best is not None:
            summary["best_auc"] = best
        inputs = {"model": model_hash(config.model), **config.data.input_hash}
        if config.reference is not None:
            other = _score(config, config.reference, requests, ledger)
            summary |= compare(scored, other, config.k, config.seed)
            inputs["reference"] = model_hash(config.reference)
        write_json(working / "summary.json", summary)
        write_manifest(
            working,
            stage="rank evaluate",
            config=config,
            inputs=inputs,
            ledger=ledger.as_dict(),
            metrics=summary,
            counts=counts,
        )
    return Checkpoint(out)


def _refuse_long(requests: Sequence[EncodedRequest], limit_tokens: int) -> None:
    longest = max(len(request.prefix) + max(map(len, request.candidates)) for request in requests)
    if longest > limit_tokens:
        raise ConfigError(
            f"a pair of {longest} tokens is longer than the model's {limit_tokens} positions; show fewer events "
            "(data.grouping.history) or features."
        )


def score_all(decoder: Backend, requests: Sequence[EncodedRequest], labels: Labels) -> Scored:
    """Scores of all candidates of all requests, by the engine that serves them.

    Args:
      decoder: of the model; its head has the tokenizer's tokens and no rows beyond.
    """
    one_pass = ScoringConfig(path="packed", pass_tokens=PASS_TOKENS)
    scorer = Scorer(decoder, one_pass, costs=Costs((PASS_TOKENS,), (1.0,), 0.0), budget=0)
    found = [scorer.score([engine_request(request, labels)])[0] for request in track(requests, "scoring")]
    owner = np.repeat(np.arange(len(requests)), [len(request.candidates) for request in requests])
    labels_of = np.concatenate([request.labels for request in requests])
    log_odds = torch.cat([scores.logits[:, 0] - scores.logits[:, 1] for scores in found]).cpu()
    mass = torch.cat([scores.label_mass for scores in found]).cpu()
    return Scored(owner, labels_of, log_odds.numpy(), log_odds.sigmoid().numpy(), mass.numpy())


def engine_request(request: EncodedRequest, labels: Labels) -> EngineRequest:
    """What the engine is asked: prefix and candidates as token ids, yes before no."""
    return EngineRequest(request.prefix.tolist(), [ids.tolist() for ids in request.candidates], labels, full=True)


def read_scores(out: Path) -> Scored:
    """The scores that `run` wrote into a directory."""
    rows = [json.loads(line) for line in (out / SCORES).read_text(encoding="utf-8").splitlines()]
    names = {name: number for number, name in enumerate(dict.fromkeys(row["request_id"] for row in rows))}
    columns = (np.array([row[name] for row in rows]) for name in ("label", "log_odds", "probability", "label_mass"))
    return Scored(np.array([names[row["request_id"]] for row in rows]), *columns)


def measures(scored: Scored, k: int = K, seed: int = 0) -> dict[str, Any]:
    """All metrics of some scores; an interval is NAME, NAME_low and NAME_high, or None and NAME_reason."""
    log_odds, probability, labels, owner = scored.log_odds, scored.probability, scored.labels, scored.owner
    return {
        "requests": len(np.unique(owner)),
        "pairs": len(labels),
        "positives": int(labels.sum()),
        **_flat("auc", metrics.auc_interval(log_odds, labels, owner, seed)),
        **_flat("request_auc", metrics.request_auc(log_odds, labels, owner, seed)),
        **_flat(f"ndcg_at_{k}", metrics.ndcg(log_odds, labels, owner, k, seed)),
        **_flat("log_loss", metrics.log_loss(probability, labels, owner, seed)),
        **_flat("calibration_error", metrics.calibration_error(probability, labels, owner, seed=seed)),
        "mean_label_mass": float(scored.label_mass.mean()),
        "least_label_mass": float(scored.label_mass.min()),
    }


def compare(scored: Scored, other: Scored, k: int = K, seed: int = 0) -> dict[str, Any]:
    """AUC and ranking of one model against another's, on the same pairs; names as in `measures`."""
    labels, owner = scored.labels, scored.owner
    found = {
        **_flat("auc_difference", metrics.auc_difference(scored.log_odds, other.log_odds, labels, owner, seed)),
        **_flat("kendall_tau", metrics.kendall_tau(scored.log_odds, other.log_odds, owner, seed)),
        **_flat(f"top_{k}_churn", metrics.top_k_churn(scored.log_odds, other.log_odds, owner, k, seed)),
    }
    if min(labels.sum(), (~labels).sum()) >= 2:
        test = delong_test(scored.log_odds, other.log_odds, labels)
        found |= {"delong_standard_error": test.standard_error, "delong_p_value": test.p_value}
    return found


def _score(config: RankEvaluateConfig, name: str, requests: Sequence[Request], ledger: Ledger) -> Scored:
    tokenizer = load_tokenizer(name)
    encoded, labels = encode_requests(requests, tokenizer, config.features)
    decoder = load_decoder(name)
    _refuse_long(encoded, decoder.context)
    with ledger.phase("scoring"):
        scored = score_all(decoder, encoded, labels)
    ledger.count(
        sequences=len(scored.log_odds),
        tokens=sum(len(request.prefix) + sum(map(len, request.candidates)) for request in encoded),
    )
    return scored


def _write_scores(path: Path, requests: Sequence[Request], scored: Scored) -> None:
    pairs = [(request, candidate) for request in requests for candidate in request.candidates]
    with path.open("w", encoding="utf-8") as file:
        for index, (request, candidate) in enumerate(pairs):
            row = {
                "request_id": request.request_id,
                "item_id": candidate.item_id,
                "label": candidate.label,
                "log_odds": float(scored.log_odds[index]),
                "probability": float(scored.probability[index]),
                "label_mass": float(scored.label_mass[index]),
            }
            file.write(json.dumps(row) + "\n")


def _flat(name: str, interval: Interval) -> dict[str, Any]:
    if interval.reason:
        return {name: None, f"{name}_reason": interval.reason}
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
