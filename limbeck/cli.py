"""The command line: a table from command to stage. Flags are the fields of the stage's config.

    limbeck COMMAND [RECIPE.yaml] [--out DIR] [--overwrite] [--resume] [--field value ...]

A user's mistake is one line on the console and exit code 2; `--debug` shows the stack.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from rich.console import Console
from rich.table import Table

from limbeck import __version__, demo
from limbeck.compress import moments, recover
from limbeck.compress.export import stage as export
from limbeck.compress.prune import stage as prune
from limbeck.compress.quantize import stage as quantize
from limbeck.config import build
from limbeck.distill import caching
from limbeck.distill import train as distill
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError, LimbeckError, nearest
from limbeck.evaluate import stage as evaluate
from limbeck.evaluate import verify
from limbeck.flags import FieldInfo, apply_flags, describe
from limbeck.pipeline import command as pipeline
from limbeck.pipeline import ranking as rank_pipeline
from limbeck.pipeline.config import PipelineConfig
from limbeck.progress import console
from limbeck.ranking import evaluate as rank_evaluate
from limbeck.ranking import recover as rank_recover
from limbeck.ranking import train as rank_train
from limbeck.report import page as report
from limbeck.runner.place import Place
from limbeck.scale import command as predict
from limbeck.scale.advise import AdviseConfig
from limbeck.scale.planner import PlanConfig
from limbeck.scale.stages import predict_recover
from limbeck.scale.training import predict_distill
from limbeck.serve import bench as bench_serve
from limbeck.serve import command as serve
from limbeck.serve.config import ServeConfig
from limbeck.sweep import execute as sweep
from limbeck.sweep.plan import SweepConfig
from limbeck.sweep.predict import predict_sweep
from limbeck.teacher import build as cache
from limbeck.traces import generation, importing, probe, show, stats
from limbeck.yaml_values import read_recipe

OPTIONS = {
    "--out": "directory to write; default runs/COMMAND",
    "--overwrite": "replace an existing output",
    "--resume": "go on with an interrupted run",
    "--dry-run": "estimate time and memory, start nothing",
    "--on": "where the parts of the job run: local (default), or ray (the cluster of RAY_ADDRESS, else these cores)",
    "--json": "print the result as JSON",
    "--debug": "show the stack of an error",
    "--help": "this text",
}


HELP_COLUMN = 26
"""Where the texts of `--help` begin."""

LIMITED = ("--out", "--overwrite", "--resume", "--dry-run", "--on")
"""Options that not every command takes."""


class Options(NamedTuple):
    """What is no field of a config."""

    out: Path
    overwrite: bool
    resume: bool
    dry_run: bool
    json: bool
    on: Place


class Command(NamedTuple):
    """One row of the table."""

    config: type | None
    """Its fields are the flags; None when the command takes paths."""
    call: Callable[[Any, Options], Any]
    help: str
    takes: tuple[str, ...] = ("--out", "--overwrite")
    """Which of LIMITED mean something here; the others are refused."""
    subject: str | None = None
    """Field that a first argument without a flag sets, unless it is a recipe."""


def _distill(config: DistillConfig, options: Options) -> dict[str, Any] | None:
    if options.dry_run:
        return predict.dry_run(lambda hardware: [predict_distill(config, hardware=hardware)], quiet=options.json)
    checkpoint = distill.run(config, None, options.out, overwrite=options.overwrite, resume=options.resume)
    manifest = checkpoint.manifest
    return {
        "out": str(options.out),
        **manifest["metrics"],
        "train_seconds": manifest["ledger"]["train_seconds"],
    }


def _evaluate(config: evaluate.EvaluateStageConfig, options: Options) -> dict[str, Any]:
    return evaluate.run(config, None, options.out, overwrite=options.overwrite)


def _export(config: export.ExportConfig, options: Options) -> dict[str, Any]:
    return export.run(config, options.out, overwrite=options.overwrite)


def _sweep(config: SweepConfig, options: Options) -> dict[str, Any] | None:
    if options.dry_run:
        return predict.dry_run(lambda hardware: predict_sweep(config, hardware), quiet=options.json)
    summary = sweep.run(config, options.out, options.on)
    page = report.run([options.out], options.out)
    return {"out": str(options.out), "report": str(page), "runs": len(summary["runs"])}


def _recover(config: recover.RecoverConfig, options: Options) -> dict[str, Any] | None:
    if options.dry_run:
        return predict.dry_run(lambda hardware: [predict_recover(config, hardware=hardware)], quiet=options.json)
    return recover.run(config, options.out, overwrite=options.overwrite, resume=options.resume)


def _rank_pipeline(config: rank_pipeline.RankPipelineConfig, options: Options) -> dict[str, Any]:
    table = rank_pipeline.run(config, options.out)
    return {**table, "report": str(report.run([options.out], options.out))}


def _report(paths: Sequence[str], options: Options) -> dict[str, Any]:
    if not paths:
        raise ConfigError("limbeck report: name at least one sweep or run directory.")
    return {"report": str(report.run([Path(path) for path in paths], options.out))}


def _on_cache(call: Callable[[Path], dict[str, Any]]) -> Callable[[Sequence[str], Options], dict[str, Any]]:
    def on_one(paths: Sequence[str], _: Options) -> dict[str, Any]:
        if len(paths) != 1:
            raise ConfigError("limbeck teacher: name one cache directory.")
        return call(Path(paths[0]))

    return on_one


def _probe(config: probe.ProbeConfig, options: Options) -> dict[str, Any]:
    return probe.run(config, options.out, overwrite=options.overwrite)


def _import(config: importing.ImportConfig, options: Options) -> dict[str, Any]:
    return importing.run(config, options.out, overwrite=options.overwrite)


def _generate(config: generation.GenerateConfig, options: Options) -> dict[str, Any]:
    return generation.run(config, options.out, overwrite=options.overwrite, on=options.on)


def _verify(config: verify.VerifyConfig, options: Options) -> dict[str, Any]:
    return verify.run(config, options.out, overwrite=options.overwrite, on=options.on)


def _resumable(run: Callable[..., dict[str, Any]]) -> Callable[[Any, Options], dict[str, Any]]:
    return lambda config, options: run(config, options.out, overwrite=options.overwrite, resume=options.resume)


def _compress(run: Callable[..., dict[str, Any]]) -> Callable[[Any, Options], dict[str, Any]]:
    def on_model(config: Any, options: Options) -> dict[str, Any]:
        switches = {"overwrite": options.overwrite, "resume": options.resume, "dry_run": options.dry_run}
        return run(config, options.out, **switches)

    return on_model


ALL = ("--out", "--overwrite", "--resume")

COMMANDS: dict[str, Command] = {
    "demo": Command(
        demo.DemoConfig,
        lambda config, options: demo.run(config, options.out),
        "the main job on the built-in models, offline: traces, truncation sweep, compression, report",
        ("--out",),
    ),
    "traces import": Command(importing.ImportConfig, _import, "read traces of any format into one JSONL file"),
    "traces generate": Command(
        generation.GenerateConfig,
        _generate,
        "sample traces from a model or a server; started again, it goes on",
        ("--out", "--overwrite", "--on"),
    ),
    "traces verify": Command(
        verify.VerifyConfig,
        _verify,
        "check answers, then filter by pass rate, length and overlap with test sets",
        ("--out", "--overwrite", "--on"),
    ),
    "traces show": Command(
        show.ShowConfig,
        lambda config, _: show.run(config),
        "print traces with their segments, weights and cut",
        (),
    ),
    "traces stats": Command(
        stats.StatsConfig,
        lambda config, options: stats.run(config, quiet=options.json),
        "count segments, and what a cut would lose",
        (),
    ),
    "teacher cache": Command(
        caching.CacheStageConfig,
        lambda config, options: caching.run(config, options.out, options.on),
        "store what a teacher says about traces, for every run that reads them; goes on where it was stopped",
        ("--out", "--on"),
    ),
    "teacher stats": Command(None, _on_cache(cache.stats), "what a teacher cache holds, costs and loses", ()),
    "teacher verify": Command(None, _on_cache(cache.verify), "read every byte of a cache, name what is damaged", ()),
    "traces probe": Command(
        probe.ProbeConfig, _probe, "find where a teacher already knows the answer, for truncation.policy probed"
    ),
    "distill": Command(DistillConfig, _distill, "train one student", (*ALL, "--dry-run")),
    "sweep": Command(
        SweepConfig, _sweep, "train many students over a grid, one report", ("--out", "--on", "--dry-run")
    ),
    "plan": Command(
        PlanConfig,
        lambda config, options: predict.plan(config, quiet=options.json),
        "say whether a recipe fits on given devices, with which settings, and how long it takes",
        (),
    ),
    "advise": Command(
        AdviseConfig,
        lambda config, options: predict.advise(config, quiet=options.json),
        "say which number format and which cut suit a machine and a workload, and what they save",
        (),
        subject="model",
    ),
    "evaluate": Command(evaluate.EvaluateStageConfig, _evaluate, "score a model on problems, with intervals"),
    "moments": Command(
        moments.MomentsConfig,
        _resumable(moments.run),
        "collect what prune and quantize need of a model's layers, once for any number of solvers",
        ALL,
    ),
    "prune": Command(
        prune.PruneConfig,
        _compress(prune.run),
        "remove layers, neurons, KV groups or single weights",
        (*ALL, "--dry-run"),
    ),
    "recover": Command(
        recover.RecoverConfig,
        _recover,
        "prune and train in turns, or once, to a smaller model",
        (*ALL, "--dry-run"),
    ),
    "export": Command(
        export.ExportConfig, _export, "write a model for vLLM, llama.cpp or plain transformers, and prove that it loads"
    ),
    "quantize": Command(
        quantize.QuantizeConfig,
        _compress(quantize.run),
        "round weights to few bits, for transformers, vLLM and SGLang",
        (*ALL, "--dry-run"),
    ),
    "rank train": Command(
        rank_train.RankTrainConfig,
        _resumable(rank_train.run),
        "train a scorer of candidates by one token, on labels or by distillation",
        ALL,
    ),
    "rank recover": Command(
        rank_recover.RankRecoverConfig,
        _resumable(rank_recover.run),
        "prune a scorer and distil it in turns, AUC beside size after every step",
        ALL,
    ),
    "rank evaluate": Command(
        rank_evaluate.RankEvaluateConfig,
        lambda config, options: rank_evaluate.run(config, options.out, overwrite=options.overwrite),
        "score candidates with a model: AUC, NDCG, log-loss and calibration with intervals",
    ),
    "serve": Command(
        ServeConfig,
        lambda config, options: serve.run(config, options.dry_run),
        "answer HTTP requests: scoring, ranking and generation, in OpenAI's, Cohere's, vLLM's and SGLang's shapes",
        ("--dry-run",),
        subject="model",
    ),
    "bench serve": Command(
        bench_serve.BenchServeConfig,
        lambda config, options: bench_serve.run(config, options.out),
        "measure a server under Poisson load: latency, throughput and what is served in time",
        ("--out",),
        subject="model",
    ),
    "pipeline": Command(
        PipelineConfig,
        lambda config, options: pipeline.run(config, options.out, dry_run=options.dry_run, quiet=options.json),
        "traces to a served model in one recipe, each stage skipped when nothing changed; called again, it goes on",
        ("--out", "--dry-run"),
    ),
    "rank pipeline": Command(
        rank_pipeline.RankPipelineConfig,
        _rank_pipeline,
        "teacher, students, pruning and quantisation of a scorer, one table; called again, it goes on",
        ("--out",),
    ),
    "report": Command(None, _report, "one page from sweeps, runs and compressed models", ("--out",)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `limbeck` command."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        code = _dispatch(argv)
    except BrokenPipeError:  # whoever read our output has enough; nothing more may be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (LimbeckError, OSError) as error:
        if is_debug:
            traceback.print_exc()
        _say(f"limbeck: {_one_line(error)}")
        code = 2
    except KeyboardInterrupt:
        _say(
            "limbeck: interrupted. demo, pipeline, sweep, teacher cache and traces generate go on when called again; "
            "distill, recover and rank train go on with --resume."
        )
        code = 130
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        _print_overview()
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = _command_name(argv)
    command = COMMANDS[name]
    if "--help" in rest or "-h" in rest:
        _print_help(name, command, [word for word in rest if word not in ("--help", "-h")])
        return 0
    options, rest = _take_options(name, command.takes, rest)
    if command.config is None:
        result = command.call(rest, options)
    else:
        result = command.call(_read_config(command.config, rest, command.subject), options)
    if result is not None:
        _print_result(result, options.json)
    return 0


def _command_name(argv: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return name, argv[length:]
    asked = " ".join(argument for argument in argv[:2] if not argument.startswith("-"))
    raise ConfigError(f"no such command {asked or argv[0]!r}; {nearest(asked, COMMANDS)}")


def _read_config(config_class: type, arguments: list[str], subject: str | None) -> Any:
    tree: dict[str, Any] = {}
    where = "flags"
    if subject and arguments and not arguments[0].startswith("--") and not arguments[0].endswith((".yaml", ".yml")):
        tree, arguments = {subject: arguments[0]}, arguments[1:]
    elif arguments and not arguments[0].startswith("--"):
        where = arguments[0]
        # A command may read recipes of others.
        adapt = getattr(config_class, "from_recipe", dict)
        tree, arguments = adapt(read_recipe(Path(arguments[0]))), arguments[1:]
    return build(config_class, apply_flags(config_class, tree, arguments), where)


def _take_options(name: str, takes: Sequence[str], arguments: list[str]) -> tuple[Options, list[str]]:
    rest: list[str] = []
    found: dict[str, Any] = {"out": Path("runs") / name.replace(" ", "-"), "on": "local"}
    found |= dict.fromkeys(("overwrite", "resume", "dry_run", "json"), False)
    index = 0
    while index < len(arguments):
        flag, equals, value = arguments[index].partition("=")
        if flag in LIMITED and flag not in takes:
            raise ConfigError(f"{flag} means nothing to limbeck {name}; see limbeck {name} --help.")
        if flag in ("--out", "--on"):
            if not equals:
                index += 1
                value = arguments[index] if index < len(arguments) else ""
            found[flag[2:]] = _read_out(value) if flag == "--out" else _read_on(value)
        elif flag in ("--overwrite", "--resume", "--dry-run", "--json") and not equals:
            found[flag[2:].replace("-", "_")] = True
        else:
            rest.append(arguments[index])
        index += 1
    return Options(**found), rest


def _read_out(value: str) -> Path:
    if not value or value.startswith("--"):
        raise ConfigError("--out needs a directory.")
    return Path(value)


def _read_on(value: str) -> Place:
    if value not in get_args(Place):
        raise ConfigError(f"--on needs local or ray; found {value!r}.")
    return cast(Place, value)


def _print_overview() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"limbeck {name}", command.help)
    out = Console()
    out.print("limbeck: distil a large reasoning model into a small, fast one and see what every saving costs.\n")
    out.print(table)
    out.print("\nlimbeck COMMAND --help shows every field of a command.")


def _print_help(name: str, command: Command, groups: Sequence[str]) -> None:
    out = Console()
    fields = describe(command.config) if command.config else ()
    if groups:
        chosen = [info for info in fields if any(_is_of(info.path, group) for group in groups)]
        if not chosen:
            raise ConfigError(
                f"limbeck {name} --help: no fields in {', '.join(groups)}; limbeck {name} --help has all."
            )
        _print_fields(chosen, out.width)
        return
    takes = "[RECIPE.yaml] [--FIELD value ...]" if command.config else "DIRECTORY ..."
    takes = f"{command.subject.upper()} | {takes}" if command.subject else takes
    out.print(f"limbeck {name} {takes}\n\n{command.help}\n", markup=False, highlight=False)
    for flag, text in OPTIONS.items():
        if flag in command.takes or flag not in LIMITED:
            print(_help_line(flag, text, out.width))
    _print_fields(fields, out.width)
    if command.config:
        out.print(
            "\nA flag may leave out the groups in front of a name that occurs once: --lead-fraction 0.5\n"
            f"limbeck {name} --help GROUP shows the fields of one group.",
            markup=False,
        )


def _is_of(path: str, group: str) -> bool:
    wanted = group.lstrip("-").replace("-", "_")
    return path == wanted or path.startswith(wanted + ".")


def _print_fields(fields: Sequence[FieldInfo], width: int) -> None:
    for info in fields:
        print(_help_line("--" + info.path.replace("_", "-"), _field_text(info), width))


def _help_line(flag: str, text: str, width: int) -> str:
    """A long flag has a line of its own, so that names of nested fields leave room for their text."""
    indent = " " * HELP_COLUMN
    body = textwrap.fill(text, max(width, 60), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return f"{flag:<{HELP_COLUMN}}{body.lstrip()}" if len(flag) < HELP_COLUMN - 1 else f"{flag}\n{body}"


def _field_text(info: FieldInfo) -> str:
    required = info.default is dataclasses.MISSING
    default = "required" if required else f"default {json.dumps(info.default, default=str)}"
    return f"{info.doc} ({info.type_name}; {default})"


def _print_result(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
    elif isinstance(result, dict):
        for key, value in result.items():
            if not isinstance(value, dict | list):
                print(f"{key}: {value}")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
