"""Predicted FLOPs and tokens are those of the ledger of a run that was made, to the last one."""

import json

import pytest
from tiny_runs import run_config, save_model

from limbeck.cli import main
from limbeck.cost.hardware import DEVICES, Hardware
from limbeck.cost.prediction import Prediction, flops_of, total
from limbeck.cost.shapes import config_of
from limbeck.distill import train
from limbeck.distill.config import DistillConfig
from limbeck.distill.predict import assumed_samples, predict_distill
from limbeck.ledger import FLOP_PARTS
from limbeck.models.tiny import symbol_tokenizer

HERE = Hardware("here", {"float32": 5e10}, 1e10, 8e9)
CASES = {
    "text only": {},
    "live teacher": {"teacher.model": "tiny-teacher"},
    "only the teacher's word": {"teacher.model": "tiny-teacher", "loss.kd_ratio": 1.0},
    "half of every sequence": {"truncation.lead_fraction": 0.5, "teacher.model": "tiny-teacher"},
    "answers": {"supervision.preset": "answer"},
    "small micro-batches": {"training.microbatch_tokens": 60},
    "padded": {"training.layout": "padded", "teacher.model": "tiny-teacher"},
    "recomputed": {"training.gradient_checkpointing": True},
    "bf16": {"training.precision": "bf16", "teacher.model": "tiny-teacher"},
    "adapters": {"student.model": "tiny-student", "lora.rank": 4},
    "two teachers": {
        "teacher.model": "tiny-teacher",
        "teacher.others": [{"model": "tiny-student", "weight": 0.5}],
    },
    "growing batches": {"training.batch_growth": {"per_step": 1, "largest": 6}},
    "a common length": {"truncation": {"policy": "common_length", "lead_fraction": 0.5}},
    "a random horizon": {"truncation": {"policy": "random_horizon", "lead_fraction": 0.5}},
    "a horizon that grows": {
        "truncation": {"policy": "common_length", "lead_fraction": 0.3},
        "cut_schedule": {},
        "training.microbatch_tokens": 150,
    },
    "borders": {"teacher.model": "tiny-teacher", "supervision.borders": {"ce": "kd"}},
    "tokens for a limit": {"training.max_steps": None, "training.max_tokens": 700},
}


def measured(config: DistillConfig, out) -> dict:
    return train.run(config, out).manifest["ledger"]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_flops_and_tokens_are_the_ledgers(tmp_path, changes):
    config = run_config(changes)
    predicted, ledger = predict_distill(config, hardware=HERE), measured(config, tmp_path / "run")
    assert predicted.flops == {name: ledger["flops"][name] for name in FLOP_PARTS}
    assert (predicted.tokens, predicted.steps) == (ledger["tokens"], ledger["steps"])
    assert predicted.seconds > 0 and predicted.peak_bytes == sum(predicted.memory.values())


def test_qwen_shapes_take_transformers_own_forward(tmp_path):
    model = save_model(tmp_path / "qwen", kind="qwen3", num_heads=4)
    config = run_config({"student.model": model})
    ledger = measured(config, tmp_path / "run")
    assert predict_distill(config, hardware=HERE).total_flops == ledger["flops"]["total"]


@pytest.mark.parametrize("by", ["random", "teacher_entropy", "divergence", "tip"])
def test_selected_positions_are_near(tmp_path, by):
    changes = {"supervision.select": {"by": by, "fraction": 0.4}, "teacher.model": "tiny-teacher", "loss.kd_ratio": 1.0}
    config = run_config(changes)
    predicted, ledger = predict_distill(config, hardware=HERE), measured(config, tmp_path / "run")
    assert predicted.total_flops == pytest.approx(ledger["flops"]["total"], rel=0.02)
    assert any("spread evenly" in note for note in predicted.notes)


def test_rollouts_of_a_known_length_are_near(tmp_path):
    # A student from scratch hardly ever stops, so that rollouts have the most tokens.
    on_policy = {"start_fraction": 0.5, "max_new_tokens": 6, "max_staleness_steps": 1}
    config = run_config({"teacher.model": "tiny-teacher", "loss.kd_ratio": 1.0, "on_policy": on_policy})
    predicted, ledger = predict_distill(config, hardware=HERE), measured(config, tmp_path / "run")
    assert predicted.new_tokens == pytest.approx(ledger["rollout_tokens"], rel=0.05)
    assert predicted.flops["sampling"] == pytest.approx(ledger["flops"]["sampling"], rel=0.05)
    assert predicted.total_flops == pytest.approx(ledger["flops"]["total"], rel=0.02)


def test_models_and_traces_that_do_not_exist_yet():
    config = run_config({"student.model": "not-yet/there", "teacher.model": "not-yet/either"})
    shape = config_of("tiny-student")
    found = predict_distill(
        config,
        student=shape,
        teacher=config_of("tiny-teacher"),
        tokenizer=symbol_tokenizer(),
        samples=assumed_samples(9, 20, 60, 5),
        hardware=HERE,
    )
    assert found.tokens == 4 * 3 * 85
    assert "9 traces of assumed lengths" in found.notes
    assert found.flops["teacher"] > 0


def test_more_processes_share_the_same_work():
    config = run_config({"teacher.model": "tiny-teacher", "training.microbatch_tokens": 4096})
    one, two = (predict_distill(config, hardware=HERE, world_size=size) for size in (1, 2))
    assert one.tokens == two.tokens
    assert two.total_flops >= one.total_flops  # a prefix is shared within a process only
    assert two.peak_bytes <= one.peak_bytes


def test_accelerators_are_counted_without_the_lean_forward():
    config = run_config({"teacher.model": "tiny-teacher"})
    here, there = predict_distill(config, hardware=HERE), predict_distill(config, hardware=DEVICES["h100"])
    assert there.total_flops > here.total_flops
    assert "program" not in there.memory


def test_totals_add_up_and_keep_the_highest_memory():
    small = Prediction("a", tokens=1, flops=flops_of(student=2), memory={"weights": 3}, seconds=1.0, notes=("n",))
    large = Prediction("b", tokens=4, flops=flops_of(head=5), memory={"weights": 2, "loss": 2}, notes=("n",))
    whole = total("all", [small, large])
    assert (whole.tokens, whole.total_flops, whole.peak_bytes, whole.notes) == (5, 7, 4, ("n",))


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "distill",
        "--student.model",
        "tiny-student",
        "--traces.source",
        "builtin:chain",
        "--num-traces",
        "20",
        "--num-validation",
        "4",
        "--dry-run",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "distill" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["flops"]["total"] == sum(tree["flops"][name] for name in FLOP_PARTS) > 0
    assert tree["peak_bytes"]["total"] > 0
    assert list(tmp_path.iterdir()) == []
