"""What every device is held to: kinds of training runs, and all stages; run on the pretend device and on real ones."""

from __future__ import annotations

import copy

import pytest
from tiny_runs import metrics_of, run_config, save_model

from limbeck.commands import COMMANDS
from limbeck.config import build
from limbeck.distill import train
from limbeck.flags import apply_fields
from limbeck.placement import asking

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "combined_kl")
RUNS = {
    "grouped queries": {},
    "bf16": {"training.precision": "bf16"},
    "norms of heads": {"student.model": "qwen3", "teacher.model": "qwen3"},
    "padded": {"training.layout": "padded"},
    "text alone": {"teacher.model": None},
    "sequences alike": {"loss.normalization": "sequence_mean", "loss.temperature": 2.0},
    "what the teacher doubts": {"supervision.select": {"by": "teacher_entropy", "fraction": 0.5}},
    "what differs most": {"supervision.select": {"by": "divergence", "fraction": 0.5}},
    "adapters": {"lora.rank": 2},
    "two teachers": {"teacher.others": [{"model": "qwen3", "weight": 0.5}]},
    "recomputed": {"student.model": "qwen3", "training.gradient_checkpointing": True},
    "its own texts": {"teacher.model": "qwen3", "on_policy.start_fraction": 0.0, "on_policy.max_new_tokens": 6},
    **{f"divergence {name}": {"loss.divergence.name": name} for name in DIVERGENCES[1:]},
    **{f"optimizer {name}": {"optimizer.name": name} for name in ("sgd", "asgld", "asg", "perturb(adamw)")},
}
CHAIN = {"source": "builtin:chain", "num_traces": 12, "chain_min_steps": 2, "chain_max_steps": 2}
CALIBRATION = {"traces": CHAIN, "sequences": 4, "sequence_length_tokens": 24}
SCRATCH = {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}}
RANK = {
    "student": SCRATCH,
    "data": {"source": "synthetic", "synthetic": {"requests": 30, "members": 8, "items": 12, "candidates": 3}},
    "vocabulary_tokens": 300,
    "training": {"max_steps": 2, "batch_size": 4},
}
PRUNE = {"model": "llama", "calibration": CALIBRATION}
STAGES = {
    "traces generate": {"prompts": CHAIN, "model": "llama", "max_new_tokens": 5, "on_bad": "keep"},
    "traces probe": {"traces": CHAIN, "teacher": "llama"},
    "teacher cache": {"traces": CHAIN, "teacher": "llama"},
    "teacher cache hidden": {"traces": CHAIN, "teacher": "qwen3", "cache": {"mode": "hidden"}},
    "teacher cache sampled": {"traces": CHAIN, "teacher": "llama", "cache": {"mode": "sampled"}},
    "evaluate": {
        "model": "llama",
        "problems": CHAIN,
        "max_new_tokens": 5,
        "checker": "exact",
        "perplexity": {"text": "chain", "reference": "qwen3"},
    },
    "moments": {"model": "llama", "calibration": CALIBRATION},
    "prune": {**PRUNE, "pattern": "2:4", "method": "alps"},
    "prune neurons": {**PRUNE, "neuron_sparsity": 0.25, "multiple_of": 8},
    "prune layers": {**PRUNE, "method": "depth", "drop_layers": 1},
    "quantize": {**PRUNE, "group_size": 16, "method": "gptq"},
    "quantize awq": {**PRUNE, "group_size": 16, "method": "rtn", "equalization": "awq"},
    "quantize w8a8": {**PRUNE, "scheme": "w8a8", "equalization": "smoothquant"},
    "rank train": RANK,
}


def save_models(folder):
    """A model with grouped queries of each kind, by its name."""
    shape = {"num_heads": 4, "kv_heads": 2, "tied": False}
    with asking("cpu"):
        return {kind: save_model(folder / kind, kind=kind, sharpness=8.0, **shape) for kind in ("llama", "qwen3")}


def config_of(models, changes):
    whole = {"student.model": "llama", "teacher.model": "llama", "training.precision": "float32", **changes}
    named = copy.deepcopy(whole)
    for path, value in named.items():
        if path.endswith(".model") and value is not None:
            named[path] = models[value]
    for other in named.get("teacher.others", []):
        other["model"] = models[other["model"]]
    return run_config({path: value for path, value in named.items() if value is not None})


def losses(config, out, device):
    with asking(device, "float32"):
        train.run(config, out)
    return [row["loss"] for row in metrics_of(out)]


def named(tree, models):
    if isinstance(tree, dict):
        return {key: named(value, models) for key, value in tree.items()}
    return models.get(tree, tree) if isinstance(tree, str) else tree


def stage_of(name):
    return max((n for n in COMMANDS if name == n or name.startswith(n + " ")), key=len)


def run_stage(name, fields, out):
    stage = COMMANDS[stage_of(name)].load()
    given = [(field, value, field) for field, value in fields.items()]
    return stage.run(build(stage.config, apply_fields(stage.config, {}, given)), out)


def compare(found, expected):
    for name, value in expected.items():
        if isinstance(value, float) and "second" not in name and "bytes" not in name:
            assert found[name] == pytest.approx(value, rel=0.02, abs=0.02), name
