"""The commands that look at a teacher cache, or exchange one with other trainers."""

from __future__ import annotations

from pathlib import Path

from limbeck.config import checked
from limbeck.stage import Stage, View
from limbeck.teacher import build, exchange


@checked
class CacheDirectoryConfig:
    """A finished teacher cache."""

    cache: Path
    """Its directory."""


EXPORT = Stage(name="teacher export", config=exchange.ExportCacheConfig, run=exchange.export_cache, subject="cache")
IMPORT = Stage(name="teacher import", config=exchange.ImportCacheConfig, run=exchange.import_cache, subject="source")
STATS = View(
    name="teacher stats",
    config=CacheDirectoryConfig,
    run=lambda config: build.stats(config.cache),
    subject="cache",
)
VERIFY = View(
    name="teacher verify",
    config=CacheDirectoryConfig,
    run=lambda config: build.verify(config.cache),
    subject="cache",
)
