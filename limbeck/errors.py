"""What limbeck raises. Each class is also the standard one that it refines.

    LimbeckError
    ├── ConfigError (ValueError)         a recipe or a flag asks for what cannot work
    ├── TraceFormatError (ValueError)    a trace file or a record in it is malformed
    ├── DataError (ValueError)           a ranking data set or a record in it is malformed, or leaks its labels
    ├── TemplateError (ValueError)       a tokenizer or its chat template cannot carry a trace
    ├── ModelError (ValueError)          a model directory is missing, damaged or of an unsupported kind
    ├── CheckpointError (ValueError)     an output directory or its manifest is missing, damaged or foreign
    ├── PairError (ValueError)           teacher and student do not fit together
    ├── CompressionError (ValueError)    a layer cannot be pruned, quantised or exported as asked
    └── ShapeError (ValueError)          tensors do not fit together

A message says where, what was found, what is accepted and what to do. The command line prints it as one line and
exits with code 2; `--debug` shows the stack.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """Base of everything that a user can cause and mend."""


class ConfigError(LimbeckError, ValueError):
    """A recipe or a flag asks for what cannot work."""


class TraceFormatError(LimbeckError, ValueError):
    """A trace file, or a record in it, is malformed."""


class DataError(LimbeckError, ValueError):
    """A ranking data set, or a record in it, is malformed, or its history knows its labels."""


class TemplateError(LimbeckError, ValueError):
    """A tokenizer, or its chat template, cannot carry a trace."""


class ModelError(LimbeckError, ValueError):
    """A model directory is missing, damaged or of an unsupported kind."""


class CheckpointError(LimbeckError, ValueError):
    """An output directory, or its manifest, is missing, damaged or foreign."""


class PairError(LimbeckError, ValueError):
    """Teacher and student do not fit together."""


class CompressionError(LimbeckError, ValueError):
    """A layer, or a model, cannot be pruned, quantised or exported as asked."""


class ShapeError(LimbeckError, ValueError):
    """Tensors do not fit together."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}" if names else "none is known here"
