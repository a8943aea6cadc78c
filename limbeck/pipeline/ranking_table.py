"""The table at the end of a ranking pipeline: quality, size and latency of every model along the way.

Quality is that of the test part. AUC, Kendall's tau and churn are set against the model before, those of compressed
models against the whole one too. Latency is that of the scoring engine, a request at a time, prefix not known before,
all models in turns on the same requests.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress.weights import stored_size
from limbeck.config import checked
from limbeck.engine.backends import load_decoder
from limbeck.engine.scoring import Scorer
from limbeck.models.load import load_tokenizer, model_hash
from limbeck.ranking.data import RankingDataConfig, read_requests
from limbeck.ranking.evaluate import engine_request
from limbeck.ranking.featurize import FeaturizeConfig, encode_requests
from limbeck.ranking.scored import Scored, compare, read_scores
from limbeck.stage import How, Stage

TABLE = "table.json"
_WARM_UP_REQUESTS = 4


@checked
class ModelConfig:
    """A model of the table."""

    name: str
    """As its row is called."""
    model: str
    """Its directory."""
    scores: str
    """Directory of its test by `rank evaluate`."""
    before: str | None = None
    """Name of the model it is compared with."""
    whole: str | None = None
    """Name of the model that it is compressed from, where that is compared with it too."""


@checked
class TableConfig:
    """Which models, on which requests."""

    models: list[ModelConfig]
    """In the order of the table."""
    recovered: str
    """The model whose rounds of pruning are told."""
    data: RankingDataConfig
    """The latency is measured on its test part."""
    features: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """How requests become text."""
    timed_requests: int = 64
    """Test requests that the latency is measured on."""


def run(config: TableConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `table.json`, `rows` and `rounds`, and a manifest that has them as its metrics.

    Raises: CheckpointError when `out` exists.
    """
    with output_directory(out, overwrite=how.overwrite) as working:
        scores = {model.name: read_scores(Path(model.scores)) for model in config.models}
        times = _latencies(config)
        rows = [_row(model, scores) | times[model.name] for model in config.models]
        result = {"rows": rows, "rounds": Checkpoint(Path(config.recovered)).metrics["rounds"]}
        write_json(working / TABLE, result)
        inputs = {model.name: model_hash(model.model) for model in config.models} | config.data.input_hash
        write_manifest(working, stage=STAGE.name, config=config, inputs=inputs, metrics=result)
    return Checkpoint(out)


def _row(model: ModelConfig, scores: Mapping[str, Scored]) -> dict[str, Any]:
    """What the test part says of a model, by itself, beside the one before and beside the whole one."""
    row = {**Checkpoint(Path(model.scores)).metrics, "model": model.name, "before": model.before}
    size = stored_size(Path(model.model))
    row |= {"parameters": size.parameters, "weight_bytes": size.bytes}
    if model.before is not None:
        row |= compare(scores[model.name], scores[model.before])
    if model.whole is not None:
        lost = compare(scores[model.name], scores[model.whole])
        row |= {f"{name}_from_{model.whole}": value for name, value in lost.items()}
        row[f"relative_auc_from_{model.whole}"] = lost["auc_difference"] / (row["auc"] - lost["auc_difference"])
    return row


def _latencies(config: TableConfig) -> dict[str, dict[str, float]]:
    """Milliseconds a request under the engine: every model has each request before the next one comes."""
    split, _ = read_requests(config.data)
    requests = split.test[: config.timed_requests + _WARM_UP_REQUESTS]
    encoded, labels = encode_requests(requests, load_tokenizer(config.models[0].model), config.features)
    scorers = {model.name: Scorer(load_decoder(model.model), budget=0) for model in config.models}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for request in encoded:
        asked = engine_request(request, labels)._replace(full=False)
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer.score([asked])
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "latency_p50_ms": 1e3 * float(np.median(values[_WARM_UP_REQUESTS:])),
            "latency_p95_ms": 1e3 * float(np.quantile(values[_WARM_UP_REQUESTS:], 0.95)),
        }
        for name, values in seconds.items()
    }


STAGE = Stage(name="ranking table", config=TableConfig, run=run)
