"""What a function of the library changes of its process, it puts back."""

import logging
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
import transformers

import limbeck
from limbeck.models.load import load_model

CHAIN = {"source": "builtin:chain", "num_traces": 8, "chain_min_steps": 1, "chain_max_steps": 2}
TRAINED = {"traces": CHAIN, "training": {"max_steps": 1, "num_threads": 1}, "num_validation": 2}
CALLS = {
    "import_traces": lambda out: limbeck.import_traces(traces=CHAIN, out=out),
    "count_traces": lambda _: limbeck.count_traces(traces=CHAIN, tokenizer="tiny-student"),
    "distill": lambda out: limbeck.distill("tiny-student", teacher="tiny-teacher", **TRAINED, out=out),
    "cache_teacher": lambda out: limbeck.cache_teacher("tiny-teacher", traces=CHAIN, out=out),
    "sweep": lambda out: limbeck.sweep(
        distill={"student": "tiny-student", "traces": CHAIN, "training": {"max_steps": 1}, "num_validation": 2},
        problems=CHAIN | {"seed": 1_000_001, "num_traces": 2},
        grid={"lead_fraction": [0.5]},
        evaluate={"max_new_tokens": 2},
        out=out,
    ),
    "evaluate": lambda out: limbeck.evaluate("tiny-student", problems=CHAIN, max_new_tokens=2, out=out),
    "prune": lambda out: limbeck.prune("tiny-student", neuron_sparsity=0.5, out=out),
    "quantize": lambda out: limbeck.quantize("tiny-student", scheme="w8a8", out=out),
    "recover": lambda out: limbeck.recover(
        prune={"model": "tiny-student", "neuron_sparsity": 0.5},
        distill={"student": "tiny-student", "traces": CHAIN, "training": {"max_steps": 1}, "num_validation": 2},
        out=out,
    ),
    "export": lambda out: limbeck.export("tiny-student", format="dense", out=out),
    "advise": lambda _: limbeck.advise("qwen3-8b", hardware="h100"),
    "plan": lambda _: limbeck.plan(
        distill={"student": "qwen3-4b", "teacher": "qwen3-8b", "traces": "unread"}, assume={"count": 100}
    ),
    "load": lambda _: limbeck.load("tiny-student"),
}
LONG = ("sweep", "recover", "plan", "count_traces")


def process_state():
    logger = logging.getLogger()
    return {
        "arguments": list(sys.argv),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hooks": (sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "threads": torch.get_num_threads(),
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of numpy": repr(np.random.get_state()),  # noqa: NPY002
        "random numbers of Python": random.getstate(),
        "defaults of torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        ),
        "logging": (logger.level, list(logger.handlers), logging.root.manager.disable),
        "messages of transformers": (
            transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
        ),
    }


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in CALLS]
)
def test_a_function_leaves_the_process_as_it_was(name, two_threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_model("tiny-student")  # what libraries set when they are imported is theirs
    before = process_state()
    CALLS[name](tmp_path / "out")
    after = process_state()
    assert [what for what in before if before[what] != after[what]] == []
    assert (tmp_path / "out").exists() or name in ("count_traces", "advise", "plan", "load")
