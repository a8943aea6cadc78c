"""Files of search: queries with judged documents, in the formats of the field, as rows of a log.

    pairs     JSON lines, one query each or one pair: FlagEmbedding (query, pos, neg, pos_scores, neg_scores), Tevatron
              (query_id, query, positive_passages, negative_passages), sentence-transformers (query or anchor, positive,
              negative, negative_1, ...; or a text beside the query, and label or score)
    triples   MS MARCO: query, positive and negative text, separated by tabs
    beir      a directory: corpus.jsonl, queries.jsonl, qrels/*.tsv
    trec      a directory: qrels*, run*, and texts as beir has them or as queries.tsv and collection.tsv (id, text)
    letor     SVMlight: LABEL qid:ID 1:VALUE 2:VALUE ... # comment

A row is a query and a document. `time` is the place in the file. Judgements of 0 and below are negatives; above it, the
judgement is the grade.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from limbeck.errors import DataError

Format = Literal["pairs", "triples", "beir", "trec", "letor"]
ID = "id"
"""Name of a document's own id among its texts."""
PARTS = {"train": 0, "dev": 1, "validation": 1, "valid": 1, "vali": 1, "test": 2}
"""Parts by what a file of judgements is called."""


class Row(NamedTuple):
    """A query and a document."""

    query_id: str
    query: str
    document: Mapping[str, str]
    """Its texts by name; `id` is its own."""
    grade: float
    score: float | None = None
    """What another scorer gave it."""
    part: int | None = None


def read_pairs(path: Path) -> Iterator[Row]:
    """Rows of JSON lines. Raises: DataError with the line of what cannot be read."""
    for number, record in _json_lines(path):
        where = f"{path}:{number}"
        query = record.get("query", record.get("anchor"))
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"{where}: no query; expected `query` or `anchor`, a text.")
        query_id = str(record.get("query_id", record.get("qid", _digest(query))))
        yield from (Row(query_id, query, *found) for found in _judged(record, where))


def _judged(record: Mapping[str, Any], where: str) -> Iterator[tuple[dict[str, str], float, float | None]]:
    """Document, grade and score of all that a record has beside its query."""
    found = []
    for name, grade in (("pos", 1.0), ("positive", 1.0), ("positive_passages", 1.0), ("neg", 0.0), ("negative", 0.0)):
        found += _listed(record, name, grade, where)
    for name in ("negative_passages", "negatives", *(key for key in record if re.fullmatch(r"negative_\d+", key))):
        found += _listed(record, name, 0.0, where)
    if not found:
        text = next((record[name] for name in ("document", "passage", "text", "answer") if name in record), None)
        judged = record.get("label", record.get("score"))
        if text is None or not isinstance(judged, int | float):
            raise DataError(
                f"{where}: no documents; expected pos and neg, positive and negative, positive_passages and "
                f"negative_passages, or document and label; found {', '.join(record)}."
            )
        found = [(_document(text, where), float(judged), None)]
    yield from found


def _listed(
    record: Mapping[str, Any], name: str, grade: float, where: str
) -> list[tuple[dict[str, str], float, float | None]]:
    given = record.get(name)
    if given is None:
        return []
    documents, scores = given if isinstance(given, list) else [given], record.get(f"{name}_scores")
    if scores is not None and len(scores) != len(documents):
        raise DataError(f"{where}: {name} has {len(documents)} documents and {name}_scores {len(scores)} scores.")
    known: list[float | None] = [None] * len(documents) if scores is None else list(map(float, scores))
    return [(_document(one, where), grade, score) for one, score in zip(documents, known, strict=True)]


def _document(given: Any, where: str) -> dict[str, str]:
    """Texts by name, from a text or an object with title and text; without an id, one of its content."""
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("text"), str):
        raise DataError(f"{where}: a document is a text, or an object with one; found {str(given)[:60]!r}.")
    texts = {name: str(given[name]) for name in ("title", "text") if given.get(name)}
    own = next((given[name] for name in ("docid", "doc_id", "_id", "id") if given.get(name) is not None), None)
    return {"id": str(own) if own is not None else _digest(" ".join(texts.values())), **texts}


def read_triples(path: Path) -> Iterator[Row]:
    """Rows of MS MARCO triples: a positive and a negative a line; those of one query are one request."""
    for number, line in _lines(path):
        parts = line.split("\t")
        if len(parts) != 3:
            raise DataError(
                f"{path}:{number}: {len(parts)} fields; expected query, positive and negative, tabs between."
            )
        for text, grade in zip(parts[1:], (1.0, 0.0), strict=True):
            yield Row(_digest(parts[0]), parts[0], _document(text, f"{path}:{number}"), grade)


def read_letor(path: Path) -> Iterator[Row]:
    """Rows of SVMlight files: of a file, or of train, vali and test of a directory; features are called f1, f2, ..."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.stem in PARTS)
    for file in files:
        part = PARTS.get(file.stem) if len(files) > 1 else None
        for number, line in _lines(file):
            values, _, comment = line.partition("#")
            found = re.fullmatch(r"(\S+)\s+qid:(\S+)((?:\s+\d+:\S+)*)\s*", values)
            if found is None:
                raise DataError(f"{file}:{number}: expected LABEL qid:ID 1:VALUE 2:VALUE ...; found {line[:60]!r}.")
            features = dict(pair.split(":", 1) for pair in found[3].split())
            name = re.search(r"docid\s*=\s*(\S+)", comment)
            document = {"id": name[1] if name else f"{found[2]}-{number}"}
            named = {f"f{key}": value for key, value in features.items()}
            yield Row(found[2], "", document | named, float(found[1]), part=part)


def read_texts(path: Path, *names: str) -> dict[str, dict[str, str]]:
    """Texts of a directory by id: JSON lines with _id, title and text, or tabs between id and text."""
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise DataError(f"{path}: no {' or '.join(names)}.")
    if file.suffix == ".jsonl":
        found = (_document(record, f"{file}:{number}") for number, record in _json_lines(file))
        return {document["id"]: document for document in found}
    pairs = (line.partition("\t")[::2] for _, line in _lines(file))
    return {name: {"id": name, "text": text} for name, text in pairs}


def read_judgements(path: Path) -> Iterator[tuple[str, str, float]]:
    """Query, document and judgement of a qrels file: BEIR's with a header, or TREC's with four columns."""
    for number, line in _lines(path):
        fields = line.split()
        if number == 1 and fields[0] in ("query-id", "query_id"):
            continue
        if len(fields) not in (3, 4):
            raise DataError(f"{path}:{number}: {len(fields)} columns; expected query, document and judgement.")
        try:
            yield fields[0], fields[-2], float(fields[-1])
        except ValueError:
            raise DataError(f"{path}:{number}: the judgement is {fields[-1]!r}; expected a number.") from None


def read_run(path: Path) -> Iterator[tuple[str, str, float]]:
    """Query, document and score of a TREC run: query Q0 document rank score tag."""
    for number, line in _lines(path):
        fields = line.split()
        try:
            yield fields[0], fields[2], float(fields[4])
        except (IndexError, ValueError):
            raise DataError(
                f"{path}:{number}: expected query Q0 document rank score tag; found {line[:60]!r}."
            ) from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: no JSON ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object; found {type(record).__name__}.")
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read ({' '.join(str(error).split())}).") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "pairs": read_pairs,
    "triples": read_triples,
    "letor": read_letor,
}
