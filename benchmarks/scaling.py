"""Scaling on paper: time and memory of 8B -> 4B at 17k, 114k and 1M traces on 8 to 512 GPUs, beside published runs.

Nothing is run on a GPU here. Settings are the planner's (`limbeck plan`): the fastest that fit a device. Assumptions: a
trace of 4,000 tokens (150 prompt, 3,250 thought, 600 answer), cut to a lead fraction of 0.5 or whole, two epochs,
prompt, thought and answer supervised, forward KL with a live teacher, AdamW, bf16 products over float32 weights, one
sequence a device and step but at least 64 a step, products at 40 % of 989 TFLOP/s (H100), 450 GB/s a device inside a
node of 8 and 50 GB/s between nodes, messages of shards beside products.

Check: runs whose cost is published, planned with what is known of them; what had to be assumed is named. `ratio` is
predicted over published, over the nearest end where a range is published, and 1 inside it. The plan is what a run
that reaches 40 % of the peak would take; programs that wait for a host or read short sequences take longer.

    python benchmarks/scaling.py [--quick] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _process import conditions, markdown, publish

from limbeck.config import build
from limbeck.cost.hardware import DEVICES
from limbeck.cost.shapes import config_of, frozen_sizes
from limbeck.distill.config import DistillConfig
from limbeck.ledger import head_flops, head_forward_flops
from limbeck.scale.cluster import Estimate, Load, estimate
from limbeck.scale.planner import AssumedTraces, models_of, plan

GIB = 2.0**30
DEVICE_COUNTS = (8, 16, 32, 64, 128, 256, 512)
TRACE_COUNTS = (17_000, 114_000, 1_000_000)
FRACTIONS = (1.0, 0.5)
NAIVE_LOSS_BYTES = 4.79 * GIB / (1024 * 151_936)
"""A token and entry of the vocabulary: the released program's loss with all logits in memory, measured on a CPU (2.40,
4.79 and 9.57 GiB for 512, 1024 and 2048 tokens)."""


def distillation(fraction: float, devices: int) -> DistillConfig:
    """Qwen3-8B to Qwen3-4B with a batch that feeds every device."""
    return _config("qwen3-4b", "qwen3-8b", fraction=fraction, batch_size=max(64, devices), epochs=2)


def _config(student: str, teacher: str | None, *, fraction: float = 1.0, **training: Any) -> DistillConfig:
    defaults = {"precision": "bf16", "gradient_checkpointing": True, "microbatch_tokens": 4096}
    return build(
        DistillConfig,
        {
            "student": {"model": student},
            "teacher": {} if teacher is None else {"model": teacher},
            "traces": {"source": "assumed/traces"},
            "truncation": {"lead_fraction": fraction},
            "supervision": {"preset": "prompt+cot+answer"},
            "training": {**defaults, "parallel": {"strategy": "shard"}, **training},
        },
    )


def scaling(counts: Sequence[int], device_counts: Sequence[int]) -> list[dict[str, Any]]:
    """The table: for every number of devices and cut the planner's first choice."""
    hardware, rows = DEVICES["h100"], []
    traces = AssumedTraces(prompt_tokens=150, cot_tokens=3250, answer_tokens=600)
    for fraction in FRACTIONS:
        for devices in device_counts:
            config = distillation(fraction, devices)
            load = traces.load(config)
            _, best, *_ = plan(config, load, hardware, devices)
            models = models_of(best.config, hardware)
            for count in counts:
                found = estimate(best.config, models, load._replace(traces=count), hardware, devices)
                rows.append(_row(found, count, fraction, load))
    return sorted(rows, key=lambda row: (row["traces"], -row["lead_fraction"], row["devices"]))


def _row(found: Estimate, traces: int, fraction: float, load: Load) -> dict[str, Any]:
    return {"traces": traces, "lead_fraction": fraction, "tokens_a_trace": load.tokens} | found.as_dict()


class Check(NamedTuple):
    """A published run."""

    run: str
    quantity: str
    predicted: float
    low: float
    """Published, or the low end of what follows from it."""
    high: float
    assumed: str

    @property
    def ratio(self) -> float:
        """Predicted over published; 1 inside a range."""
        return self.predicted / min(max(self.predicted, self.low), self.high)

    @property
    def published(self) -> str:
        """For people."""
        return f"{self.low:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"


def checks() -> list[Check]:
    """Published runs, planned."""
    return [_s1(), _sky_t1(), _mixlm(), *_essence(), _liger()]


def _hours(config: DistillConfig, load: Load, hardware: str, devices: int) -> Estimate:
    machine = DEVICES[hardware]
    return estimate(config, models_of(config, machine), load, machine, devices)


def _s1() -> Check:
    traces = AssumedTraces(count=1000, prompt_tokens=200, cot_tokens=4000, answer_tokens=500)
    config = _config("qwen2.5-32b", None, epochs=5, batch_size=16, microbatch_tokens=8192)
    found = _hours(config, traces.load(config), "h100", 16)
    return Check(
        "s1-32B: 1,000 traces on 16 H100",
        "minutes",
        60 * found.hours,
        26.0,
        26.0,
        "5 epochs, 16 sequences a step, 4,700 tokens a trace",
    )


def _sky_t1() -> Check:
    traces = AssumedTraces(count=16_400, prompt_tokens=200, cot_tokens=3000, answer_tokens=800)
    config = _config("qwen2.5-32b", None, epochs=3, batch_size=96, microbatch_tokens=8192)
    found = _hours(config, traces.load(config), "h100", 8)
    return Check(
        "Sky-T1-32B for $450",
        "GPU-hours",
        found.device_hours,
        112.0,
        225.0,
        "$2 to $4 an H100-hour, 3 epochs, 4,000 tokens a trace; ZeRO-3 with offload there",
    )


def _mixlm() -> Check:
    traces = AssumedTraces(count=70_000_000, prompt_tokens=100, cot_tokens=899, answer_tokens=1)
    training = {"epochs": 1, "batch_size": 1024, "microbatch_tokens": 16384, "gradient_checkpointing": False}
    config = _config("qwen3-0.6b", None, **training)
    found = _hours(config, traces.load(config), "h100", 64)
    assumed = "a student of 0.6B, 1,000 tokens an example, no teacher"
    return Check("MixLM: 70B tokens on 64 H100", "GPU-hours", found.device_hours, 700.0, 700.0, assumed)


def _essence() -> list[Check]:
    """8B to 4B on 4 H100: said to need 80 GB whole and to fit 40 GB cut in half, all logits materialised."""
    found = []
    for fraction, low, high in ((1.0, 40.0, 80.0), (0.5, 0.0, 40.0)):
        traces = AssumedTraces(count=8000, prompt_tokens=150, cot_tokens=3346, answer_tokens=600)
        config = _config("qwen3-4b", "qwen3-8b", fraction=fraction, epochs=2, batch_size=4)
        load = traces.load(config)
        planned = _hours(config, load, "h100", 4)
        # Their teacher is kept in bf16, and their loss holds all logits of both models.
        teacher = planned.memory["teacher"] / 2
        held = {**planned.memory, "teacher": teacher, "loss": NAIVE_LOSS_BYTES * load.longest * 151_936}
        name = f"Distilling the Essence, 8B -> 4B on 4 devices, lead fraction {fraction:g}"
        found.append(
            Check(name, "GB a device", sum(held.values()) / 1e9, low, high, "one sequence of at most 4,096 tokens")
        )
    return found


def _liger() -> Check:
    """Head and JSD of 8,192 tokens, widths 2048 and 4096, V = 128,256, bf16 on an H100."""
    student = frozen_sizes(config_of("llama-3.2-1b"))._replace(is_head_trainable=True)
    teacher = frozen_sizes(config_of("llama-3.1-8b"))
    flops = head_flops(student, 8192) + head_forward_flops(teacher, 8192)
    seconds = flops / DEVICES["h100"].rate("bf16")
    return Check("Liger chunked JSD: head and loss of 8,192 tokens", "ms", 1000 * seconds, 60.7, 60.7, "products only")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    lines = []
    for row in rows:
        parallel = row["parallel"]
        tensor = parallel["tensor_parallel_size"]
        size = parallel["shard_size"] or row["devices"] // tensor
        layout = "replicated" if parallel["strategy"] == "replicate" else f"{size} shards"
        layout += f" x {tensor} products" if tensor > 1 else ""
        lines.append(
            [
                f"{row['traces']:,}",
                f"{row['lead_fraction']:g}",
                str(row["devices"]),
                f"{layout}, {'recomputed' if row['gradient_checkpointing'] else 'kept'}, {row['microbatch_tokens']:,}",
                f"{row['memory_bytes']['total'] / 1e9:.0f}",
                f"{row['step_seconds']:.2f}",
                f"{row['message_seconds']:.2f}",
                f"{row['hours']:.2f}",
                f"{row['device_hours']:,.0f}",
            ]
        )
    columns = [
        "traces", "lead fraction", "GPUs", "shards, activations, micro-batch tokens", "GB a GPU", "s a step",
        "s of messages", "hours", "GPU-hours",
    ]  # fmt: skip
    return markdown(columns, lines)


def checks_table(found: Sequence[Check]) -> str:
    """For people."""
    lines = [[c.run, c.quantity, f"{c.predicted:.3g}", c.published, f"{c.ratio:.2f}", c.assumed] for c in found]
    return markdown(["published run", "in", "predicted", "published", "ratio", "assumed"], lines)


def main() -> None:
    """Plan, and set beside what is published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer devices and traces")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    traces, devices = (TRACE_COUNTS[:1], DEVICE_COUNTS[::3]) if options.quick else (TRACE_COUNTS, DEVICE_COUNTS)
    rows = scaling(traces, devices)
    found = checks()
    halves = [
        cut["device_hours"] / whole["device_hours"]
        for whole in rows
        for cut in rows
        if (whole["lead_fraction"], cut["lead_fraction"]) == (1.0, 0.5)
        and (whole["traces"], whole["devices"]) == (cut["traces"], cut["devices"])
    ]
    ratios = [check.ratio for check in found]
    keys = {
        "half_over_whole_device_hours": statistics.median(halves),
        "published_ratio_min": min(ratios),
        "published_ratio_max": max(ratios),
        "published_ratio_median": statistics.median(ratios),
    }
    header = conditions(1, ["torch", "transformers"])
    details = {"scaling": rows, "published": [check._asdict() | {"ratio": check.ratio} for check in found]}
    publish("scaling", __doc__ or "", header, f"{table(rows)}\n\n{checks_table(found)}", keys, details, options.out)


if __name__ == "__main__":
    main()
