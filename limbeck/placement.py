"""Which device and number format a command is to compute with: asked for here, resolved by `models.placement`.

Asked for by `--device` and `--dtype`, by the keywords of the same names, or by LIMBECK_DEVICE and LIMBECK_DTYPE, in
this order. What is asked holds for a command and for the processes that it starts (`runner`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from limbeck.errors import ConfigError, nearest

DTYPES = ("auto", "float32", "bf16")


class Asked(NamedTuple):
    """What is asked for; both may be auto."""

    device: str
    """auto, cpu, cuda or cuda:N."""
    dtype: str
    """Of models that are not trained and of training's products: auto, float32 or bf16."""


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)
_found: dict[str, Any] = {}


def asked() -> Asked:
    """What holds now.

    Raises: ConfigError for a value that is none of those accepted.
    """
    return _asked.get() or Asked(
        _device(os.environ.get("LIMBECK_DEVICE", "auto"), "LIMBECK_DEVICE"),
        _dtype(os.environ.get("LIMBECK_DTYPE", "auto"), "LIMBECK_DTYPE"),
    )


@contextmanager
def asking(device: str | None = None, dtype: str | None = None) -> Iterator[None]:
    """Ask for a device and a number format within the block; None leaves what holds.

    Raises: ConfigError for a value that is none of those accepted.
    """
    before = asked()
    token = _asked.set(
        Asked(
            before.device if device is None else _device(device, "--device"),
            before.dtype if dtype is None else _dtype(dtype, "--dtype"),
        )
    )
    try:
        yield
    finally:
        _asked.reset(token)


def note(facts: dict[str, Any]) -> None:
    """Remember what was found, for the manifests of this process."""
    _found.clear()
    _found.update(facts)


def found() -> dict[str, Any]:
    """What the models of this process compute with; empty where none was loaded."""
    return dict(_found)


def _device(text: str, where: str) -> str:
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"{where} {text!r}: takes auto, cpu, cuda or cuda:N.")
    return text


def _dtype(text: str, where: str) -> str:
    if text not in DTYPES:
        raise ConfigError(f"{where} {text!r}: takes {', '.join(DTYPES)}; {nearest(text, DTYPES)}")
    return text
