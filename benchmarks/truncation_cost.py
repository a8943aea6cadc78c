"""What half of every sequence costs on smollm2-135m: seconds, FLOPs and peak memory of lead fraction 0.5 over 1.0.

Regime: one optimizer step on 8 long traces, float32 on a CPU, AdamW, forward KL with a live teacher (the same model),
thought and answer supervised, the whole batch in one forward pass. A trace is the first of several gsm_symbolic
problems with the worked solutions of all of them as its thought, cut at 512 tokens: as in real reasoning traces, the
prompt is a small part of it. Lead fraction 0.5 keeps the first 256 tokens of each.

Peer: the same step with the naive loss in place of the fused one, all logits of both models at once under autograd.
Only with it does the loss dominate the peak.

Bound: linear layers and supervised rows are halved or better and attention is quartered; the optimizer costs the same.
With the fused loss, and micro-batches that hold a fixed number of tokens (the default), the peak would not fall at all:
here a batch is one micro-batch, so that activations halve; weights, gradients and optimizer state remain.

Every fraction and loss runs in a fresh process: a step on beginnings of 16 tokens to warm up, then the timed steps. The
four alternate, medians over the repeats; peak memory is VmHWM of the process.

    python benchmarks/truncation_cost.py [--quick] [--threads 2] [--repeats 2] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _process import conditions, fresh, gsm_traces, markdown, publish, render_traces, save_models, set_up
from torch import Tensor

from limbeck.distill import objective, train
from limbeck.distill.fused import FusedLoss
from limbeck.models.load import load_model
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.live import LiveTeacher
from limbeck.traces.batch import make_example
from limbeck.traces.sample import Sample
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.trace import Trace
from limbeck.traces.truncate import TruncationConfig

SIDES = [(loss, fraction) for loss in ("fused", "naive") for fraction in (1.0, 0.5)]


def naive_loss(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, *, kd_coef: Tensor, targets: DenseTargets, **_: Any
) -> FusedLoss:
    """sum of kd_coef KL(teacher || student) from all logits at once, as it is usually written."""
    with torch.no_grad():
        teacher = F.log_softmax(targets.hidden @ targets.head_weight.T, dim=-1)
    student = F.log_softmax(hidden @ head_weight.T, dim=-1)
    total = (F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * kd_coef).sum()
    return FusedLoss(total, torch.zeros(()), total.detach(), len(hidden))


def steps(loss: str, fraction: float, models: Path, samples: Sequence[Sample], count: int, threads: int) -> dict:
    """`count` optimizer steps on the samples cut to `fraction`."""
    if loss == "naive":
        objective.fused_loss = naive_loss  # type: ignore[assignment]
    cut, supervision = TruncationConfig(lead_fraction=fraction), SupervisionConfig(preset="cot+answer")
    batch = [make_example(sample, cut, supervision) for sample in samples]
    teacher = LiveTeacher(load_model(str(models / "teacher"), layout="packed"))
    run = set_up(models / "student", teacher, samples, [batch] * count, threads)
    train._step(run, 0)
    flops = sum(run.ledger.flops.values())
    seconds, rows = [], []
    for number in range(1, count + 1):
        start = time.perf_counter()
        rows.append(train._step(run, number).row())
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "flops": (sum(run.ledger.flops.values()) - flops) / count,
        "loss": rows[0]["loss"],
        "tokens": sum(len(example) for example in batch),
        "supervised_tokens": sum(int((example.kd_weight > 0).sum()) for example in batch),
    }


def long_traces(count: int, solutions: int) -> list[Trace]:
    """Problems whose thought goes on with the worked solutions of the next ones."""
    traces = gsm_traces(count * solutions)
    groups = [traces[i : i + solutions] for i in range(0, len(traces), solutions)]
    return [replace(group[0], cot="\n\n".join(trace.cot for trace in group)) for group in groups]


def measure(quick: bool, repeats: int, threads: int, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """All answers by side, such as `fused 0.5`."""
    fresh(save_models, scratch)
    count, tokens = (2, 256) if quick else (8, 512)
    samples = render_traces(long_traces(count, 8), scratch / "student")
    if min(len(sample) for sample in samples) < tokens:
        raise SystemExit(f"truncation_cost: a trace has fewer than {tokens} tokens; join more solutions.")
    samples = [_first(sample, tokens) for sample in samples]
    answers: dict[str, list[dict[str, Any]]] = {f"{loss} {fraction}": [] for loss, fraction in SIDES}
    for repeat in range(repeats):
        for loss, fraction in SIDES if repeat % 2 == 0 else reversed(SIDES):
            answer = fresh(steps, loss, fraction, scratch, samples, 1 if quick else 2, threads)
            answers[f"{loss} {fraction}"].append(answer)
    return answers


def _first(sample: Sample, tokens: int) -> Sample:
    """The first tokens of a sample, as an uncut one."""
    return Sample(
        input_ids=sample.input_ids[:tokens],
        segment_ids=sample.segment_ids[:tokens],
        ending_start=tokens,
        derivation_end=None,
        trace_key=sample.trace_key,
        source=sample.source,
    )


def summarise(answers: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The keys of the claims."""

    def ratio(quantity: str, loss: str) -> float:
        pairs = zip(answers[f"{loss} 0.5"], answers[f"{loss} 1.0"], strict=True)
        return statistics.median(half[quantity] / full[quantity] for half, full in pairs)

    keys = {
        "seconds_half_over_full": ratio("seconds", "fused"),
        "flops_half_over_full": ratio("flops", "fused"),
        "peak_memory_half_over_full": ratio("peak_bytes", "fused"),
        "peak_memory_half_over_full_naive_loss": ratio("peak_bytes", "naive"),
        "seconds_half_over_full_naive_loss": ratio("seconds", "naive"),
        "loss_difference_naive_over_fused": max(
            abs(answers[f"naive {x}"][0]["loss"] / answers[f"fused {x}"][0]["loss"] - 1) for x in (0.5, 1.0)
        ),
    }
    return {name: float(f"{value:.4g}") for name, value in keys.items()}


def table_of(answers: dict[str, list[dict[str, Any]]]) -> str:
    """One row a side."""
    rows = []
    for side, found in answers.items():
        seconds = [answer["seconds"] for answer in found]
        rows.append(
            [
                side,
                str(found[0]["tokens"]),
                str(found[0]["supervised_tokens"]),
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{found[0]['flops'] / 1e12:.3f}",
                f"{max(answer['peak_bytes'] for answer in found) / 1e9:.2f}",
            ]
        )
    columns = ["loss, lead fraction", "tokens", "supervised", "seconds a step: median (range)", "TFLOP", "peak GB"]
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 traces of 256 tokens, one step, under 60 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="directory for truncation_cost.md and truncation_cost.json")
    options = parser.parse_args()
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as scratch:
        answers = measure(options.quick, 1 if options.quick else options.repeats, options.threads, Path(scratch))
    publish("truncation_cost", __doc__, header, table_of(answers), summarise(answers), answers, options.out)


if __name__ == "__main__":
    main()
