"""rank train and rank evaluate as a user calls them: teacher, student, test against the best AUC that there is."""

import json
from pathlib import Path

import pytest
import yaml

from limbeck.checkpoint import Checkpoint
from limbeck.cli import main
from limbeck.config import build
from limbeck.ranking.train import RankTrainConfig
from limbeck.yaml_values import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "student": {"scratch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}},
    "data": {
        "source": "synthetic",
        "synthetic": {
            "requests": 400,
            "members": 60,
            "items": 30,
            "candidates": 6,
            "history": 0,
            "topics": 2,
            "affinity_scale": 1.0,
            "quality_scale": 2.5,
        },
    },
    "features": {
        "instruction": "?",
        "prefix": "{instruction}{member}{history}\n",
        "candidate": "{item}\n=",
        "feature": "{value}",
        "separator": " ",
    },
    "vocabulary_tokens": 330,
    "training": {"max_steps": 40, "batch_size": 16, "microbatch_tokens": 8192},
    "optimizer": {"learning_rate": 0.01, "beta2": 0.98},
    "schedule": {"warmup_fraction": 0.1},
}


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return stopped.value.code


def printed(capsys, *arguments):
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_teacher_student_and_test(tmp_path, capsys):
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(SMALL))
    trained = printed(capsys, "rank", "train", tmp_path / "teacher.yaml", "--out", tmp_path / "teacher")
    assert trained["validation_auc_low"] > 0.6
    student = SMALL | {"teacher": {"model": str(tmp_path / "teacher")}, "loss": {"kd_ratio": 0.9}}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    flags = ["--hidden-size", 16, "--listwise-ratio", 0.3, "--out", tmp_path / "student"]
    assert printed(capsys, "rank", "train", tmp_path / "student.yaml", *flags)["loss"] > 0

    test = ["rank", "evaluate", "--model", tmp_path / "student", "--reference", tmp_path / "teacher", "--k", 2]
    summary = printed(capsys, *test, "--out", tmp_path / "test")
    # Better than chance beyond doubt, and no better than what the generator allows.
    assert summary["auc_low"] > 0.55
    assert summary["auc_low"] < summary["best_auc"] < 0.95
    assert summary["kendall_tau"] > 0.3 and 0 <= summary["top_2_churn"] <= 1
    assert summary["auc_difference_low"] <= summary["auc_difference"] <= summary["auc_difference_high"]
    assert 0 < summary["delong_p_value"] <= 1 and 0 < summary["mean_label_mass"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "test/scores.jsonl").read_text().splitlines()]
    assert len(rows) == summary["pairs"] == 80 * 6
    assert all(0 <= row["probability"] <= 1 for row in rows)
    assert json.loads((tmp_path / "test/summary.json").read_text())["auc"] == summary["auc"]
    assert set(Checkpoint(tmp_path / "test").manifest["inputs"]) == {"model", "reference"}

    assert call("rank", "evaluate", "--model", "tiny-student", "--out", tmp_path / "x") == 2
    assert "name data, or as `like`" in " ".join(capsys.readouterr().err.split())
    assert call("rank", "evaluate", "--model", "nowhere", "--out", tmp_path / "x") == 2
    assert "nowhere: no such directory of a model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["tiny_ranking", "tiny_ranking_teacher"])
def test_recipes_are_valid(name):
    assert build(RankTrainConfig, read_recipe(RECIPES / f"{name}.yaml")).data.source == "synthetic"


@pytest.mark.slow
def test_the_recipes_reach_the_best_auc(tmp_path, capsys):
    assert call("rank", "train", RECIPES / "tiny_ranking_teacher.yaml", "--out", tmp_path / "teacher") == 0
    flags = ["--teacher.model", tmp_path / "teacher", "--out", tmp_path / "student"]
    assert call("rank", "train", RECIPES / "tiny_ranking.yaml", *flags) == 0
    for name in ("teacher", "student"):
        summary = printed(capsys, "rank", "evaluate", "--model", tmp_path / name, "--out", tmp_path / f"{name}-test")
        assert summary["auc_high"] > summary["best_auc"] - 0.01 and summary["auc"] > 0.84
