"""Memory and time of the loss: head, divergence and all gradients, from hidden states at 2,048 supervised tokens.

Regime: float32 on a CPU; vocabularies of 49,152 (SmolLM2: width 576 for both models) and 151,936 (Qwen: student 896,
teacher 1,536); the head trains, the teacher's does not; no CE term. Forward and backward pass together.

Bound: four products with a head (logits of both models, and the student's two gradients), three with a top-k
teacher; nothing can be faster than these. Memory: one or two [chunk, vocabulary] buffers.

Peers, in the same process environment: the naive dense loss under autograd; TRL 1.16's dense loss (its GKD trainer)
and its chunked one (its distillation trainer); Liger 0.8.5's chunked loss, uncompiled, at its default chunk of 1,024.
jsd is at beta 0.5, where all conventions agree. Without the peers (`make bench-peers`) their figures are null.

Time: medians over repeats, all methods in turn, the order reversed every other time. Memory: each method in a
process of its own, peak resident set (VmHWM, reset through /proc/self/clear_refs) over that with the inputs in place.
The head's gradient, 4 V D bytes that every method must return, is subtracted and reported apart. A method for which
this machine's memory is too small is not timed; TRL's dense JSD needs 68 bytes a token and entry.

Last line: one JSON object. The six claims take the worse of the two vocabularies.

    python benchmarks/loss.py [--quick] [--threads 2] [--repeats 3] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.topk import TopKTargets

warnings.simplefilter("ignore")
try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
except ImportError:
    HAS_PEERS = False
else:
    HAS_PEERS = True

WIDTHS = {49_152: (576, 576), 151_936: (896, 1536)}
KEPT = 50
SAFE_BYTES = 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""A method that needs more than this is not timed beside the others' results."""
BETA = {"fkl": 0.0, "jsd": 0.5}
CLAIMS = {
    "fkl_dense_bytes_per_token_vocab": ("bytes_per_token_vocab", "limbeck_fkl_dense", None),
    "jsd_dense_bytes_per_token_vocab": ("bytes_per_token_vocab", "limbeck_jsd_dense", None),
    "fkl_topk_bytes_per_token_vocab": ("bytes_per_token_vocab", "limbeck_fkl_topk", None),
    "fkl_dense_seconds_over_naive": ("seconds", "limbeck_fkl_dense", "naive_fkl_dense"),
    "jsd_dense_seconds_over_naive": ("seconds", "limbeck_jsd_dense", "naive_jsd_dense"),
    "fkl_dense_seconds_over_liger": ("seconds", "limbeck_fkl_dense", "liger_fkl_dense"),
}


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher: DenseTargets
    topk: TopKTargets
    labels: Tensor

    def first(self, rows: int) -> Inputs:
        topk = self.topk
        return Inputs(
            self.hidden.detach()[:rows].requires_grad_(),
            self.weight,
            DenseTargets(self.teacher.hidden[:rows], self.teacher.head_weight),
            TopKTargets(topk.ids[:rows], topk.log_probs[:rows], topk.log_tail[:rows]),
            self.labels[:rows],
        )


def make_inputs(tokens: int, vocab: int) -> Inputs:
    """Random models whose logits have a standard deviation of 2."""
    torch.manual_seed(0)
    width, teacher_width = WIDTHS[vocab]
    hidden, teacher_hidden = torch.randn(tokens, width), torch.randn(tokens, teacher_width)
    weight = torch.randn(vocab, width).mul_(2 / math.sqrt(width))
    teacher_weight = torch.randn(vocab, teacher_width).mul_(2 / math.sqrt(teacher_width))
    parts = []
    for states in teacher_hidden.split(64):
        log_probs, ids = torch.log_softmax(states @ teacher_weight.T, -1).topk(KEPT)
        parts.append((ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))))
    ids, log_probs, log_tail = (torch.cat(part) for part in zip(*parts, strict=True))
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        DenseTargets(teacher_hidden, teacher_weight),
        TopKTargets(ids, log_probs, log_tail),
        torch.randint(vocab, (tokens,)),
    )


def limbeck(inputs: Inputs, name: str, teacher: str) -> Tensor:
    tokens = len(inputs.hidden)
    return fused_loss(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        ce_coef=torch.zeros(tokens),
        kd_coef=torch.full((tokens,), 1 / tokens),
        targets=inputs.topk if teacher == "topk" else inputs.teacher,
        divergence=DivergenceConfig(name={"fkl": "forward_kl", "jsd": "jsd"}[name]),
    ).total


def naive(inputs: Inputs, name: str, teacher: str) -> Tensor:
    student = torch.log_softmax(inputs.hidden @ inputs.weight.T, -1)
    if teacher == "topk":
        topk = inputs.topk
        kept = student.gather(1, topk.ids)
        student = torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], 1)
        target = torch.cat([topk.log_probs, topk.log_tail[:, None]], 1)
    else:
        target = torch.log_softmax(inputs.teacher.hidden @ inputs.teacher.head_weight.T, -1)
    if name == "fkl":
        return F.kl_div(student, target, reduction="batchmean", log_target=True)
    mixture = torch.logaddexp(student, target) - math.log(2)
    forward = F.kl_div(mixture, target, reduction="batchmean", log_target=True)
    return (forward + F.kl_div(mixture, student, reduction="batchmean", log_target=True)) / 2


def trl_dense(inputs: Inputs, name: str, teacher: str) -> Tensor:
    with torch.no_grad():
        teacher_logits = inputs.teacher.hidden @ inputs.teacher.head_weight.T
    student_logits = inputs.hidden @ inputs.weight.T
    return GKDTrainer.generalized_jsd_loss(
        student_logits[None], teacher_logits[None], labels=inputs.labels[None], beta=BETA[name]
    )


def trl_chunked(inputs: Inputs, name: str, teacher: str) -> Tensor:
    return _chunked_divergence_loss(
        inputs.hidden[None],
        inputs.teacher.hidden[None],
        inputs.weight,
        inputs.teacher.head_weight,
        torch.ones(1, len(inputs.hidden)),
        beta=BETA[name],
    )[0]


def liger(inputs: Inputs, name: str, teacher: str) -> Tensor:
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[name], compiled=False)
    return loss(inputs.hidden, inputs.weight, inputs.teacher.hidden, inputs.teacher.head_weight, inputs.labels)


OURS = {"limbeck": limbeck, "naive": naive}
PEERS = {"trl_dense": trl_dense, "trl_chunked": trl_chunked, "liger": liger}
SHAPES = (("fkl", "dense"), ("jsd", "dense"), ("fkl", "topk"))


def methods() -> dict[str, Callable[[Inputs], Tensor]]:
    """`limbeck_fkl_dense` and so on: a mean loss with a graph."""
    table: dict[str, Callable[[Inputs], Tensor]] = {}
    for name, teacher in SHAPES:
        families = OURS | (PEERS if HAS_PEERS and teacher == "dense" else {})
        for family, function in families.items():
            table[f"{family.removesuffix('_dense')}_{name}_{teacher}"] = (
                lambda inputs, function=function, name=name, teacher=teacher: function(inputs, name, teacher)
            )
    return table


def step(method: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[float, float, Tensor, Tensor]:
    """Seconds, loss, and the gradients of hidden states and head, which the inputs do not keep."""
    started = time.perf_counter()
    loss = method(inputs)
    loss.backward()
    seconds = time.perf_counter() - started
    assert inputs.hidden.grad is not None and inputs.weight.grad is not None
    gradients = inputs.hidden.grad, inputs.weight.grad
    inputs.hidden.grad = inputs.weight.grad = None
    return seconds, loss.item(), *gradients


def time_all(tokens: int, vocab: int, repeats: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of these methods, and how far their losses and gradients are from the naive ones."""
    inputs, table = make_inputs(tokens, vocab), {name: methods()[name] for name in names}
    warm = inputs.first(32)
    for method in table.values():
        step(method, warm)
    wanted = {shape: step(table["naive_{}_{}".format(*shape)], inputs)[1:] for shape in SHAPES}
    results: dict[str, dict[str, Any]] = {name: {"all_seconds": []} for name in table}
    for repeat in range(repeats):
        for name in list(table) if repeat % 2 == 0 else reversed(table):
            seconds, loss, *gradients = step(table[name], inputs)
            expected, *expected_gradients = wanted[shape_of(name)]
            errors = [
                ((got - want).norm() / want.norm()).item()
                for got, want in zip(gradients, expected_gradients, strict=True)
            ]
            results[name]["all_seconds"].append(seconds)
            results[name] |= {
                "loss": loss,
                "loss_error": abs(loss - expected) / abs(expected),
                "gradient_error": max(errors),
            }
    for result in results.values():
        result["seconds"] = statistics.median(result["all_seconds"])
    return results


def shape_of(method: str) -> tuple[str, str]:
    name, teacher = method.split("_")[-2:]
    return name, teacher


def peak_growth_bytes(tokens: int, vocab: int, name: str) -> int:
    """Peak resident set of one step over that of the inputs."""
    inputs, method = make_inputs(tokens, vocab), methods()[name]
    step(method, inputs.first(4))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    step(method, inputs)
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def in_own_process(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fork of this process, which has computed nothing and so holds no buffers or threads.

    Returns: None if the process died, which here means that memory ran out.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        torch.set_num_threads(threads)
        sender.send(function(*args))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def measure(tokens: int, vocab: int, repeats: int, threads: int, quick: bool) -> dict[str, dict[str, Any]]:
    head_gradient = 4 * vocab * WIDTHS[vocab][0]
    memory: dict[str, dict[str, Any]] = {}
    for name in methods():
        memory[name] = {"head_gradient_bytes": head_gradient, "bytes_per_token_vocab": None, "fits": True}
        if name.startswith("limbeck") or not quick:
            peak = in_own_process(threads, peak_growth_bytes, tokens, vocab, name)
            memory[name] |= {"peak_growth_bytes": peak, "fits": peak is not None and peak < SAFE_BYTES}
            if peak is not None:
                memory[name]["bytes_per_token_vocab"] = (peak - head_gradient) / (tokens * vocab)
    fitting = [name for name, row in memory.items() if row["fits"]]
    seconds = in_own_process(threads, time_all, tokens, vocab, repeats, fitting)
    if seconds is None:
        raise SystemExit(f"vocabulary {vocab}: memory ran out although each method alone fits; free some and go again.")
    unmeasured = {"seconds": None, "all_seconds": [], "loss_error": None, "gradient_error": None}
    return {name: row | seconds.get(name, unmeasured) for name, row in memory.items()}


def claims(results: dict[int, dict[str, dict[str, Any]]]) -> dict[str, float | None]:
    """Each claim by vocabulary and, without suffix, the worst of them; None where a peer is missing."""
    worst: dict[str, float | None] = {}
    by_vocab: dict[str, float | None] = {}
    for claim, (quantity, ours, peer) in CLAIMS.items():
        values = {
            vocab: table[ours][quantity] / (table[peer][quantity] if peer else 1.0)
            for vocab, table in results.items()
            if peer is None or (peer in table and table[peer]["fits"])
        }
        worst[claim] = round(max(values.values()), 4) if values else None
        by_vocab |= {f"{claim}_{vocab}": round(values[vocab], 4) if vocab in values else None for vocab in WIDTHS}
    return worst | by_vocab


def report(results: dict[int, dict[str, dict[str, Any]]], tokens: int) -> str:
    lines = []
    for vocab, table in results.items():
        lines += [
            f"\n{tokens} tokens, vocabulary {vocab}; widths {WIDTHS[vocab][0]} (student) and {WIDTHS[vocab][1]} "
            f"(teacher); the head's gradient of {4 * vocab * WIDTHS[vocab][0] / 2**20:.0f} MiB is not in the bytes\n",
            "| method | seconds | min - max | over naive | bytes/(token x entry) | loss error | gradient error |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in table.items():
            memory = row["bytes_per_token_vocab"]
            shown = (
                "out of memory"
                if row.get("peak_growth_bytes", 0) is None
                else ""
                if memory is None
                else f"{memory:.2f}"
            )
            if not row["fits"]:
                lines.append(f"| {name} | | | | {shown} | | |")
                continue
            baseline = table["naive_{}_{}".format(*shape_of(name))]["seconds"]
            lines.append(
                f"| {name} | {row['seconds']:.2f} | {min(row['all_seconds']):.2f} - {max(row['all_seconds']):.2f} "
                f"| {row['seconds'] / baseline:.2f} | {shown} | {row['loss_error']:.0e} | {row['gradient_error']:.0e} |"
            )
    return "\n".join(lines)


def conditions(threads: int) -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    versions = [f"torch {torch.__version__}"]
    for package in ("trl", "liger-kernel") if HAS_PEERS else ():
        versions.append(f"{package} {importlib.metadata.version(package)}")
    return (
        f"{datetime.date.today()}; {model}, {threads} threads, load {Path('/proc/loadavg').read_text().split()[0]}; "
        + (", ".join(versions))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 tokens, small vocabulary, once; no peer's memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, choices=list(WIDTHS), help="one of the two")
    parser.add_argument("--out", type=Path, help="directory for loss_cpu.md and loss_cpu.json")
    options = parser.parse_args()
    tokens, repeats = (512, 1) if options.quick else (2048, options.repeats)
    vocabularies = list(WIDTHS)[:1] if options.quick else [options.vocabulary] if options.vocabulary else list(WIDTHS)

    header = conditions(options.threads)
    print(header)
    if not HAS_PEERS:
        print("TRL and Liger are not installed: run `make bench-peers`, then .venv-peers/bin/python; null below.")
    results = {vocab: measure(tokens, vocab, repeats, options.threads, options.quick) for vocab in vocabularies}
    table = report(results, tokens)
    print(table)
    if options.quick:
        print("\nquick: a quarter of the tokens that the claims are about, so a buffer weighs four times as much.")
    summary = claims(results) | {"tokens": tokens, "has_peers": HAS_PEERS, "methods": results}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/loss.py " + " ".join(sys.argv[1:])
        claimed = "\n".join(f"- `{name}`: {value}" for name, value in claims(results).items())
        text = f"# Loss: memory and time\n\n`{command}`\n\n{header}\n\n{claimed}\n{table}\n"
        (options.out / "loss_cpu.md").write_text(text)
        (options.out / "loss_cpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
