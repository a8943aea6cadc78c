"""Inputs on object stores: an address (s3://, gs://, hf://, memory://, what fsspec knows) becomes a local copy.

Copies lie below ~/.cache/limbeck/stores, under the hash of the address and of what the store says of its
files, so that an object that has changed is copied anew, and none twice: of processes that want the same, one copies.
Within a process an address stays what it was first. fsspec comes with torch.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from limbeck.config import is_address
from limbeck.errors import ConfigError
from limbeck.progress import say


def cache_directory(kind: str) -> Path:
    """~/.cache/limbeck/KIND, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / kind


def local_path(name: str, suffixes: tuple[str, ...] = ()) -> Path:
    """The path that a name is, or the copy of what an address names.

    Args:
      suffixes: what names of files end with that are copied of a directory; empty for all.
    Raises: ConfigError for an address that cannot be read, or where nothing is.
    """
    return _copied(name, suffixes) if is_address(name) else Path(name)


@functools.cache
def _copied(address: str, suffixes: tuple[str, ...]) -> Path:
    try:
        store, path = url_to_fs(address)
        path = path.rstrip("/")
        found = {path: store.info(path)} if store.isfile(path) else store.find(path, detail=True)
        wanted = {name: info for name, info in found.items() if name == path or name.endswith(suffixes or ("",))}
        if not wanted:
            raise FileNotFoundError("nothing is there" if not found else f"no file ends with {', '.join(suffixes)}")
        return _fetched(address, store, path, wanted)
    except Exception as error:  # each store has its own kinds; all mean that there is no input
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{address}: cannot be read ({what}); check name, rights and that fsspec's package for the store is "
            "installed (s3fs, gcsfs, adlfs), or copy it here."
        ) from error


def _fetched(address: str, store: Any, path: str, wanted: Mapping[str, Any]) -> Path:
    """The copy of these files, made where there is none; a file keeps its name, a directory its layout."""
    version = "".join(f"{name} {sorted(info.items(), key=str)}\n" for name, info in sorted(wanted.items()))
    key = hashlib.sha256(f"{address}\n{version}".encode()).hexdigest()[:16]
    cache = cache_directory("stores")
    target = cache / key / (path.rpartition("/")[2] or "store")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        megabytes = sum(info.get("size") or 0 for info in wanted.values()) / 1e6
        say(f"copying {address} ({len(wanted)} files, {megabytes:,.1f} MB) to {target}")
        partial = cache / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for name in sorted(wanted):
            place = partial / target.name / name.removeprefix(path).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, str(place))
        partial.rename(target.parent)
    return target
