"""`limbeck distill` on 2 and 4 processes against 1: the same losses, weights, noise, and resumption on other numbers.

Regime: the command as a user types it, `torchrun --nproc-per-node N -m limbeck distill RECIPE`, gloo, float32 on a CPU;
a two-layer Qwen3-type student (width 16) and live teacher (width 24), 12 traces of the built-in task, recomputed
activations. Compared are all columns of metrics.jsonl, step by step, and the weights written at the end.

- `max_loss_difference_2`, `_4`: the largest absolute difference to the run on one process over all layouts (models
  replicated; student, teacher and head in parts; copies of two parts; a teacher in parts on its own mesh; tensor
  parallel), with AdamW and with ASGLD, whose noise is on in every step; 60 steps. With --quick: in parts, ASGLD.
- `reshard_weight_difference`: a run is killed on 2 processes, gone on with on 1 and killed again, and gone on with on 4
  to its end; the largest difference of its weights to those of the uninterrupted run on one.
- `noise_bits_equal`: whether SGLD with gradients scaled to nothing, so that noise alone moves the weights, ends with
  the same bits on 1, 2 and 4 processes, replicated and in parts.
- `seconds`: of the whole benchmark, most of which is starting processes.

Bound: 1e-6, what float32 sums in another order leave; noise: equal. There is no peer.

    python benchmarks/distributed.py [--quick] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from _process import conditions, markdown, publish
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from limbeck.models.tiny import symbol_tokenizer

SHARD = {"strategy": "shard", "shard_head": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicated": (2, {}),
    "in parts": (2, SHARD),
    "replicated, teacher in parts": (2, {"teacher_strategy": "shard"}),
    "tensor parallel": (2, {"strategy": "shard", "tensor_parallel_size": 2}),
    "replicated, four": (4, {}),
    "in parts, four": (4, SHARD),
    "copies of two parts": (4, {**SHARD, "shard_size": 2, "teacher_shard_size": 2}),
    "tensor and data parallel": (4, {**SHARD, "tensor_parallel_size": 2}),
}
QUICK = ("in parts",)
ASGLD = {
    "name": "asgld",
    "learning_rate": 0.01,
    "noise": {"mode": "constant", "noise_radius": 0.05, "quiet_fraction": 0.0},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {"name": "adamw", "learning_rate": 1e-3}, "asgld": ASGLD}
NOISE = {"name": "sgld", "learning_rate": 1e-3, "noise": {"temperature": 0.01, "quiet_fraction": 0.0}}
STEPS, NOISE_STEPS = 60, 6
LIMIT = 1e-6


def save_model(directory: Path, width: int, sharpness: float, tied: bool, seed: int) -> str:
    """A random Qwen3-type model with the built-in tokenizer."""
    config = Qwen3Config(
        vocab_size=56,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(directory)
    symbol_tokenizer().save_pretrained(directory)
    return str(directory)


class Runs:
    """Runs of one recipe below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: dict[str, Any] = {
            "student": {"model": save_model(folder / "student", 16, 3.0, True, 11)},
            "teacher": {"model": save_model(folder / "teacher", 24, 30.0, False, 7)},
            "traces": {"source": "builtin:chain", "num_traces": 12, "chain_min_steps": 1, "chain_max_steps": 3},
            "num_validation": 3,
        }

    def start(
        self, name: str, processes: int, parallel: Mapping[str, Any], optimizer: Mapping[str, Any], **training: Any
    ) -> subprocess.Popen[str]:
        """Begin a run, or go on with the one of that name."""
        settings = {
            "batch_size": 3,
            "microbatch_tokens": 120,
            "max_steps": STEPS,
            "seed": 5,
            "gradient_checkpointing": True,
            "save_every_steps": 1,
            "parallel": dict(parallel),
        }
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**self.base, "optimizer": dict(optimizer), "training": settings | training}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "limbeck", "distill", str(recipe)]
        return subprocess.Popen(
            [*command, "--out", str(self.folder / name), "--resume"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, *arguments: Any, **training: Any) -> Path:
        """A run to its end."""
        run = self.start(name, *arguments, **training)
        printed, _ = run.communicate(timeout=600)
        if run.returncode:
            raise SystemExit(f"{name}: {printed[-3000:]}")
        return self.folder / name

    def kill_after(self, step: int, name: str, *arguments: Any, **training: Any) -> int:
        """Kill all processes of a run as soon as it has saved a state of `step` or later; returns that state's step."""
        run = self.start(name, *arguments, **training)
        while run.poll() is None and self.saved(name) < step:
            time.sleep(0.01)
        if run.poll() is not None:
            raise SystemExit(f"{name}: ended before it could be killed; {run.communicate()[0][-3000:]}")
        run.terminate()  # torchrun ends its processes at once; plain Python does not handle the signal
        run.communicate()
        return self.saved(name)

    def saved(self, name: str) -> int:
        """Step of the newest state."""
        states = (self.folder / f"{name}.partial").glob("state-*")
        return max((int(path.name.removeprefix("state-")) for path in states), default=0)


def loss_difference(one: Path, other: Path) -> float:
    """Over steps and columns of metrics.jsonl."""
    mine, theirs = ([json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (one, other))
    return max(
        abs(a[name] - b[name]) for a, b in zip(mine, theirs, strict=True) for name in a | b if a[name] is not None
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    """As written."""
    return load_file(out / "model.safetensors")


def weight_difference(one: Path, other: Path) -> float:
    """Over all weights."""
    theirs = weights(other)
    return max(float((weight - theirs[name]).abs().max()) for name, weight in weights(one).items())


def compared(layout: str, optimizer: str, processes: int, out: Path, alone: Path) -> dict[str, Any]:
    """A row of the table."""
    row = {
        "layout": layout,
        "optimizer": optimizer,
        "processes": processes,
        "loss_difference": loss_difference(out, alone),
        "weight_difference": weight_difference(out, alone),
    }
    print(row, flush=True)
    return row


def reshard(runs: Runs, optimizer: str, alone: Path) -> dict[str, Any]:
    """2 processes, then 1, then 4, killed twice."""
    name, settings = f"{optimizer} resharded", OPTIMIZERS[optimizer]
    first = runs.kill_after(3, name, 2, SHARD, settings)
    second = runs.kill_after(first + 3, name, 1, SHARD, settings)
    out = runs.finish(name, 4, SHARD, settings)
    layout = f"in parts on 2, killed after step {first}, on 1, killed after step {second}, on 4"
    return {**compared(layout, optimizer, 4, out, alone), "is_resharded": True}


def compare(runs: Runs, quick: bool) -> list[dict[str, Any]]:
    """Every layout with every optimizer, and the resharded run, against one process."""
    rows = []
    for optimizer in ("asgld",) if quick else OPTIMIZERS:
        alone = runs.finish(f"{optimizer} alone", 1, {}, OPTIMIZERS[optimizer])
        for layout in QUICK if quick else LAYOUTS:
            processes, parallel = LAYOUTS[layout]
            out = runs.finish(f"{optimizer} {layout}", processes, parallel, OPTIMIZERS[optimizer])
            rows.append(compared(layout, optimizer, processes, out, alone))
        rows.append(reshard(runs, optimizer, alone))
    return rows


def noise(runs: Runs, quick: bool) -> bool:
    """Whether noise alone moves all weights to the same bits."""
    alone = weights(runs.finish("noise alone", 1, {}, NOISE, clip_norm=1e-30, max_steps=NOISE_STEPS))
    before = weights(Path(runs.base["student"]["model"]))
    if any(torch.equal(weight, before[name]) for name, weight in alone.items()):
        raise SystemExit("noise: a weight did not move")
    is_equal = True
    for processes in (2,) if quick else (2, 4):
        for name, parallel in [("parts", SHARD)] if quick else [("whole", {}), ("parts", SHARD)]:
            training = {"clip_norm": 1e-30, "max_steps": NOISE_STEPS}
            found = weights(runs.finish(f"noise {processes} {name}", processes, parallel, NOISE, **training))
            is_equal &= all(torch.equal(weight, found[key]) for key, weight in alone.items())
    return is_equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    header, began = conditions(1, ["torch", "transformers"]), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        rows = compare(runs, options.quick)
        is_equal = noise(runs, options.quick)
    keys = {
        **{
            f"max_loss_difference_{n}": max(row["loss_difference"] for row in rows if row["processes"] == n)
            for n in (2, 4)
        },
        "reshard_weight_difference": max(row["weight_difference"] for row in rows if "is_resharded" in row),
        "noise_bits_equal": is_equal,
        "seconds": round(time.perf_counter() - began, 1),
    }
    table = markdown(
        ["layout", "optimizer", "processes", "losses differ by", "weights differ by"],
        [
            [
                row["layout"],
                row["optimizer"],
                str(row["processes"]),
                f"{row['loss_difference']:.1e}",
                f"{row['weight_difference']:.1e}",
            ]
            for row in rows
        ],
    )
    publish("distributed", __doc__ or "", header, table, keys, rows, options.out)
    numbers = [keys[f"max_loss_difference_{n}"] for n in (2, 4)] + [keys["reshard_weight_difference"]]
    if max(numbers) > LIMIT or not is_equal:
        raise SystemExit("differs by more than rounding")


if __name__ == "__main__":
    main()
