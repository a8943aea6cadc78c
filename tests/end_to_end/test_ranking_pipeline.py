"""A ranking recipe of pipeline from teacher to int4: one table, made once, remade from where something changed."""

import json
from dataclasses import replace

import pytest

from limbeck.checkpoint import Checkpoint
from limbeck.commands import named
from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.pipeline import command, ranking_table
from limbeck.pipeline.config import PipelineConfig
from limbeck.pipeline.ranking import RankPipelineConfig, stages_of
from limbeck.ranking.scored import measures, read_scores
from limbeck.report import page as report

TRAINING = {"batch_size": 8, "max_steps": 6, "microbatch_tokens": 4096}
TREE = {
    "teacher": {
        "student": {"scratch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}},
        "data": {
            "source": "synthetic",
            "synthetic": {"requests": 120, "members": 20, "items": 12, "candidates": 6, "history": 1, "topics": 2},
        },
        "vocabulary_tokens": 300,
        "training": TRAINING,
        "optimizer": {"learning_rate": 1e-2},
    },
    "student": {
        "student": {"scratch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "data": {"max_train_requests": 50},
        "training": TRAINING,
        "optimizer": {"learning_rate": 1e-2},
    },
    "seeds": 2,
    "cut": {"rounds": 2, "multiple_of": 8, "training": TRAINING},
    "group_size": 8,
    "timed_requests": 3,
}
MODELS = ["teacher", "sft-0", "sft-1", "kd_labels-0", "kd_labels-1", "kd_vocabulary-0", "kd_listwise-0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "out"
    return out, advance(TREE, out)


def advance(tree, out):
    return command.run(build(PipelineConfig, {"ranking": tree}), out)


def table_of(out):
    return Checkpoint(out / "table").metrics


@pytest.mark.slow
def test_the_table_has_every_step(made):
    out, result = made
    table = table_of(out)
    rows = {row["model"]: row for row in table["rows"]}
    assert result.manifest["stage"] == "pipeline" and result.metrics["shows"] == ["table"]
    assert list(rows) == [*MODELS, "unpruned", "pruned", "w8a8", "w4a16"]
    assert json.loads((out / "table" / ranking_table.TABLE).read_text()) == table
    for name, row in rows.items():
        assert row["auc_low"] <= row["auc"] <= row["auc_high"]
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert ("kendall_tau" in row) == (name != "teacher")
    assert rows["kd_labels-1"]["before"] == "sft-1" and rows["pruned"]["before"] == "unpruned"
    trained_on = [Checkpoint(out / place).manifest["ledger"]["steps"] for place in ("unpruned", "pruned")]
    assert trained_on[0] == trained_on[1] > 0
    own = measures(read_scores(out / "tests/w8a8"))
    assert own["auc"] == rows["w8a8"]["auc"]
    gap = rows["w8a8"]["auc"] / rows["unpruned"]["auc"] - 1
    assert rows["w8a8"]["relative_auc_from_unpruned"] == pytest.approx(gap)
    assert rows["w8a8"]["auc_difference_from_unpruned"] == pytest.approx(rows["w8a8"]["auc"] - rows["unpruned"]["auc"])
    # 32 x 3 weights a neuron, of which half go.
    assert rows["kd_labels-0"]["parameters"] - rows["pruned"]["parameters"] == 16 * 3 * 32
    assert rows["w4a16"]["weight_bytes"] < rows["pruned"]["weight_bytes"] < rows["kd_labels-0"]["weight_bytes"]


@pytest.mark.slow
def test_students_differ_in_the_loss_alone(made):
    out, _ = made
    configs = {name: Checkpoint(out / "students" / name).manifest["config"] for name in MODELS[1:]}
    for name in ("kd_labels-0", "kd_vocabulary-0", "kd_listwise-0"):
        differing = {key for key in configs[name] if configs[name][key] != configs["sft-0"][key]}
        assert differing <= {"loss", "ranking"}
    assert configs["sft-0"]["loss"]["kd_ratio"] == 0
    assert configs["sft-1"]["student"]["scratch"]["seed"] == configs["kd_labels-1"]["student"]["scratch"]["seed"] == 1
    assert Checkpoint(out / "students/sft-0").manifest["counts"]["train_requests"] == 50
    assert Checkpoint(out / "teacher").manifest["counts"]["train_requests"] > 50


@pytest.mark.slow
def test_called_again_it_keeps_all_and_a_dry_run_says_so(made, capsys):
    out, _ = made
    config = build(PipelineConfig, {"ranking": TREE})
    command.tell(config, out, as_json=True)
    told = {row["stage"]: row["reason"] for row in json.loads(capsys.readouterr().out)["stages"]}
    assert list(told)[-2:] == ["table", "report"] and not any(told.values())


@pytest.mark.slow
def test_goes_on_from_what_changed(made):
    out, before = made[0], table_of(made[0])
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    advance(TREE | {"cut": TREE["cut"] | {"neuron_sparsity": 0.25, "rounds": 1}}, out)
    after = table_of(out)
    kept = {
        str(path.relative_to(out)).split("/")[0]
        for path, at in stamps.items()
        if path.exists() and path.stat().st_mtime_ns == at
    }
    assert kept == {"teacher", "students", "unpruned"}
    same = slice(0, len(MODELS))
    assert [row["auc"] for row in after["rows"][same]] == [row["auc"] for row in before["rows"][same]]
    assert after["rows"][-1]["parameters"] > before["rows"][-1]["parameters"]
    text = report.write_report([out], out / "page").parent.joinpath("report.md").read_text()
    assert "## Ranking" in text and "| w4a16 |" in text
    assert (out / "page/plots/ranking.png").stat().st_size > 10_000


def test_refuses_a_teacher_of_the_student():
    student = TREE["student"] | {"teacher": {"model": "tiny-teacher"}}
    with pytest.raises(ConfigError, match=r"student\.teacher"):
        build(RankPipelineConfig, TREE | {"student": student})


def test_it_stands_alone_and_a_recipe_of_the_old_command_is_told_where_to_go():
    with pytest.raises(ConfigError, match="leave out export"):
        build(PipelineConfig, {"ranking": TREE, "export": {"model": "tiny-student"}})
    with pytest.raises(ConfigError, match="below `ranking:`"):
        named(["rank", "pipeline", "scorer.yaml"])


def test_the_student_has_the_teachers_features_and_data():
    config = build(PipelineConfig, {"ranking": TREE}).ranking
    assert config.student.data == replace(config.teacher.data, max_train_requests=50)
    assert config.student.features == config.teacher.features
    names = [task.name for task in stages_of(config)]
    assert names[:3] == ["teacher", "student-sft-0", "student-sft-1"] and names[-1] == "table"
    assert len(names) == len(set(names)) == 1 + 6 + 2 + 2 + 11 + 1
