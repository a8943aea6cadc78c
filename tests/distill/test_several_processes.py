"""`limbeck distill` on 2 and 4 processes is the run on one: replicated or in parts, interrupted or not."""

import shutil

import pytest
import torch
from parallel_runs import EXACT, assert_same, distill, torchrun, weight_difference
from safetensors.torch import load_file, save_file
from tiny_runs import SHAPE, metrics_of, run_config, save_model, weights_of

from limbeck.checkpoint import Checkpoint
from limbeck.config import build, to_dict
from limbeck.distill import caching, train
from limbeck.models.load import load_model
from limbeck.stage import How

STEPS, CUTS = 6, (2, 4)
SHARD = {"strategy": "shard"}
HEAD = {"strategy": "shard", "shard_head": True}
LANGEVIN = {
    "optimizer.name": "asgld",
    "optimizer.learning_rate": 1e-2,
    "optimizer.noise.mode": "constant",
    "optimizer.noise.noise_radius": 0.05,
    "optimizer.noise.quiet_fraction": 0.0,
}
NOISE_ALONE = {
    "optimizer.name": "sgld",
    "optimizer.learning_rate": 1e-3,
    "optimizer.noise.temperature": 1e-2,
    "optimizer.noise.quiet_fraction": 0.0,
    # Gradients of this norm vanish beside a weight, so that nothing but the noise moves it.
    "training.clip_norm": 1e-30,
}
CASES = {
    # name: (processes, parallel, other changes)
    "replicate": (2, {}, {}),
    "replicate, teacher in parts": (2, {"teacher_strategy": "shard"}, {}),
    "shard": (2, SHARD, {}),
    "shard, teacher whole": (2, {**HEAD, "teacher_strategy": "replicate"}, {}),
    "shard, no teacher": (2, HEAD, {"teacher.model": None}),
    "shard, recomputation": (2, SHARD, {"training.gradient_checkpointing": True}),
    "shard, padded": (2, HEAD, {"training.layout": "padded"}),
    "shard, divergence of the student": (2, HEAD, {"loss.divergence.name": "jsd", "loss.temperature": 2.0}),
    "shard, many micro-batches": (2, HEAD, {"training.microbatch_tokens": 60}),
    "shard, a process without examples": (2, HEAD, {"training.batch_size": 1}),
    "shard, adapters": (2, HEAD, {"lora.rank": 2}),
    "shard, selection": (2, SHARD, {"supervision.select.by": "divergence", "supervision.select.fraction": 0.5}),
    "shard, langevin": (2, HEAD, LANGEVIN),
    "shard, sgd": (2, SHARD, {"optimizer.name": "sgd"}),
    "shard, best kept": (2, SHARD, {"training.keep_best": "kd", "training.validate_every_steps": 2}),
    "four replicate": (4, {}, {}),
    "four shard": (4, HEAD, {"training.gradient_checkpointing": True}),
    "four, langevin": (4, HEAD, LANGEVIN),
    "four, copies of two": (4, {**HEAD, "shard_size": 2}, {}),
    "four, teacher in groups of two": (4, {**HEAD, "teacher_shard_size": 2}, {}),
    "three": (3, HEAD, {}),
    # AdamW would divide by gradients that are rounding alone, as those of fresh attention layers are.
    "shard, start from scratch": (
        2,
        HEAD,
        {"student.model": None, "student.scratch": {**SHAPE, "seed": 3}, "optimizer.name": "sgd"},
    ),
}
TENSOR = {
    "tensor parallel": (2, {**SHARD, "tensor_parallel_size": 2}, {}),
    "tensor and data parallel": (4, {**HEAD, "tensor_parallel_size": 2}, {}),
    "tensor parallel, langevin": (4, {**SHARD, "tensor_parallel_size": 2}, LANGEVIN),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shape = {"kind": "qwen3", "kv_heads": 2}
    teacher = save_model(folder / "teacher", sharpness=30.0, tied=False, hidden_size=24, **shape)
    return {"teacher.model": teacher, "student.model": save_model(folder / "student", sharpness=3.0, seed=11, **shape)}


@pytest.fixture(scope="module")
def caches(models, tmp_path_factory):
    """Of the teacher, by what they keep."""
    folder = tmp_path_factory.mktemp("caches")
    for mode in ("top_k", "hidden"):
        caching.run(build(caching.CacheStageConfig, {
            "teacher": models["teacher.model"],
            "traces": to_dict(run_config().traces),
            "segments": "prompt+cot+answer",
            "cache": {"mode": mode},
        }), folder / mode)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """From changes to the run on one process, made once."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = folder / str(len(made))
            train.run(config(models, changes), made[key])
        return made[key]

    return run


def config(models, changes, parallel=None):
    settings = {f"training.parallel.{name}": value for name, value in (parallel or {}).items()}
    base = {**models, "training.max_steps": STEPS, "training.save_every_steps": 1}
    return run_config({**base, **changes, **settings})


def test_in_parts_with_everything_is_one_process(models, alone, tmp_path):
    """Student, teacher and head in parts, recomputation, an odd number of examples: losses, weights, cost, model."""
    changes = {"training.gradient_checkpointing": True, "training.microbatch_tokens": 120}
    one, two = alone(changes), tmp_path / "two"
    distill(config(models, changes, HEAD), two, 2)
    assert_same(two, one)
    mine, theirs = (Checkpoint(out).manifest["ledger"] for out in (two, one))
    for name in ("tokens", "supervised_tokens", "sequences", "steps"):
        assert mine[name] == theirs[name]
    assert mine["flops"]["head"] == theirs["flops"]["head"]
    assert load_model(str(two)).config.num_hidden_layers == 2
    assert {path.name for path in tmp_path.iterdir()} == {"two"}


def test_noise_has_the_same_bits_in_parts(models, alone, tmp_path):
    out = distill(config(models, NOISE_ALONE, HEAD), tmp_path / "two", 2)
    assert_same_bits(out, alone(NOISE_ALONE), models)


def test_goes_on_with_fewer_processes(models, alone, tmp_path):
    out, run = tmp_path / "out", config(models, {}, HEAD)
    distill(run, out, 2, stop=CUTS[0])
    assert len(metrics_of(tmp_path / "out.partial")) == CUTS[0]
    train.run(run, out, how=How(resume=True))
    assert_same(out, alone({}))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(models, alone, tmp_path, case):
    processes, parallel, changes = CASES[case]
    out = distill(config(models, changes, parallel), tmp_path / "out", processes)
    assert_same(out, alone(changes))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["top_k", "hidden"])
def test_a_cached_teacher_and_a_head_in_parts(models, alone, caches, tmp_path, mode):
    """With one example a step, one of the processes has none and asks the cache for none."""
    changes = {"teacher.model": None, "teacher.cache": str(caches / mode), "training.batch_size": 1}
    out = distill(config(models, changes, HEAD), tmp_path / "out", 2)
    assert_same(out, alone(changes))


@pytest.mark.slow
def test_zeros_of_a_pruned_student_stay_in_parts(models, tmp_path):
    pruned = tmp_path / "pruned"
    shutil.copytree(models["student.model"], pruned)
    weights = load_file(pruned / "model.safetensors")
    zeros = {name: torch.arange(w.numel()).view_as(w) % 2 == 0 for name, w in weights.items() if "_proj" in name}
    weights |= {name: weights[name].masked_fill(zero, 0) for name, zero in zeros.items()}
    save_file(weights, pruned / "model.safetensors", {"format": "pt"})
    changes = {"student.model": str(pruned), "student.keep_zeros": True, **LANGEVIN}
    train.run(config(models, changes), tmp_path / "one")
    out = distill(config(models, changes, HEAD), tmp_path / "out", 2)
    assert_same(out, tmp_path / "one")
    for name, weight in weights_of(out).items():
        if name in zeros:
            assert torch.equal(weight == 0, zeros[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("case", TENSOR)
def test_tensor_parallel_equals_one(models, alone, tmp_path, case):
    processes, parallel, changes = TENSOR[case]
    out = distill(config(models, changes, parallel), tmp_path / "out", processes)
    assert_same(out, alone(changes))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, HEAD], ids=["replicate", "shard"])
@pytest.mark.parametrize("changes", [{}, LANGEVIN], ids=["adamw", "langevin"])
def test_two_then_one_then_four_processes_are_one_run(models, alone, tmp_path, parallel, changes):
    out, run = tmp_path / "out", config(models, changes, parallel)
    distill(run, out, 2, stop=CUTS[0])
    distill(run, out, 1, stop=CUTS[1], resume=True)
    assert len(metrics_of(tmp_path / "out.partial")) == CUTS[1]
    distill(run, out, 4, resume=True)
    assert_same(out, alone(changes))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_noise_bits_on_any_number_of_processes(models, alone, tmp_path, processes):
    for name, parallel in {"whole": {}, "parts": SHARD}.items():
        out = distill(config(models, NOISE_ALONE, parallel), tmp_path / name, processes)
        assert_same_bits(out, alone(NOISE_ALONE), models)


@pytest.mark.slow
def test_the_command_under_torchrun(models, alone, tmp_path):
    out = torchrun(config(models, {}, HEAD), tmp_path / "out", 2)
    assert_same(out, alone({}))


def assert_same_bits(out, one, models):
    mine, theirs, start = weights_of(out), weights_of(one), load_model(models["student.model"]).state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
        assert not torch.equal(weight, start[name]), f"{name}: no noise"
    assert weight_difference(out, one) == 0.0 <= EXACT
