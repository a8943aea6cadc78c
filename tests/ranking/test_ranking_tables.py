"""Tables as they are: features of a row's own moment, any order of rows, encodings, grades, weights, parts, caches."""

import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ConfigError, DataError
from limbeck.ranking import tables
from limbeck.ranking.bins import with_bins
from limbeck.ranking.data import RankingDataConfig, read_requests
from limbeck.ranking.featurize import FeaturizeConfig, write_request
from limbeck.ranking.request import GroupingConfig, group_log
from limbeck.ranking.split import SplitConfig, split_requests
from limbeck.ranking.tables import FieldsConfig, read_table

FIELDS = FieldsConfig(
    member_id="guest",
    item_id="dish",
    label="eaten",
    time="at",
    request_id="visit",
    query="wish",
    context={"table": "table"},
    member={"visits": "visits so far"},
    item={"name": "name"},
)
ROWS = [
    ("a", "v1", "soup", "1", "0", "d1", "window", "Leek soup"),
    ("a", "v1", "soup", "0", "1", "d2", "window", "Rye bread"),
    ("a", "v2", "cake", "1", "5", "d2", "garden", "Rye bread"),
    ("a", "v2", "cake", "0", "5", "d3", "garden", "Plum cake"),
]
HEADER = "guest,visit,wish,eaten,visits,dish,table,name,at"


def lines(rows=ROWS):
    return [",".join([*row, str(10 + int(row[1][1]))]) for row in rows]


def written(tmp_path, body, name="log.csv", encoding="utf-8", header=HEADER):
    path = tmp_path / name
    path.write_bytes("\n".join([header, *body, ""]).encode(encoding))
    return path


def requests_of(path, fields=FIELDS, **grouping):
    log, members = read_table(path, fields)
    return group_log(log, members, GroupingConfig(**grouping))[0]


def test_a_request_reads_the_query_member_and_context_of_its_own_rows(tmp_path):
    first, second = requests_of(written(tmp_path, lines()), history=2)
    assert (first.query, second.query) == ("soup", "cake")
    assert (first.context, second.context) == ({"table": "window"}, {"table": "garden"})
    assert second.member == {"visits so far": "5"} and [e.item_id for e in second.history] == ["d1", "d2"]
    # Its rows count 0 and then 1 visit: the later row knows what the first one's label was.
    assert first.member == {"visits so far": "0"}
    features = FeaturizeConfig(prefix="{query}|{context}|{member}|{history}\n")
    assert write_request(second, features).prefix.startswith("cake|table: garden|visits so far: 5|")


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_rows_of_a_file_changes_nothing(tmp_path_factory, seed):
    directory = tmp_path_factory.mktemp("orders")
    rng = random.Random(seed)
    rows = [
        (f"g{n // 9}", f"v{n // 3}", "w", str(rng.randrange(2)), str(rng.randrange(9)), f"d{n}", "t", "x")
        for n in range(24)
    ]
    shuffled = rng.sample(rows, len(rows))
    one, other = (
        sorted(requests_of(written(directory, lines(some), f"{name}.csv"), history=3), key=lambda r: r.request_id)
        for name, some in (("one", rows), ("other", shuffled))
    )
    assert one == other


def test_a_request_with_two_queries_is_refused_when_it_is_split(tmp_path):
    rows = [*ROWS, ("a", "v2", "tea", "0", "5", "d4", "garden", "Mint tea")]
    path = written(tmp_path, [*lines(rows), *lines([("b", "v9", "x", "1", "0", "d1", "t", "n")] * 2)])
    config = RankingDataConfig(
        source="table", path=path, fields=FIELDS, split=SplitConfig(validation_fraction=0, test_fraction=0.4)
    )
    with pytest.raises(DataError, match="request v2: its rows have several queries"):
        read_requests(config)


def test_other_encodings_when_they_are_named(tmp_path):
    rows = [(*row[:-1], "Crème brûlée") for row in ROWS]
    path = written(tmp_path, lines(rows), encoding="cp1252")
    with pytest.raises(DataError, match=r"row 1: name is not UTF-8; set fields\.encoding"):
        requests_of(path)
    fields = FieldsConfig(**{n: getattr(FIELDS, n) for n in FIELDS.__dataclass_fields__} | {"encoding": "cp1252"})
    assert requests_of(path, fields)[0].candidates[0].item == {"name": "Crème brûlée"}
    with pytest.raises(ConfigError, match="unknown 'klingon'"):
        FieldsConfig(item={"a": "a"}, encoding="klingon")


def test_grades_weights_and_scores_of_another_model(tmp_path):
    header = "member_id,item_id,label,time,stars,weight,other"
    fields = FieldsConfig(item={"item_id": "id"}, grade="stars", weight="weight", teacher="other")
    body = ["m,i,1,0,3,0.5,-1.25", "m,j,0,0,0,2,4"]
    (request,) = requests_of(written(tmp_path, body, header=header), fields, min_history=0)
    assert [(c.grade, c.weight, c.teacher) for c in request.candidates] == [(3.0, 0.5, -1.25), (0.0, 2.0, 4.0)]
    for bad, match in (
        ("m,k,1,0,-1,1,0", "stars is -1; expected a number of at least 0"),
        ("m,k,1,0,1,0,0", "weight is 0"),
    ):
        with pytest.raises(DataError, match=f"row 3: {match}"):
            requests_of(written(tmp_path, [*body, bad], header=header), fields)


def test_times_with_zones_and_without(tmp_path):
    header, fields = "member_id,item_id,label,time", FieldsConfig(item={"item_id": "id"})
    for texts in (
        ["1970-01-01", "1970-01-02"],
        ["1970-01-01T00:00:00", "1970-01-02 00:00:00"],
        ["1970-01-01T02:00:00+02:00", "1970-01-02T00:00:00Z"],
        ["0", "86400.0"],
    ):
        body = [f"m,{n},1,{text}" for n, text in enumerate(texts)]
        assert read_table(written(tmp_path, body, header=header), fields)[0].time.tolist() == [0.0, 86400.0]


def test_a_directory_of_parquet_parts_is_one_log(tmp_path):
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        records = [dict(zip(HEADER.split(","), line.split(","), strict=True)) for line in lines(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / f"part-{number}.parquet")
    found = requests_of(tmp_path, history=2)
    assert list(found) == list(requests_of(written(tmp_path / "..", lines(), "whole.csv"), history=2))


def test_the_parsed_form_of_a_large_file_is_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "_CACHED_BYTES", 1)
    monkeypatch.setattr(tables, "_UNIFIED_BLOCKS", 2)
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 120)
    path = written(tmp_path, lines([(f"g{n}", "v1", "w", "1", "0", f"d{n}", "t", f"n{n}") for n in range(40)]))
    first, _ = read_table(path, FIELDS)
    (kept,) = (tmp_path / "cache/limbeck/tables").glob("*.parquet")
    monkeypatch.setattr(tables, "parse", None)
    again, _ = read_table(path, FIELDS)
    assert list(again) == list(first) and len(first) == 40
    kept.unlink()
    with pytest.raises(TypeError):
        read_table(path, FIELDS)


def test_whole_members_or_queries_are_held_out(tmp_path):
    rows = [
        (f"g{n // 2 % 12}", f"v{n // 2}", f"w{n // 2 % 15}", str(n % 2), "0", f"d{n % 7}", "t", "x") for n in range(240)
    ]
    found = requests_of(written(tmp_path, lines(rows)), history=1)
    for by, name in (("member", "member_id"), ("query", "query")):
        split = split_requests(found, SplitConfig(by=by, validation_fraction=0.25, test_fraction=0.25))
        groups = [{getattr(request, name) for request in part} for part in split[:3]]
        assert all(groups) and not groups[0] & groups[1] and not (groups[0] | groups[1]) & groups[2]
        assert sum(map(len, split[:3])) == len(found) and split.straddling == 0


def test_numbers_become_bins_of_equal_shares(tmp_path):
    rows = [("a", f"v{n // 2}", f"w{n // 2}", str(n % 2), str(n), f"d{n}", "t", str(n**2)) for n in range(80)]
    found = requests_of(written(tmp_path, lines(rows)), min_history=0)
    split = split_requests(found, SplitConfig(by="query", validation_fraction=0.1, test_fraction=0.2))
    binned = with_bins(split, {"name": 4})
    values, words = (
        [[candidate.item["name"] for request in part for candidate in request.candidates] for part in parts[:3]]
        for parts in (split, binned)
    )
    assert sorted(set(words[0])) == ["b0", "b1", "b2", "b3"]
    assert np.ptp([words[0].count(word) for word in set(words[0])]) <= 2
    for numbers, names in zip(values, words, strict=True):
        assert [name for _, name in sorted(zip(map(int, numbers), names, strict=True))] == sorted(names)
    with pytest.raises(ConfigError, match="no feature 'size'"):
        with_bins(split, {"size": 3})
    with pytest.raises(DataError, match="table is 't' in a row"):
        with_bins(split, {"table": 3})
