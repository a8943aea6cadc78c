"""The stage `rank evaluate`: a scorer and requests in, a score for every candidate and a summary with intervals out.

With a reference, another model that scores the same requests, the summary also has the difference in AUC with its
interval and DeLong's test, and how much of the ranking has moved: Kendall's tau and the churn of the best k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from limbeck.checkpoint import MANIFEST, Checkpoint, hash_path, output_directory, write_json, write_manifest
from limbeck.config import completed_by
from limbeck.engine.backend import Backend
from limbeck.engine.backends import load_decoder
from limbeck.engine.plan import Costs
from limbeck.engine.requests import Request as EngineRequest
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.load import BUILT_IN, load_tokenizer, model_hash
from limbeck.models.placement import here
from limbeck.progress import say, track
from limbeck.ranking.baselines import baseline_scores
from limbeck.ranking.beside import beside_baselines, headline, reliability, slices_of
from limbeck.ranking.data import RankingDataConfig, best_auc, read_requests, training_of
from limbeck.ranking.featurize import EncodedRequest, FeaturizeConfig, Labels, encode_requests
from limbeck.ranking.interaction import Request
from limbeck.ranking.scored import SCORES, K, Scored, compare, measures, read_scores, write_scores
from limbeck.stage import How

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
    part: Literal["train", "validation", "test"] = "test"
    """Part of the split that is scored; train, to distil from the scores."""
    reference: str | None = None
    """Another model to compare with on the same requests, such as the teacher or the scorer before pruning, or a
    directory with its scores of them."""
    k: int = K
    """Ranks of NDCG, of recall and of the churn of the best k."""
    baselines: bool = True
    """Whether the same candidates are scored by what reads no text (rates, factors, BM25, trees), to be beaten."""
    slices: tuple[str, ...] = ()
    """Features of members, moments or items whose values are measured apart."""
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


def run(config: RankEvaluateConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `scores.jsonl`, `summary.json` and a manifest into `out`."""
    assert config.data is not None
    with output_directory(out, overwrite=how.overwrite) as working:
        split, counts = read_requests(config.data)
        requests = getattr(split, config.part)
        if not requests:
            raise ConfigError(f"rank evaluate: the {config.part} part is empty; set data.split.{config.part}_fraction")
        ledger = Ledger(here().device)
        scored = _score(config, config.model, requests, ledger)
        write_scores(working / SCORES, requests, scored)
        summary = {"model": Path(config.model).name, "part": config.part, **measures(scored, config.k, config.seed)}
        summary["pairs_per_second"] = len(scored.log_odds) / ledger.seconds["scoring"]
        best = best_auc(requests)
        if best is not None:
            summary["best_auc"] = best
        summary["reliability"] = reliability(scored)
        if config.slices:
            summary["slices"] = slices_of(scored, requests, config.slices, config.k, config.seed)
        if config.baselines and config.part != "train":
            with ledger.phase("baselines"):
                found = baseline_scores(split, requests, config.seed)
            summary |= beside_baselines(scored, found, config.k, config.seed)
            say(headline(summary))
        inputs = {"model": model_hash(config.model), **config.data.input_hash}
        if config.reference is not None:
            summary |= compare(
                scored, _reference(config, config.reference, scored, requests, ledger), config.k, config.seed
            )
            is_scored = (Path(config.reference) / SCORES).is_file()
            inputs["reference"] = hash_path(Path(config.reference)) if is_scored else model_hash(config.reference)
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


def _reference(
    config: RankEvaluateConfig, name: str, scored: Scored, requests: Sequence[Request], ledger: Ledger
) -> Scored:
    """Scores of the reference: those of a directory that has some, or by the model."""
    if not (Path(name) / SCORES).is_file():
        return _score(config, name, requests, ledger)
    other = read_scores(Path(name))
    if not np.array_equal(other.owner, scored.owner) or not np.array_equal(other.labels, scored.labels):
        raise ConfigError(f"reference {name}: its scores are of other pairs; score the same part of the same data.")
    return other


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
    grades = np.concatenate([r.labels.astype(float) if r.grades is None else r.grades for r in requests])
    log_odds = torch.cat([scores.logits[:, 0] - scores.logits[:, 1] for scores in found]).cpu()
    mass = torch.cat([scores.label_mass for scores in found]).cpu()
    return Scored(owner, labels_of, log_odds.numpy(), log_odds.sigmoid().numpy(), mass.numpy(), grades)


def engine_request(request: EncodedRequest, labels: Labels) -> EngineRequest:
    """What the engine is asked: prefix and candidates as token ids, yes before no."""
    return EngineRequest(request.prefix.tolist(), [ids.tolist() for ids in request.candidates], labels, full=True)


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
