"""One distillation epoch of smollm2-135m against TRL 1.16's GKD trainer: tokens a second and peak memory.

Regime: 64 gsm_symbolic traces, rendered by limbeck for both sides, batch 8, float32 on a CPU, AdamW, forward KL over
thought and answer, gradient norm clipped at 1. The teacher is the same model; the student starts from it with 1 % of
noise, so that the two sides' losses can be compared. Optimizer steps count; loading does not. Tokens are real ones.

Peer: `trl.experimental.gkd.GKDTrainer`, unmodified, with its own collator, on the same token ids in the same order.
Options that make it exactly this task: lmbda 0 and seq_kd false (the given traces, nothing generated), beta 0 (forward
KL), temperature 1; bf16 and gradient checkpointing, on in TRL by default, are off, which makes it faster.

Ours: limbeck's own loop with its defaults. `live` runs the teacher beside the student, as TRL does; `cached` reads a
teacher cache; `cot_only` has a live teacher and supervises the thought alone.

Bound: the products. 6 FLOPs a weight and token for the student, 2 for a live teacher, less where limbeck skips what
cannot change the result (the head at unsupervised positions; what models/lean.py leaves out). `mfu` is training FLOPs a
second, by the ledger's formulas and of what was computed only, over those of plain torch.mm on the model's shapes in
the same process.

The epoch is cut into parts of whole batches. Every part is trained by all four in turn, the order reversed every other
time, each in a fresh process: one step on 8 beginnings of 16 tokens to warm up, then the part's steps, timed. Ratios
are medians over the parts; peak memory (VmHWM of the process) is the largest of all parts.

    .venv-peers/bin/python benchmarks/train_vs_trl.py [--quick] [--threads 2] [--parts 4] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _process import (
    LEARNING_RATE,
    WARM_UP_TOKENS,
    conditions,
    fresh,
    gsm_traces,
    markdown,
    product_flops_per_second,
    publish,
    render_traces,
    save_models,
    set_up,
)

from limbeck.distill import train
from limbeck.models.load import load_model, load_tokenizer
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig, TeacherCache
from limbeck.teacher.live import LiveTeacher
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import make_example
from limbeck.traces.sample import PROMPT, Sample
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.truncate import TruncationConfig

SUPERVISION = {"live": "cot+answer", "cached": "cot+answer", "cot_only": "cot"}
KEYS = {"live": "", "cached": "_cached_teacher", "cot_only": "_cot_only"}
Batches = Sequence[Sequence[Sample]]


def ours(mode: str, models: Path, store: Path, warm_up: Sequence[Sample], batches: Batches, threads: int) -> dict:
    """Train the batches with limbeck."""
    is_cached = mode == "cached"
    teacher = TeacherCache(store) if is_cached else LiveTeacher(load_model(str(models / "teacher"), layout="packed"))
    supervision = SupervisionConfig(preset=SUPERVISION[mode])
    examples = [[make_example(sample, TruncationConfig(), supervision) for sample in batch] for batch in batches]
    run = set_up(models / "student", teacher, warm_up, examples, threads)
    rows = [train._step(run, 0).row()]
    flops = sum(run.ledger.flops.values())
    start = time.perf_counter()
    rows += [train._step(run, number).row() for number in range(1, len(run.steps))]
    seconds = time.perf_counter() - start
    answer = {
        "seconds": seconds,
        "flops": sum(run.ledger.flops.values()) - flops,
        "losses": [row["loss"] for row in rows],
        "phases": run.ledger.seconds,
    }
    if mode == "live":
        tokens = sum(len(sample) for sample in batches[0])
        answer["product_flops_per_second"] = product_flops_per_second(run, tokens, tokens // 2, repeats=3)
    return answer


def trl(models: Path, warm_up: Sequence[Sample], batches: Batches, threads: int) -> dict:
    """Train the batches with TRL."""
    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Clock(transformers.TrainerCallback):
        """When each step ended."""

        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(str(models / "student"))
    samples = [_beginning(sample) for sample in warm_up] + [sample for batch in batches for sample in batch]
    records = [
        {
            "prompt": tokenizer.decode(sample.input_ids[sample.segment_ids == PROMPT]),
            "input_ids": sample.input_ids.tolist(),
            "completion_mask": (sample.segment_ids != PROMPT).astype(int).tolist(),
        }
        for sample in samples
    ]
    with tempfile.TemporaryDirectory() as scratch:
        config = GKDConfig(
            output_dir=scratch,
            lmbda=0.0,
            seq_kd=False,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=len(warm_up),
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32),
            teacher_model=transformers.AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32),
            args=config,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"seconds": Clock.times[-1] - Clock.times[0], "losses": losses}


def store_targets(models: Path, store: Path, samples: Sequence[Sample], threads: int) -> dict:
    """Write a cache of the teacher at all positions of all samples; the warm-up reads those of the prompt."""
    torch.set_num_threads(threads)
    asked = [Stored(sample.input_ids, np.arange(len(sample)) > 0) for sample in samples]
    write_cache(str(models / "teacher"), CacheConfig(), asked, store, CacheConfig())
    return {}


def _beginning(sample: Sample) -> Sample:
    """The warm-up's cut, its tokens marked as completion but for the first, which is no target for limbeck either."""
    segments = sample.segment_ids[:WARM_UP_TOKENS].copy()
    segments[1:] = PROMPT + 1
    return Sample(
        input_ids=sample.input_ids[:WARM_UP_TOKENS],
        segment_ids=segments,
        ending_start=WARM_UP_TOKENS,
        derivation_end=None,
        trace_key=sample.trace_key,
        source=sample.source,
    )


def measure(quick: bool, parts: int, threads: int, scratch: Path) -> list[dict[str, Any]]:
    """All measurements: for every part of the epoch its tokens and the four sides' answers."""
    fresh(save_models, scratch)
    samples = render_traces(gsm_traces(64), scratch / "student")
    batch_size = 4 if quick else 8
    if quick:
        samples = sorted(samples, key=len)[:batch_size]
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    size = -(-len(batches) // (1 if quick else parts))
    store = scratch / "targets"
    fresh(store_targets, scratch, store, samples, threads)
    results = []
    for number, start in enumerate(range(0, len(batches), size)):
        part = batches[start : start + size]
        warm_up = part[0]
        calls = {
            "trl": (trl, scratch, warm_up, part, threads),
            **{mode: (ours, mode, scratch, store, warm_up, part, threads) for mode in SUPERVISION},
        }
        answers = {side: fresh(*calls[side]) for side in (calls if number % 2 == 0 else reversed(calls))}
        results.append({"tokens": sum(len(sample) for batch in part for sample in batch), **answers})
    return results


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The keys of the claims."""
    keys: dict[str, float] = {}
    for mode, suffix in KEYS.items():
        ratios = [part["trl"]["seconds"] / part[mode]["seconds"] for part in results]
        keys[f"tokens_per_second_over_trl{suffix}"] = statistics.median(ratios)
    keys["peak_memory_over_trl"] = _peak(results, "live") / _peak(results, "trl")
    keys["mfu"] = statistics.median(
        part["live"]["flops"] / part["live"]["seconds"] / part["live"]["product_flops_per_second"] for part in results
    )
    for side in ("trl", *KEYS):
        keys[f"{side}_tokens_per_second"] = statistics.median(
            part["tokens"] / part[side]["seconds"] for part in results
        )
        keys[f"{side}_peak_bytes"] = _peak(results, side)
    keys["product_gflops_per_second"] = statistics.median(
        part["live"]["product_flops_per_second"] / 1e9 for part in results
    )
    keys["largest_loss_difference"] = max(
        abs(mine - theirs) / abs(theirs)
        for part in results
        for mine, theirs in zip(part["live"]["losses"], part["trl"]["losses"], strict=True)
    )
    return {name: float(f"{value:.4g}") for name, value in keys.items()}


def table_of(results: Sequence[dict[str, Any]], keys: dict[str, float]) -> str:
    """One row a side."""
    rows = []
    for side in ("trl", *KEYS):
        speeds = [part["tokens"] / part[side]["seconds"] for part in results]
        ratios = [part["trl"]["seconds"] / part[side]["seconds"] for part in results]
        rows.append(
            [
                side,
                f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{_peak(results, side) / 1e9:.2f}",
                f"{_peak(results, side) / _peak(results, 'trl'):.2f}",
            ]
        )
    columns = ["side", "tokens/s: median (range)", "over TRL", "peak GB", "over TRL"]
    products = f"Plain products: {keys['product_gflops_per_second']:.0f} GFLOP/s; mfu of `live` {keys['mfu']:.2f}."
    losses = f"Losses of `live` and TRL differ by at most {keys['largest_loss_difference']:.1e} of their value."
    return f"{markdown(columns, rows)}\n\n{products}\n{losses}"


def _peak(results: Sequence[dict[str, Any]], side: str) -> float:
    return max(part[side]["peak_bytes"] for part in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one batch of the 4 shortest traces, under 60 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", type=int, default=4, help="parts of the epoch, each a fresh process a side")
    parser.add_argument("--out", type=Path, help="directory for train_vs_trl.md and train_vs_trl.json")
    options = parser.parse_args()
    header = conditions(options.threads, ("torch", "transformers", "trl"))
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(options.quick, options.parts, options.threads, Path(scratch))
    keys = summarise(results)
    publish("train_vs_trl", __doc__, header, table_of(results, keys), keys, results, options.out)


if __name__ == "__main__":
    main()
