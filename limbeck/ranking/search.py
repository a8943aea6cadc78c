"""Requests of search: rows of any of its formats as a log, with negatives that are hard to tell from positives.

A query is a request and its judged documents are its candidates. Where few documents are judged, as in BEIR, unjudged
ones are added as negatives: the best of the collection by BM25, then some at random. In a TREC directory with a run the
candidates are what the run retrieved.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, DataError
from limbeck.progress import track
from limbeck.ranking.bm25 import Bm25
from limbeck.ranking.interaction import NO_FEATURES, Features
from limbeck.ranking.log import Coded, Log
from limbeck.ranking.search_formats import ID, PARTS, READERS, Row, read_judgements, read_run, read_texts


@checked
class NegativesConfig:
    """Documents without a judgement that are shown as negatives."""

    bm25: int = 10
    """The best of the collection by BM25, a query; a judged document is not among them."""
    random: int = 5
    """Drawn from the collection, a query."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if min(self.bm25, self.random) < 0:
            raise ConfigError(f"negatives: bm25 {self.bm25} and random {self.random} must be at least 0")


def read_search(source: str, path: Path, negatives: NegativesConfig) -> tuple[Log, dict[str, Features]]:
    """The queries and documents of a file or directory as a log, each query a member of its own.

    Args:
      source: a `search_formats.Format`.
      negatives: of BEIR, whose judgements are few.
    Raises: DataError, naming file and line, for what cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory.")
    if source == "beir":
        rows = _beir(path, negatives)
    else:
        rows = _trec(path) if source == "trec" else READERS[source](path)
    log = log_of_rows(track(rows, f"reading {path.name}"))
    if not len(log):
        raise DataError(f"{path}: no query with a document in it.")
    return log, dict.fromkeys(log.member.values.to_pylist(), NO_FEATURES)


def log_of_rows(rows: Iterable[Row]) -> Log:
    """Rows as a log: texts are held once a document and once a query, and a row's time is its place."""
    queries: dict[str, str] = {}
    documents: dict[str, Mapping[str, str]] = {}
    owners, items, grades, scores, parts = [], [], [], [], []
    for row in rows:
        queries.setdefault(row.query_id, row.query)
        documents.setdefault(row.document[ID], row.document)
        owners.append(row.query_id)
        items.append(row.document[ID])
        grades.append(row.grade)
        scores.append(np.nan if row.score is None else row.score)
        parts.append(-1 if row.part is None else row.part)
    item, query = Coded.of_texts(items), Coded.of_texts(owners)
    texts = [documents[name] for name in item.values.to_pylist()]
    names = [name for name in dict.fromkeys(name for text in texts for name in text) if name != ID]
    asked = Coded.of_texts([queries[name] or None for name in query.values.to_pylist()])
    grade = np.array(grades, dtype=np.float32)
    return Log(
        member=query,
        item=item,
        label=grade > 0,
        time=_first_place(query.codes),
        tie=np.arange(len(items)),
        request=query,
        query=Coded(asked.codes[query.codes], asked.values) if any(queries.values()) else None,
        grade=np.maximum(grade, 0),
        teacher=None if np.isnan(scores).all() else np.array(scores, dtype=np.float32),
        part=None if -1 in parts else np.array(parts, dtype=np.int8),
        of_item={name: _by_code(Coded.of_texts([text.get(name) for text in texts]), item) for name in names},
    )


def _first_place(codes: np.ndarray) -> np.ndarray:
    """float64 [N]: the place of the first row with the same code; a query is asked at one moment."""
    _, first, number = np.unique(codes, return_index=True, return_inverse=True)
    return first[number].astype(np.float64)


def _by_code(values: Coded, owner: Coded) -> Coded:
    """A column of rows from one of the owners' values."""
    return Coded(values.codes[owner.codes], values.values)


def _beir(path: Path, negatives: NegativesConfig) -> Iterator[Row]:
    corpus, queries = read_texts(path, "corpus.jsonl"), read_texts(path, "queries.jsonl")
    names = list(corpus)
    index = Bm25(" ".join(text for name, text in corpus[one].items() if name != ID) for one in names)
    rng = random.Random(negatives.seed)
    files = sorted((path / "qrels").glob("*.tsv"))
    if not files:
        raise DataError(f"{path}/qrels: no .tsv; BEIR has train.tsv, dev.tsv or test.tsv there.")
    has_parts = "train" in {file.stem for file in files}
    for file in files:
        part = PARTS.get(file.stem) if has_parts else None
        for query_id, judged in _by_query(read_judgements(file)):
            query = _known(queries, query_id, file)["text"]
            for document, grade in judged.items():
                yield Row(query_id, query, _known(corpus, document, file), grade, part=part)
            best = [names[place] for place in index.best(query, negatives.bm25 + len(judged))]
            hard = [name for name in best if name not in judged][: negatives.bm25]
            drawn = rng.sample(names, min(len(names), negatives.random + len(judged) + len(hard)))
            more = [name for name in drawn if name not in judged and name not in hard][: negatives.random]
            yield from (Row(query_id, query, corpus[name], 0.0, part=part) for name in (*hard, *more))


def _trec(path: Path) -> Iterator[Row]:
    queries = read_texts(path, "queries.jsonl", "queries.tsv")
    corpus = read_texts(path, "corpus.jsonl", "collection.tsv")
    grades = {
        (query, document): grade
        for file in sorted(path.glob("qrels*"))
        if file.is_file()
        for query, document, grade in read_judgements(file)
    }
    runs = sorted(path.glob("run*"))
    if not runs or not grades:
        raise DataError(f"{path}: expected files qrels* and run*; found {len(grades)} judgements and {len(runs)} runs.")
    seen: set[tuple[str, str]] = set()
    for file in runs:
        for query, document, score in read_run(file):
            if (query, document) not in seen:
                seen.add((query, document))
                text, asked = _known(corpus, document, file), _known(queries, query, file)["text"]
                yield Row(query, asked, text, grades.get((query, document), 0.0), score if len(runs) == 1 else None)


def _by_query(judgements: Iterable[tuple[str, str, float]]) -> Iterator[tuple[str, dict[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    for query, document, grade in judgements:
        found.setdefault(query, {})[document] = grade
    yield from found.items()


def _known(texts: Mapping[str, dict[str, str]], name: str, file: Path) -> dict[str, str]:
    if name not in texts:
        raise DataError(f"{file}: {name} has no text; queries and documents of judgements and runs need one.")
    return texts[name]
