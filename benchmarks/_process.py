"""What the training benchmarks share: fresh processes with their peak memory, the data, the results file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import ledger
from limbeck.distill.config import DistillConfig, LossConfig, StudentConfig, TeacherConfig, TrainingConfig
from limbeck.distill.data import Data
from limbeck.distill.microbatch import Student
from limbeck.distill.parallel import Ranks
from limbeck.distill.plan import PlannedStep, plan_steps
from limbeck.distill.setup import Run
from limbeck.models.load import load_model, load_tokenizer
from limbeck.optim.build import OptimizerConfig, build_optimizer
from limbeck.optim.schedules import ScheduleConfig
from limbeck.teacher.several import Teacher
from limbeck.traces.batch import Example, make_example
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sample import Sample
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

MODEL = "smollm2-135m"
LEARNING_RATE = 1e-5
WARM_UP_TOKENS = 16


def fresh(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`function(*args)` in a process that has done nothing before; its peak resident set joins the answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}: the process died; its message is above.") from None
    finally:
        process.join()


def _answer(sender: Any, function: Callable[..., dict[str, Any]], args: Sequence[Any]) -> None:
    # The ledger starts a new peak with every phase; here the peak is that of the whole process.
    ledger.reset_peak = lambda device: None
    sender.send(function(*args) | {"peak_bytes": status_bytes("VmHWM")})


def status_bytes(field: str) -> int:
    """A memory figure of this process from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("benchmarks: /proc/self/status is missing; peak memory is measured on Linux only.")


def save_models(directory: Path, noise: float = 0.01) -> dict[str, Any]:
    """Write teacher and student, which is the same model with 1 % of noise, so that there is a loss to compare."""
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    generator = torch.Generator().manual_seed(0)
    for name in ("teacher", "student"):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                random = torch.randn(parameter.shape, generator=generator)
                parameter.add_(random, alpha=noise * float(parameter.std()))
    return {}


def gsm_traces(count: int) -> list[Trace]:
    """The first `count` problems of gsm_symbolic with their worked solutions."""
    return read_traces(TraceConfig(source="reasoning-gym:gsm_symbolic", num_traces=count, seed=0))[0]


def render_traces(traces: Sequence[Trace], directory: Path) -> list[Sample]:
    """The traces as token sequences of the model in `directory`."""
    tokenizer = load_tokenizer(str(directory))
    return [render(trace, tokenizer, RenderConfig()) for trace in traces]


def set_up(
    student: Path, teacher: Teacher, warm_up: Sequence[Sample], batches: Sequence[Sequence[Example]], threads: int
) -> Run:
    """A run of limbeck's own loop, KD only: step 0 on short beginnings of `warm_up`, then one step a batch."""
    config = DistillConfig(
        student=StudentConfig(model=str(student)),
        teacher=TeacherConfig(model=str(student)),
        traces=TraceConfig(source="reasoning-gym:gsm_symbolic", num_traces=1),
        loss=LossConfig(kd_ratio=1.0),
        training=TrainingConfig(num_threads=threads),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
        schedule=ScheduleConfig(name="constant", warmup_fraction=0.0),
    )
    torch.set_num_threads(threads)
    model, tokenizer = load_model(str(student), torch.float32, "packed"), load_tokenizer(str(student))
    cut = TruncationConfig(policy="budget", budget_tokens=WARM_UP_TOKENS)
    everything = SupervisionConfig(preset="prompt+cot+answer")
    groups = [[make_example(sample, cut, everything) for sample in warm_up], *batches]
    run = Run(
        config=config,
        student=Student.of(model.train(), tokenizer),
        teacher=teacher,
        data=Data([example for group in groups for example in group], [], {}),
        steps=_one_step_each(groups, config.training),
        optimizer=build_optimizer(model, config.optimizer, len(groups)),
        ledger=ledger.Ledger(),
        ranks=Ranks(0, 1, torch.device("cpu")),
    )
    return run


def _one_step_each(groups: Sequence[Sequence[Example]], training: TrainingConfig) -> list[PlannedStep]:
    """The planner's step for each group, its indices moved to where the group stands among all examples."""
    steps, start = [], 0
    for group in groups:
        (step,) = plan_steps(
            [len(example) for example in group],
            epochs=1,
            batch_size=len(group),
            batch_tokens=None,
            microbatch_tokens=training.microbatch_tokens,
            layout=training.layout,
            bucket_batches=training.bucket_batches,
            seed=training.seed,
        )
        moved = tuple(tuple(tuple(i + start for i in part) for part in rank) for rank in step.microbatches)
        steps.append(PlannedStep(moved))
        start += len(group)
    return steps


def product_flops_per_second(run: Run, tokens: int, rows: int, repeats: int) -> float:
    """Speed of torch's plain float32 products: those of one layer over `tokens` and of the head over `rows`."""
    layer = run.student.model.model.layers[0]
    shapes = [(tokens, *module.weight.shape) for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    shapes = [shape for shape in shapes for _ in range(len(run.student.model.model.layers))]
    shapes.append((rows, *run.student.model.lm_head.weight.shape))
    flops = seconds = 0.0
    timed: dict[tuple[int, ...], float] = {}
    for shape in shapes:
        if shape not in timed:
            timed[shape] = min(_time_products(*shape) for _ in range(repeats))
        seconds += timed[shape]
        flops += 6.0 * shape[0] * shape[1] * shape[2]
    return flops / seconds


def _time_products(tokens: int, outputs: int, inputs: int) -> float:
    """Seconds of a linear layer's three products: forward, by its input, by its weight."""
    x, weight, by_y = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    products: list[tuple[Tensor, Tensor]] = [(x, weight.T), (by_y, weight), (by_y.T, x)]
    outs = [torch.mm(a, b) for a, b in products]
    start = time.perf_counter()
    for (a, b), out in zip(products, outs, strict=True):
        torch.mm(a, b, out=out)
    return time.perf_counter() - start


def conditions(threads: int, packages: Sequence[str]) -> str:
    """Machine, load and versions in one line."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpu_lines if "model name" in line), platform.processor())
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    load = Path("/proc/loadavg").read_text().split()[0]
    return (
        f"{datetime.date.today()}; {model}, {os.cpu_count()} cores, {threads} threads, load {load} at the start; "
        f"Python {platform.python_version()}, {versions}"
    )


def publish(
    name: str, docstring: str, header: str, table: str, keys: Mapping[str, Any], details: Any, out: Path | None
) -> None:
    """Print the table and, as the last line, the keys as one JSON object; write both where asked."""
    print(header, table, sep="\n\n", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = _command()
        parts = [f"# {name}", docstring.strip(), f"`{command}`", header, table, f"```json\n{json.dumps(keys)}\n```\n"]
        (out / f"{name}.md").write_text("\n\n".join(parts), encoding="utf-8")
        record = {**keys, "command": command, "conditions": header, "measurements": details}
        (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(keys))


def _command() -> str:
    """What was typed, but for --scratch: where finished runs are kept changes no result."""
    words = sys.argv[1:]
    if "--scratch" in words:
        place = words.index("--scratch")
        del words[place : place + 2]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for people."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
