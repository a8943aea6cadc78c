"""A log whose size does not follow from what clients do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

RECORDS_A_MINUTE = 60
CHARACTERS = 4000
"""Of a record, its stack included."""


class Bounded(logging.Filter):
    """Passes on so many records a minute, and then how many it has kept back."""

    def __init__(self, most: int = RECORDS_A_MINUTE) -> None:
        super().__init__()
        self._most, self._minute, self._seen = most, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            kept_back = self._seen - self._most
            self._minute, self._seen = minute, 0
            if kept_back > 0:
                record.msg, record.args = f"({kept_back} records were kept back) {record.getMessage()}", ()
        self._seen += 1
        return self._seen <= self._most


class Short(logging.Formatter):
    """Cuts a record to CHARACTERS."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"


@contextmanager
def bounded_logs() -> Iterator[None]:
    """All records go to standard error, so bounded."""
    handler = logging.StreamHandler()
    handler.setFormatter(Short("%(levelname)s: %(name)s: %(message)s"))
    handler.addFilter(Bounded())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
