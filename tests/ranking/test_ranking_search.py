"""Files of search in the formats of the field, BM25, and what they become."""

import json
import math

import pytest

from limbeck.config import build
from limbeck.errors import DataError
from limbeck.ranking.bm25 import Bm25
from limbeck.ranking.data import RankingDataConfig, read_requests
from limbeck.ranking.featurize import write_request
from limbeck.ranking.search import NegativesConfig, read_search
from limbeck.ranking.search_formats import read_pairs
from limbeck.ranking.train import RankTrainConfig

NONE = NegativesConfig(bm25=0, random=0)


def json_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_bm25_by_its_formula():
    texts = ["a red shoe", "red red hat", "a blue hat and a scarf"]
    found = Bm25(texts, k1=1.2, b=0.75)
    mean = (3 + 3 + 6) / 3
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert found.scores("red")[1] == pytest.approx(idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / mean)))
    assert found.best("RED hat!", 5) == [1, 0, 2] and found.best("green", 5) == []


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "pos": ["good"], "neg": ["bad", "worse"]},
        {"query_id": "7", "query": "q", "positive_passages": [{"docid": "1", "title": "", "text": "good"}],
         "negative_passages": [{"docid": "2", "title": "", "text": "bad"}, {"docid": "3", "text": "worse"}]},
        {"anchor": "q", "positive": "good", "negative_1": "bad", "negative_2": "worse"},
    ],
)  # fmt: skip
def test_lines_with_positives_and_negatives(tmp_path, record):
    rows = list(read_pairs(json_lines(tmp_path / "x.jsonl", [record])))
    assert [(row.query, row.document["text"], row.grade) for row in rows] == [
        ("q", "good", 1.0),
        ("q", "bad", 0.0),
        ("q", "worse", 0.0),
    ]
    assert len({row.query_id for row in rows}) == 1 and len({row.document["id"] for row in rows}) == 3


def test_scores_of_another_scorer_and_judged_pairs(tmp_path):
    record = {"query": "q", "pos": ["good"], "neg": ["bad"], "pos_scores": [2.5], "neg_scores": [-1]}
    assert [row.score for row in read_pairs(json_lines(tmp_path / "x.jsonl", [record]))] == [2.5, -1.0]
    pairs = [{"query": "q", "document": text, "label": grade} for text, grade in (("best", 2), ("fair", 1), ("no", 0))]
    log, _ = read_search("pairs", json_lines(tmp_path / "y.jsonl", pairs), NONE)
    assert log.label.tolist() == [True, True, False] and log.grade.tolist() == [2, 1, 0] and log.teacher is None


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "x.jsonl:1: no JSON"),
        ("[]", "expected an object; found list"),
        ('{"pos": ["a"]}', "no query"),
        ('{"query": "q", "title": "a"}', "no documents; .* found query, title"),
        ('{"query": "q", "pos": [3]}', "a document is a text"),
        ('{"query": "q", "pos": ["a"], "pos_scores": [1, 2]}', "1 documents and pos_scores 2 scores"),
    ],
)
def test_lines_that_are_none_are_named(tmp_path, line, match):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=match):
        read_search("pairs", tmp_path / "x.jsonl", NONE)


def test_triples_of_one_query_are_one_request(tmp_path):
    (tmp_path / "t.tsv").write_text("q1\tgood\tbad\nq2\tfine\tpoor\nq1\tgood\tworse\n")
    log, _ = read_search("triples", tmp_path / "t.tsv", NONE)
    assert len(log) == 6 and len(log.member.values) == 2
    (tmp_path / "t.tsv").write_text("q1\tgood\n")
    with pytest.raises(DataError, match=r"t\.tsv:1: 2 fields"):
        read_search("triples", tmp_path / "t.tsv", NONE)


WORDS = ("apple", "pear", "plum", "fig", "lime", "kiwi")


def beir(path, parts):
    json_lines(
        path / "corpus.jsonl", [{"_id": f"d{n}", "title": w, "text": f"the {w} tree"} for n, w in enumerate(WORDS)]
    )
    json_lines(path / "queries.jsonl", [{"_id": f"q{n}", "text": f"about {w} tree"} for n, w in enumerate(WORDS)])
    (path / "qrels").mkdir()
    for part, queries in parts.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in queries)]
        (path / "qrels" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_beir_with_its_own_parts_and_hard_negatives(tmp_path):
    path = beir(tmp_path / "b", {"train": range(3), "dev": [3], "test": [4, 5]})
    data = build(RankingDataConfig, {"source": "beir", "path": str(path), "negatives": {"bm25": 2, "random": 1}})
    split, counts = read_requests(data)
    assert [len(part) for part in split[:3]] == [3, 1, 2] and counts["straddling_requests"] == 0
    request = split.test[0]
    assert request.query == "about lime tree" and [c.label for c in request.candidates] == [True, False, False, False]
    assert request.candidates[0].item == {"title": "lime", "text": "the lime tree"}
    assert len({c.item_id for c in request.candidates}) == 4
    config = build(
        RankTrainConfig, {"student": {"model": "tiny-student"}, "data": {"source": "beir", "path": str(path)}}
    )
    assert (
        write_request(request, config.features).prefix == "Is the item relevant to the query?\nQuery: about lime tree\n"
    )


def test_beir_without_a_training_part_holds_out_whole_queries(tmp_path):
    path = beir(tmp_path / "b", {"test": range(6)})
    tree = {"source": "beir", "path": str(path), "split": {"validation_fraction": 0.3, "test_fraction": 0.3, "seed": 1}}
    split, _ = read_requests(build(RankingDataConfig, tree))
    assert sum(map(len, split[:3])) == 6 and not {r.query for r in split.train} & {r.query for r in split.test}
    (path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnone\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv: none has no text"):
        read_search("beir", path, NONE)


def test_trec_runs_are_the_candidates_and_their_scores_the_teacher(tmp_path):
    path = tmp_path / "t"
    json_lines(path / "corpus.jsonl", [{"docid": f"d{n}", "text": f"text {n}"} for n in range(4)])
    (path / "queries.tsv").write_text("1\twhat\n2\twho\n")
    (path / "qrels.txt").write_text("1 0 d0 2\n1 0 d1 0\n2 0 d3 1\n")
    (path / "run.bm25").write_text("1 Q0 d1 1 9.5 x\n1 Q0 d0 2 9 x\n2 Q0 d3 1 4 x\n2 Q0 d2 2 3 x\n")
    log, _ = read_search("trec", path, NONE)
    assert log.grade.tolist() == [0, 2, 1, 0] and log.teacher.tolist() == [9.5, 9, 4, 3]
    (path / "run.bm25").write_text("1 d1 9.5\n")
    with pytest.raises(DataError, match=r"run\.bm25:1: expected query Q0 document rank score tag"):
        read_search("trec", path, NONE)


def test_letor_features_are_numbers_for_bins(tmp_path):
    lines = [f"{n % 3} qid:{n // 5} 1:{n * 0.5} 2:{n % 2} #docid = G{n}" for n in range(60)]
    (tmp_path / "l.txt").write_text("\n".join(lines) + "\n")
    split, _ = read_requests(
        build(RankingDataConfig, {"source": "letor", "path": str(tmp_path / "l.txt"), "bins": {"*": 4}})
    )
    candidate = split.train[0].candidates[0]
    assert set(candidate.item) == {"f1", "f2"} and candidate.item["f1"][0] == "b" and candidate.item_id[0] == "G"
    assert sum(len(part) for part in split[:3]) == 12
    (tmp_path / "l.txt").write_text("1 1:0.5\n")
    with pytest.raises(DataError, match="expected LABEL qid:ID"):
        read_search("letor", tmp_path / "l.txt", NONE)
