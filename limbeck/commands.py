"""The commands: where each is defined, and what it does in a line. Nothing is imported until a command is asked for."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from limbeck.errors import ConfigError, nearest
from limbeck.stage import Stage, View


class Command(NamedTuple):
    """A row of the table."""

    place: str
    """MODULE:NAME of its `Stage` or `View`, below limbeck."""
    help: str

    def load(self) -> Stage | View:
        """The command itself."""
        module, _, name = self.place.partition(":")
        found: Any = getattr(importlib.import_module(f"limbeck.{module}"), name)
        return found


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "demo:DEMO",
        "the main job on the built-in models, offline: traces, truncation sweep, compression, report",
    ),
    "traces import": Command("traces.commands:IMPORT", "read traces of any format into one JSONL file"),
    "traces generate": Command(
        "traces.commands:GENERATE", "sample traces from a model or a server; started again, it goes on"
    ),
    "traces verify": Command(
        "evaluate.commands:VERIFY", "check answers, then filter by pass rate, length and overlap with test sets"
    ),
    "traces complete": Command(
        "evaluate.commands:COMPLETE", "cut traces, let a student finish them, keep what is right; resumable"
    ),
    "traces show": Command("traces.commands:SHOW", "print traces with their segments, weights and cut"),
    "traces stats": Command("traces.commands:STATS", "count segments, and what a cut would lose"),
    "teacher cache": Command(
        "distill.commands:CACHE",
        "store what a teacher says about traces, for every run that reads them; goes on where it was stopped",
    ),
    "teacher stats": Command("teacher.commands:STATS", "what a teacher cache holds, costs and loses"),
    "teacher verify": Command("teacher.commands:VERIFY", "read every byte of a cache, name what is damaged"),
    "teacher export": Command(
        "teacher.commands:EXPORT", "write a cache's targets as columns that axolotl, DistillKit or anybody reads"
    ),
    "teacher import": Command("teacher.commands:IMPORT", "make a cache of such columns"),
    "traces probe": Command(
        "traces.commands:PROBE", "find where a teacher already knows the answer, for truncation.policy probed"
    ),
    "traces advise": Command(
        "sweep.commands:ADVISE_CUT", "say whether traces may be cut, how far, and what that keeps, from one look"
    ),
    "distill": Command("distill.commands:DISTILL", "train one student"),
    "sweep": Command("sweep.commands:SWEEP", "train many students over a grid, one report"),
    "plan": Command(
        "scale.commands:PLAN", "say whether a recipe fits on given devices, with which settings, and how long it takes"
    ),
    "advise": Command(
        "scale.commands:ADVISE",
        "say which number format and which cut suit a machine and a workload, and what they save",
    ),
    "evaluate": Command("evaluate.commands:EVALUATE", "score a model on problems, with intervals"),
    "evaluate show": Command(
        "evaluate.commands:SHOW", "print what a scored model was asked, wrote and how it was judged, wrong ones first"
    ),
    "moments": Command(
        "compress.commands:MOMENTS",
        "collect what prune and quantize need of a model's layers, once for any number of solvers",
    ),
    "prune": Command("compress.commands:PRUNE", "remove layers, neurons, KV groups or single weights"),
    "recover": Command("compress.commands:RECOVER", "prune and train in turns, or once, to a smaller model"),
    "export": Command(
        "compress.commands:EXPORT",
        "write a model for vLLM, llama.cpp or plain transformers, and prove that it loads",
    ),
    "quantize": Command("compress.commands:QUANTIZE", "round weights to few bits, for transformers, vLLM and SGLang"),
    "rank train": Command(
        "ranking.commands:TRAIN", "train a scorer of candidates by one token, on labels or by distillation"
    ),
    "rank cache": Command("ranking.commands:CACHE", "store what a teacher says behind the pairs of a ranking run"),
    "rank show": Command("ranking.commands:SHOW", "print requests as a scorer reads them: tokens, border, labels"),
    "rank recover": Command(
        "ranking.commands:RECOVER", "prune a scorer and distil it in turns, AUC beside size after every step"
    ),
    "rank evaluate": Command(
        "ranking.commands:EVALUATE",
        "score candidates with a model: AUC, NDCG, log-loss and calibration with intervals",
    ),
    "serve": Command(
        "serve.commands:SERVE",
        "answer HTTP requests: scoring, ranking and generation, in OpenAI's, Cohere's, vLLM's and SGLang's shapes",
    ),
    "bench serve": Command(
        "serve.commands:BENCH", "measure a server under Poisson load: latency, throughput and what is served in time"
    ),
    "pipeline": Command(
        "pipeline.commands:PIPELINE",
        "traces to a served model, or teacher to quantised scorer, in one recipe; stages skipped when nothing changed",
    ),
    "doctor": Command("doctor:DOCTOR", "look at this machine, test its numerics, say what to do"),
    "report": Command("report.commands:REPORT", "one page from sweeps, runs and compressed models"),
}


_MOVED = {"rank pipeline": "`limbeck pipeline` does it: write the recipe's fields below `ranking:`"}
"""Commands of older versions, and what does their work."""


def named(words: list[str]) -> tuple[str, list[str]]:
    """The command that a line begins with, and the rest of the line.

    Raises: ConfigError, with the nearest command.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
        if name in _MOVED:
            raise ConfigError(f"no such command {name!r}; {_MOVED[name]}.")
    asked = " ".join(word for word in words[:2] if not word.startswith("-"))
    raise ConfigError(f"no such command {asked or words[0]!r}; {nearest(asked, COMMANDS)}")
