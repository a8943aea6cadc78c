"""The layer solvers beside those of fmchisel and llm-compressor: relative layer error and seconds.

Problems: six layers of smollm2-135m (query and attention output of blocks 4 and 20, up and down of block 4) with H from
the model's own forward passes over 32 gsm_symbolic traces, and two made ones, 1024 x 1024 and 2048 x 2048: inputs with
a falling spectrum, channels that differ in size and 1 % of them 10 to 30 times as large, 4 I samples; weights with
heavy tails. The largest is measured in one setting a kind.

Same for all: weight and H (float32), damping 0.01 of H's mean diagonal, symmetric codes with groups of 64 inputs (128
for the made problems), exact numbers of zeros, kept inputs. The error is tr((B - W) H (B - W)') / tr(W H W') with H
undamped. Seconds include what a solver factorises; nothing is kept from one call to the next. Both sides are warmed up
on a small problem, then take turns; medians of at most 3. `--clock cpu` counts CPU-seconds of one thread instead, for a
machine that does other work as well.

What differs: fmchisel's QuantEase and llm-compressor's GPTQ take their scales from the range of each group (largest
magnitude over 7.5 at 4 bits); ours search them, and QuantEase fits them again. llm-compressor's GPTQ rounds in the
order of activations, its default, as ours does. fmchisel's QuantEase makes its default of 3 sweeps after GPTQ, its ALPS
at most 300 steps, its OSSCAR removes one group at a time. `plain_gptq` is ours with the scales of the range and the
inputs in their own order: GPTQ as published.

Keys over all problems and settings: geometric means of the ratios of errors; of seconds the ratio of the sums, with the
geometric mean as `..._mean`; `..._worst` is the largest ratio.

    python benchmarks/solvers.py [--quick] [--threads 2] [--clock wall] [--work DIR] [--out benchmarks/results]

Peers: `make bench-peers-compress` makes .venv-compress and .venv-fmchisel. Without them ours is measured alone, and
what is relative to them is null; without smollm2-135m only the made problems are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _process import MODEL, conditions, markdown, publish
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.compress import moments as moments_stage
from limbeck.compress.blocks import Blocks, groups_of
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.moments import MomentsConfig, StoredMoments
from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune import alps, magnitude, osscar, sparsegpt, wanda
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize import awq, gptq, quantease, rtn
from limbeck.compress.quantize.grid import Grid
from limbeck.errors import ModelError
from limbeck.traces.sources import TraceConfig

LAYERS = {
    4: ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    20: ("self_attn.q_proj", "self_attn.o_proj"),
}
"""Block -> its layers."""
PATTERNS = ("0.5", "2:4")
BITS = (4, 3)
PEERS = {"fmchisel": ".venv-fmchisel", "llmcompressor": ".venv-compress"}
CASE_SECONDS = 6.0
"""No further repeat of a case after so long."""
LARGE = 2048
"""From so many inputs on, only the first width and the first pattern."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Solve = Callable[[LayerProblem], Tensor]


class Job(NamedTuple):
    """A problem and how it is cut."""

    problem: LayerProblem
    group_size: int
    """Inputs that share a scale."""
    removable: int
    """Inputs that OSSCAR removes together."""
    keep: int
    """Groups of them that stay."""


@dataclass(frozen=True)
class Case:
    """One setting: our solvers for it, and the peers' calls."""

    setting: str
    ours: dict[str, Solve]
    peers: dict[str, dict[str, Any]]


class Peer:
    """A process of another venv that solves what it is asked."""

    def __init__(self, venv: str, threads: int) -> None:
        python = Path(venv) / "bin" / "python"
        script = Path(__file__).with_name("_peer_solvers.py")
        self._process = subprocess.Popen(
            [str(python), str(script), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def solve(self, solver: str, problem: Path, options: dict[str, Any], clock: str) -> tuple[Tensor, float]:
        """The answer and the seconds of the call."""
        out = problem.with_suffix(".answer")
        asked = {"solver": solver, "problem": str(problem), "options": options, "out": str(out)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{solver}: the process of the peer died; run {PEERS[solver.split()[0]]} by hand.")
        return load_file(out)["weight"], json.loads(answer)[clock]


def cases(job: Job) -> Iterator[Case]:
    """Every setting of a problem."""
    few = 1 if job.problem.weight.shape[1] >= LARGE else None
    for bits in BITS[:few]:
        grid = Grid(bits=bits, group_size=job.group_size)
        options = {"bits": bits, "group_size": job.group_size}
        yield Case(f"{bits} bits", quantizers(grid), {
            "fmchisel quantease": options,
            "llmcompressor gptq": options | {"actorder": "static"},
        })  # fmt: skip
    for text in PATTERNS[:few]:
        pattern = Pattern.parse(text)
        options = {"sparsity": pattern.sparsity, "kept": pattern.kept or 0, "group": pattern.group or 0}
        names = ("fmchisel alps", "llmcompressor sparsegpt", "llmcompressor wanda")
        yield Case(f"{text} zeros" if pattern.group is None else text, pruners(pattern), dict.fromkeys(names, options))
    structured = {"group_size": job.removable, "keep": job.keep}
    groups = job.problem.weight.shape[1] // job.removable
    setting = f"{job.keep} of {groups} groups"
    yield Case(setting, removers(job.removable, job.keep), {"fmchisel osscar": structured})


def quantizers(grid: Grid) -> dict[str, Solve]:
    """Rounding solvers, as weights."""
    plain = gptq.GptqConfig(clip="none", ordered=False)

    def equalized(problem: LayerProblem) -> Tensor:
        factors = awq.factors([problem], grid, awq.AwqConfig())
        scaled = LayerProblem(problem.weight * factors, problem.moments.scaled(1 / factors))
        return rtn.solve(scaled, grid, rtn.RtnConfig()).dequantize() / factors

    return {
        "rtn": lambda problem: rtn.solve(problem, grid, rtn.RtnConfig()).dequantize(),
        "awq": equalized,
        "plain_gptq": lambda problem: gptq.solve(problem, grid, plain).dequantize(),
        "gptq": lambda problem: gptq.solve(problem, grid, gptq.GptqConfig()).dequantize(),
        "quantease": lambda problem: quantease.solve(problem, grid, quantease.QuantEaseConfig()).dequantize(),
    }


def pruners(pattern: Pattern) -> dict[str, Solve]:
    """Solvers for single weights."""
    return {
        "magnitude": lambda problem: magnitude.solve(problem, pattern, magnitude.MagnitudeConfig()),
        "wanda": lambda problem: wanda.solve(problem, pattern, wanda.WandaConfig()),
        "sparsegpt": lambda problem: sparsegpt.solve(problem, pattern, sparsegpt.SparseGptConfig()),
        "alps": lambda problem: alps.solve(problem, pattern, alps.AlpsConfig()),
    }


def removers(group_size: int, keep: int) -> dict[str, Solve]:
    """Whole groups of inputs: the largest ones with a refit, and OSSCAR."""

    def largest(problem: LayerProblem) -> Tensor:
        norms = problem.weight.square().sum(0).view(-1, group_size).sum(1)
        chosen = norms.topk(keep).indices.sort().values
        return osscar.refit(problem, osscar.inputs_of(problem, chosen, group_size))

    return {
        "largest+refit": largest,
        "osscar": lambda problem: osscar.solve(problem, group_size, keep, osscar.OsscarConfig()).weight,
    }


def real_jobs(work: Path, layers: dict[int, tuple[str, ...]], traces: int) -> list[Job]:
    """Layers of the model with the moments of its inputs over traces."""
    source = TraceConfig(source="reasoning-gym:gsm_symbolic", num_traces=traces, seed=0)
    calibration = CalibrationConfig(traces=source, sequences=traces)
    if not (work / "moments").exists():
        moments_stage.run(MomentsConfig(model=MODEL, calibration=calibration), work / "moments")
    stored, blocks, jobs = StoredMoments(work / "moments", MODEL), Blocks(MODEL), []
    sizes: Any = blocks.config
    head_inputs = sizes.head_dim * sizes.num_attention_heads // sizes.num_key_value_heads
    for number, names in layers.items():
        with blocks.block(number, torch.device("cpu")) as block:
            for group in groups_of(block, number):
                for name in (name for name in group.linears if name in names):
                    weight = group.linears[name].weight.data.clone()
                    problem = LayerProblem(weight, stored(group), f"layers.{number}.{name}")
                    removable, keep = 1, weight.shape[1] * 3 // 4
                    if name.endswith("o_proj"):
                        removable, keep = head_inputs, sizes.num_key_value_heads - 1
                    jobs.append(Job(problem, 64, removable, keep))
    return jobs


def made_job(size: int, seed: int = 0) -> Job:
    """A made problem, size x size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.arange(1, size + 1).pow(-0.5)
    channels = (0.5 * normal(size)).exp()
    outliers = torch.randperm(size, generator=generator)[: size // 100]
    channels[outliers] *= 10 + 20 * torch.rand(len(outliers), generator=generator)
    inputs = (normal(4 * size, size) * spectrum) @ normal(size, size) / math.sqrt(size) * channels
    # Student's t with 5 degrees of freedom.
    tails = normal(5, size, size).square_().mean(0).rsqrt()
    weight = normal(size, size) * tails / math.sqrt(size)
    return Job(LayerProblem(weight, Moments.of(inputs), f"made {size} x {size}"), 128, 1, size * 3 // 4)


def timed(solve: Solve, problem: LayerProblem, clock: str) -> tuple[Tensor, float]:
    """The answer and the seconds, nothing factorised before."""
    m = problem.moments
    fresh = Moments(m.gram, m.absolute_mean, m.absolute_max, m.tokens)
    fresh_problem = LayerProblem(problem.weight, fresh, problem.name)
    now = CLOCKS[clock]
    with torch.no_grad():
        start = now()
        answer = solve(fresh_problem)
        return answer, now() - start


def measure_job(job: Job, peers: dict[str, Peer], scratch: Path, repeats: int, clock: str) -> list[dict[str, Any]]:
    """A row for every solver in every setting; ours and the peers take turns."""
    path = scratch / "problem.safetensors"
    save_file({"weight": job.problem.weight.contiguous(), "gram": job.problem.moments.gram.contiguous()}, path)
    rows = []
    for case in cases(job):
        asked = {name: options for name, options in case.peers.items() if name.split()[0] in peers}
        seconds: dict[str, list[float]] = {name: [] for name in (*case.ours, *asked)}
        errors: dict[str, float] = {}
        start = time.perf_counter()
        for repeat in range(repeats):
            if repeat and time.perf_counter() - start > CASE_SECONDS:
                break
            for name, solve in case.ours.items():
                answer, spent = timed(solve, job.problem, clock)
                errors[name] = layer_error(job.problem, answer)
                seconds[name].append(spent)
            for name, options in asked.items():
                answer, spent = peers[name.split()[0]].solve(name, path, options, clock)
                errors[name] = layer_error(job.problem, answer)
                seconds[name].append(spent)
        where = {"problem": job.problem.name, "shape": list(job.problem.weight.shape), "setting": case.setting}
        rows += [
            where | {"solver": name, "error": errors[name], "seconds": statistics.median(taken), "repeats": len(taken)}
            for name, taken in seconds.items()
        ]
    return rows


def measure(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """All rows; those of a problem are kept in a file."""
    torch.set_num_threads(options.threads)
    wanted = tuple(options.problems or [""])
    jobs = [made_job(256)] if options.quick else [made_job(1024), made_job(2048)]
    if "layers".startswith(wanted) or any(name.startswith("layers") for name in wanted):
        try:
            jobs = real_jobs(work, {4: LAYERS[4]} if options.quick else LAYERS, 8 if options.quick else 32) + jobs
        except ModelError as error:
            print(f"without the layers of {MODEL}: {error}", flush=True)
    jobs = [job for job in jobs if job.problem.name.startswith(wanted)]
    repeats = 1 if options.quick else options.repeats
    with ExitStack() as stack:
        there = {name: venv for name, venv in PEERS.items() if (Path(venv) / "bin" / "python").exists()}
        for name in PEERS.keys() - there.keys():
            print(f"{name}: {PEERS[name]} is missing, so it is not compared (make bench-peers-compress)", flush=True)
        peers = {name: stack.enter_context(Peer(venv, options.threads)) for name, venv in there.items()}
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for job in jobs:
            path = work / f"{job.problem.name}.json"
            if not path.exists():
                measure_job(made_job(128, seed=1), peers, scratch, 1, options.clock)
                path.write_text(json.dumps(measure_job(job, peers, scratch, repeats, options.clock)), encoding="utf-8")
                print(f"{job.problem.name}: done", flush=True)
    return [row for job in jobs for row in json.loads((work / f"{job.problem.name}.json").read_text("utf-8"))]


RATIOS = {
    "quantease_error_over_gptq": ("error", "quantease", "plain_gptq"),
    "quantease_error_over_tuned_gptq": ("error", "quantease", "gptq"),
    "quantease_error_over_fmchisel": ("error", "quantease", "fmchisel quantease"),
    "quantease_seconds_over_fmchisel": ("seconds", "quantease", "fmchisel quantease"),
    "alps_error_over_fmchisel": ("error", "alps", "fmchisel alps"),
    "alps_seconds_over_fmchisel": ("seconds", "alps", "fmchisel alps"),
    "osscar_error_over_fmchisel": ("error", "osscar", "fmchisel osscar"),
    "osscar_seconds_over_fmchisel": ("seconds", "osscar", "fmchisel osscar"),
    "sparsegpt_error_over_llmcompressor": ("error", "sparsegpt", "llmcompressor sparsegpt"),
    "sparsegpt_seconds_over_llmcompressor": ("seconds", "sparsegpt", "llmcompressor sparsegpt"),
    "gptq_error_over_llmcompressor": ("error", "gptq", "llmcompressor gptq"),
    "gptq_seconds_over_llmcompressor": ("seconds", "gptq", "llmcompressor gptq"),
}
"""Key -> what is compared, whose, over whose."""


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Every key over all problems: geometric mean of errors or ratio of the seconds in all, and the largest ratio.

    None without the peer.
    """
    found = {(row["problem"], row["setting"], row["solver"]): row for row in rows}
    keys: dict[str, float | None] = {}
    for key, (field, ours, theirs) in RATIOS.items():
        pairs = [(row, found.get((row["problem"], row["setting"], theirs))) for row in rows if row["solver"] == ours]
        values = [(row[field], other[field]) for row, other in pairs if other]
        if not values:
            keys |= dict.fromkeys([key, f"{key}_worst", *([f"{key}_mean"] if field == "seconds" else [])])
            continue
        ratios = [mine / other for mine, other in values]
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        if field == "seconds":
            keys[key] = sum(mine for mine, _ in values) / sum(other for _, other in values)
            keys[f"{key}_mean"] = mean
        else:
            keys[key] = mean
        keys[f"{key}_worst"] = max(ratios)
    return {key: None if value is None else float(f"{value:.4g}") for key, value in keys.items()}


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """One row for a solver on a problem."""
    columns = ["problem", "outputs x inputs", "setting", "solver", "relative error", "seconds"]
    return markdown(columns, [
        [row["problem"], " x ".join(map(str, row["shape"])), row["setting"], row["solver"], f"{row['error']:.4g}",
         f"{row['seconds']:.3g}"]
        for row in rows
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one block and a small made problem, once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU-seconds, for --threads 1")
    parser.add_argument("--problems", nargs="+", help="only problems whose name begins so")
    parser.add_argument("--work", type=Path, help="directory that keeps the moments and finished problems")
    parser.add_argument("--out", type=Path, help="directory for solvers.md and solvers.json")
    options = parser.parse_args()
    header = conditions(options.threads, ("torch", "transformers"))
    header += f"; clock: {options.clock}; peers fmchisel 0.1.2, llmcompressor 0.14.0.1"
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        rows = measure(options, work)
    publish("solvers", __doc__, header, table_of(rows), summarise(rows), rows, options.out)


if __name__ == "__main__":
    main()
