"""Data sets that the `datasets` library reads: directories that it saved, and the Hugging Face hub.

The hub is the only thing in the trace stages that reaches the network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.traces.directory import choose_split
from limbeck.traces.files import Located, kind_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_saved_dataset(directory: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this directory."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_hub_id(source: str) -> bool:
    """Whether `source`, which is no path, is `owner/name`; with a folder as owner it is a mistyped path."""
    if not _HUB_ID.fullmatch(source) or kind_of(Path(source)) is not None:
        return False
    return not Path(source).parent.is_dir()


def read_saved(directory: Path, split: str | None, subset: str | None) -> Iterator[Located]:
    """The rows of a saved data set."""
    if subset is not None:
        raise TraceFormatError(f"{directory}: there is no subset {subset!r}; a saved data set has none, leave it out.")
    # Imported here because it loads pandas and takes a second, which every other source is spared.
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise TraceFormatError(f"{directory}: damaged or empty data set: {_one_line(error)}; save it anew.") from error
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[choose_split(sorted(saved), split, str(directory))]
    elif split is not None and str(saved.split) != split:
        raise TraceFormatError(f"{directory}: there is no split {split!r}; the data set is saved without splits.")
    yield from _rows(saved, str(directory))


def read_hub(name: str, subset: str | None, split: str | None) -> Iterator[Located]:
    """The rows of one split of a hub data set, `train` by default, from the cache or the network."""
    import datasets

    # The hub client logs a line for each of its retries; one error at the end says the same.
    client_log = logging.getLogger("huggingface_hub")
    level = client_log.level
    client_log.setLevel(logging.ERROR)
    try:
        dataset = datasets.load_dataset(name, name=subset, split=split or "train")
    except Exception as error:
        raise TraceFormatError(
            f"{name}: no such file or directory, and it cannot be read from the Hugging Face hub "
            f"({type(error).__name__}: {_one_line(error)}); give a path, or check id, split and connection."
        ) from error
    finally:
        client_log.setLevel(level)
    yield from _rows(dataset, name)


def _rows(dataset: Any, where: str) -> Iterator[Located]:
    if not len(dataset):
        raise TraceFormatError(f"{where}: the data set holds no rows.")
    for number in range(len(dataset)):
        try:
            row = dataset[number]
        except Exception as error:
            raise TraceFormatError(f"{where}:row {number + 1}: unreadable: {_one_line(error)}.") from error
        yield Located(f"{where}:row {number + 1}", row)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
