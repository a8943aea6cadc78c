"""Distil a large reasoning model into a small, fast one and see what every saving costs.

Example:
    import limbeck

    student = limbeck.distill("tiny-student", traces="builtin:chain", num_traces=20, max_steps=2, out="runs/a")
    small = limbeck.prune(student, neuron_sparsity=0.5, out="runs/b")
    small.metrics

Every command is a function; `limbeck.traces`, `limbeck.distill`, `limbeck.compress`, `limbeck.optim` and the other
packages hold the pieces. Nothing is imported before it is used.
"""

import importlib
import os
import pathlib
from typing import Any

from limbeck.errors import (
    CheckpointError,
    CompressionError,
    ConfigError,
    DataError,
    LimbeckError,
    ModelError,
    PairError,
    ShapeError,
    TemplateError,
    TraceFormatError,
)
from limbeck.version import __version__

# MKL's products depend on where in memory their operands happen to lie, and with several threads that depends on which
# thread does what. Asked for reproducible results, it takes the same path wherever they lie; that costs no time
# (within 2 % on the sizes of smollm2). It is read at the first product, so it stands here.
os.environ.setdefault("MKL_CBWR", "AUTO")


_PACKAGES = (
    "compress",
    "cost",
    "distill",
    "engine",
    "evaluate",
    "models",
    "optim",
    "pipeline",
    "ranking",
    "report",
    "scale",
    "serve",
    "sweep",
    "teacher",
    "traces",
)
_FUNCTIONS = (
    "advise",
    "advise_cut",
    "bench_server",
    "cache_ranker",
    "cache_teacher",
    "complete_traces",
    "count_traces",
    "demo",
    "describe_teacher_cache",
    "doctor",
    "evaluate_ranker",
    "export",
    "export_teacher_cache",
    "generate_traces",
    "import_teacher_cache",
    "import_traces",
    "moments",
    "plan",
    "probe_traces",
    "prune",
    "quantize",
    "recover",
    "recover_ranker",
    "show_evaluation",
    "show_ranking",
    "show_traces",
    "train_ranker",
    "verify_teacher_cache",
    "verify_traces",
)
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CompressionError",
    "ConfigError",
    "DataError",
    "LimbeckError",
    "ModelError",
    "PairError",
    "ShapeError",
    "TemplateError",
    "TraceFormatError",
    "__version__",
    "load",
    *_FUNCTIONS,
    *_PACKAGES,
]


def load(model: Any) -> tuple[Any, Any]:
    """A transformers model and its tokenizer, by directory, alias, hub id or checkpoint."""
    return __getattr__("Checkpoint")(pathlib.Path(model)).load()


def __getattr__(name: str) -> Any:
    if name in (*_PACKAGES, "demo", "doctor"):
        return importlib.import_module(f"limbeck.{name}")
    if name == "Checkpoint":
        found: Any = importlib.import_module("limbeck.checkpoint").Checkpoint
    elif name in _FUNCTIONS:
        library = importlib.import_module("limbeck.library")
        found = library.function_of(library.FUNCTIONS[name])
    else:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
