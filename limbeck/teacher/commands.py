"""The commands that look at a teacher cache."""

from __future__ import annotations

from pathlib import Path

from limbeck.config import checked
from limbeck.stage import View
from limbeck.teacher import build


@checked
class CacheDirectoryConfig:
    """A finished teacher cache."""

    cache: Path
    """Its directory."""


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
