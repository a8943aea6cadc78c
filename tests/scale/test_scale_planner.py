"""The planner: what fits, what is faster, and that its flags are those of `limbeck distill`."""

import itertools
import json

import pytest

from limbeck.cli import main
from limbeck.config import build, to_dict
from limbeck.cost.hardware import DEVICES, hardware_of
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError
from limbeck.flags import apply_flags
from limbeck.scale.cluster import Models, estimate, trace_flops
from limbeck.scale.planner import AssumedTraces, PlanConfig, changes, flags_of, models_of, plan, run

H100 = DEVICES["h100"]
TREE = {
    "student": {"model": "qwen3-4b"},
    "teacher": {"model": "qwen3-8b"},
    "traces": {"source": "not/read"},
    "training": {
        "batch_size": 64,
        "microbatch_tokens": 8192,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "parallel": {"strategy": "shard"},
    },
}


def run_of(**training) -> DistillConfig:
    return build(DistillConfig, {**TREE, "training": {**TREE["training"], **training}})


@pytest.fixture(scope="module")
def models() -> Models:
    return models_of(run_of(), H100)


LOAD = AssumedTraces().load(run_of())


def test_flops_of_a_trace_are_those_of_the_cost_model(models):
    """4 student forwards and 1 of the teacher, forward = 2 (weights + V D) L + 4 A L^2 as the ledger counts it."""
    load = AssumedTraces(prompt_tokens=1, cot_tokens=4000, answer_tokens=95).load(run_of())
    # knowledge: 218 TFLOP a sequence of 4096 tokens with attention counted causally, every position in the head.
    assert trace_flops(models, load) == pytest.approx(218e12 * 1.06, rel=0.06)


def test_memory_falls_and_time_falls_with_devices(models):
    found = [estimate(run_of(), models, LOAD, H100, devices) for devices in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(found):
        assert more.peak_bytes < fewer.peak_bytes
        assert more.hours < fewer.hours
        assert more.memory["optimizer"] * 2 == pytest.approx(fewer.memory["optimizer"], rel=1e-6)
    assert all(one.peak_bytes == sum(one.memory.values()) for one in found)
    assert [one.flops for one in found] == [found[0].flops] * 4


def test_sharding_tensor_parallelism_and_shorter_traces_save_memory(models):
    whole = estimate(run_of(parallel={}), models, LOAD, H100, 8)
    shard = estimate(run_of(), models, LOAD, H100, 8)
    products = estimate(run_of(parallel={"strategy": "shard", "tensor_parallel_size": 8}), models, LOAD, H100, 8)
    assert whole.peak_bytes > shard.peak_bytes and not whole.fits and shard.fits
    assert products.waiting_seconds > 0 and shard.waiting_seconds == 0
    half = build(DistillConfig, {**to_dict(run_of()), "truncation": {"lead_fraction": 0.5}})
    shorter = AssumedTraces().load(half)
    assert shorter.tokens == pytest.approx(LOAD.tokens / 2, abs=1)
    cut = estimate(half, models, shorter, H100, 8)
    assert 0.4 < cut.flops / shard.flops < 0.5


def test_slow_links_show(models):
    fast, slow = (estimate(run_of(), models, LOAD, H100._replace(link_bandwidth=b), 8) for b in (450e9, 5e9))
    assert slow.step_seconds > fast.step_seconds


def test_idle_devices_are_reported(models):
    found = estimate(run_of(batch_size=8), models, LOAD, H100, 64)
    assert found.busy_fraction == pytest.approx(8 / 64)


def test_plans_fit_and_their_flags_make_the_planned_run():
    config = run_of(parallel={}, gradient_checkpointing=False)
    own, *best = plan(config, LOAD, H100, 8)
    assert not own.fits and best and all(one.fits for one in best)
    assert best[0].hours == min(one.hours for one in best) or best[0].hours < 1.01 * min(one.hours for one in best)
    words = [word for flag in flags_of(config, best[0].config) for word in flag.split(" ")]
    again = build(DistillConfig, apply_flags(DistillConfig, to_dict(config), words))
    assert again.training == best[0].config.training
    assert changes(config, best[0]) == len(words) // 2


def test_a_teacher_that_does_not_fit_is_cached_first():
    config = build(DistillConfig, {**TREE, "student": {"model": "qwen3-0.6b"}, "teacher": {"model": "qwen3-32b"}})
    own, *best = plan(config, LOAD, H100, 1)
    assert not own.fits
    assert best[0].config.teacher.model is None
    assert any(flag.startswith("--teacher.cache") for flag in flags_of(config, best[0].config))


def test_nothing_fits():
    config = build(DistillConfig, {**TREE, "student": {"model": "llama-3.3-70b"}, "teacher": {}, "loss": {}})
    own, *best = plan(config, LOAD, DEVICES["l40s"], 1)
    assert not own.fits and not best


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"devices": 0}, "devices"), ({"efficiency": 1.5}, "efficiency"), ({"assume": {"count": 0}}, "count")],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(PlanConfig, {"distill": TREE, **changes})


def test_unknown_hardware_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'h100'"):
        hardware_of("h10")


def test_a_laptop_stands_alone():
    with pytest.raises(ConfigError, match="no links"):
        run(build(PlanConfig, {"distill": TREE, "devices": 2}), DEVICES["laptop-cpu"])


def test_plan_on_the_command_line(capsys):
    arguments = ["plan", "recipes/qwen3.yaml", "--hardware", "h100", "--devices", "8", "--assume.count", "17000"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "plan 1" in shown and "assumed: h100" in shown
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["plans"][0]["fits"] and tree["plans"][0]["memory_bytes"]["total"] > 0
