"""Problems that a model was trained on are counted and told, for the student and for what is made of it."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import run_config

import limbeck
from limbeck.distill import train
from limbeck.evaluate.seen import count_seen
from limbeck.evaluate.tasks import task_from_traces
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trained_on import made_of, trained_on

CHAIN = {"source": "builtin:chain", "chain_min_steps": 1, "chain_max_steps": 3}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "student"
    return train.run(run_config({"training.max_steps": 1}), out)


def problems(num_traces, seed=0):
    return task_from_traces("", read_traces(TraceConfig(**CHAIN, num_traces=num_traces, seed=seed))[0]).problems


def test_the_manifest_names_the_traces(student):
    (traces,) = trained_on(str(student.path))
    assert (traces.source, traces.num_traces, traces.seed) == ("builtin:chain", 12, 0)


def test_problems_of_the_same_seed_are_told_in_one_line(student, capsys):
    assert count_seen(str(student.path), problems(9)) == 9
    told = capsys.readouterr().err.strip()
    assert told.startswith("note: 9 of 9 problems are among the traces") and "builtin:chain" in told
    assert count_seen(str(student.path), problems(9, seed=1_000_001)) in (0, 1)


def test_models_made_of_the_student_know_its_traces(student, tmp_path, capsys):
    small = limbeck.prune(student, pattern=0.5, method="magnitude", out=tmp_path / "pruned")
    again = train.run(
        run_config({"student.model": str(small.path), "traces.seed": 7, "training.max_steps": 1}), tmp_path / "again"
    )
    assert [traces.seed for traces in trained_on(str(again.path))] == [7, 0]
    assert count_seen(str(again.path), problems(4)) == 4


def test_what_is_made_of_a_built_in_model_is_calibrated_on_the_built_in_task(tmp_path):
    pruned = limbeck.prune("tiny-student", pattern="0.5", method="magnitude", out=tmp_path / "pruned")
    assert list(made_of(str(pruned.path))) == [str(pruned.path), "tiny-student"]
    limbeck.quantize(pruned, scheme="w8a16", group_size=32, out=tmp_path / "small")


def test_what_cannot_be_known_is_none(student, tmp_path, capsys):
    assert count_seen("tiny-student", problems(2)) is None
    assert capsys.readouterr().err == ""
    traces = tmp_path / "traces.jsonl"
    limbeck.import_traces(traces=CHAIN | {"num_traces": 5}, out=tmp_path / "written")
    shutil.move(tmp_path / "written" / "traces.jsonl", traces)
    trained = train.run(
        run_config({"traces": {"source": str(traces)}, "num_validation": 1, "training.max_steps": 1}), tmp_path / "s"
    )
    assert count_seen(str(trained.path), problems(5)) == 5
    traces.unlink()
    capsys.readouterr()
    assert count_seen(str(trained.path), problems(5)) is None
    assert "cannot be read" in capsys.readouterr().err


def test_traces_that_were_named_from_another_directory_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limbeck.import_traces(traces=CHAIN | {"num_traces": 5}, out="written")
    changes = {"traces": {"source": "written/traces.jsonl"}, "num_validation": 1, "training.max_steps": 1}
    train.run(run_config(changes), Path("student"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert count_seen("../student", problems(5)) == 5


def test_an_evaluation_counts_them_in_its_metrics(student, tmp_path):
    found = limbeck.evaluate(student, problems=CHAIN | {"num_traces": 3}, max_new_tokens=2, out=tmp_path / "scored")
    assert found.metrics["problems_trained_on"] == 3
