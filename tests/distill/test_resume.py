"""Interrupted anywhere, a run goes on to the same bits; what is damaged or foreign is refused by name."""

import json
import random
import shutil
import time

import pytest
from tiny_runs import assert_same_bits, metrics_of, run_config, save_model, start, train_in_process

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_manifest
from limbeck.config import to_dict
from limbeck.distill import train
from limbeck.errors import CheckpointError
from limbeck.stage import How
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import write_jsonl

STEPS = 5


class PulledPlug(BaseException):
    """Stands for a kill between two steps."""


def interrupt_after(monkeypatch, steps):
    """Let `steps` steps end, then stop within the next one."""
    whole_step = train._step

    def step(setup, number):
        if number == steps:
            raise PulledPlug
        return whole_step(setup, number)

    monkeypatch.setattr(train, "_step", step)


def config(**changes):
    return run_config({"training.max_steps": STEPS, "training.save_every_steps": 1, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    train.run(config(), out)
    return out


@pytest.mark.parametrize("steps", range(1, STEPS))
def test_resumed_after_any_step_is_the_same_run(tmp_path, monkeypatch, uninterrupted, steps):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(PulledPlug):
            train.run(config(), out)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    checkpoint = train.run(config(), out, how=How(resume=True))
    assert_same_bits(out, uninterrupted)
    ledger, whole = checkpoint.manifest["ledger"], Checkpoint(uninterrupted).manifest["ledger"]
    assert {k: ledger[k] for k in ("tokens", "steps", "sequences", "flops", "flops_audit")} == {
        k: whole[k] for k in ("tokens", "steps", "sequences", "flops", "flops_audit")
    }
    assert not (tmp_path / "out.partial").exists() and not list(out.glob("state*"))


def test_every_ingredient_of_a_state_counts(tmp_path, monkeypatch):
    """Adapters with dropout, a live teacher, several micro-batches, bf16, and lines logged after the last state."""
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    changes = {"lora.rank": 2, "lora.dropout": 0.3, "teacher.model": teacher, "training.save_every_steps": 2}
    changes |= {"training.microbatch_tokens": 90, "training.precision": "bf16", "loss.normalization": "sequence_mean"}
    train.run(config(**changes), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(PulledPlug):
            train.run(config(**changes), tmp_path / "out")
    assert len(metrics_of(tmp_path / "out.partial")) == 3
    train.run(config(**changes), tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


def test_killed_at_random_moments_until_it_is_done(tmp_path, uninterrupted):
    out, partial, rng = tmp_path / "out", tmp_path / "out.partial", random.Random(0)
    kills = 0
    while not out.exists() and kills < 3:
        saved = {path.name for path in partial.glob("state-*")}
        child = start(train_in_process, to_dict(config()), out, kills > 0)
        while child.is_alive() and {path.name for path in partial.glob("state-*")} <= saved:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        child.kill()
        child.join()
        kills += 1
        assert not out.exists() or (out / MANIFEST).is_file()
    if not out.exists():
        train.run(config(), out, how=How(resume=True))
    assert_same_bits(out, uninterrupted)


def test_resume_without_a_state_starts_anew(tmp_path, uninterrupted):
    train.run(config(), tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", uninterrupted)


def test_a_failed_run_without_a_state_leaves_nothing(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(PulledPlug):
        train.run(config(**{"training.save_every_steps": 0}), tmp_path / "deep/er/out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(PulledPlug):
            train.run(config(), tmp_path / "out")
    return next((tmp_path / "out.partial").glob("state-*"))


def resume(state, **changes):
    return train.run(config(**changes), state.parent.with_name("out"), how=How(resume=True))


def test_a_state_of_another_config_is_refused(interrupted):
    with pytest.raises(CheckpointError, match="belongs to another config"):
        resume(interrupted, **{"training.clip_norm": 2.0})
    assert interrupted.is_dir()
    resume(interrupted)


def test_a_state_of_other_traces_is_refused(tmp_path, monkeypatch):
    changes = {"traces.source": str(tmp_path / "traces.jsonl"), "training.max_steps": 3}
    write_jsonl(generate(12, 0, 1, 3), tmp_path / "traces.jsonl")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(PulledPlug):
            train.run(config(**changes), tmp_path / "out")
    write_jsonl(generate(12, 9, 1, 3), tmp_path / "traces.jsonl")
    with pytest.raises(CheckpointError, match="other traces"):
        train.run(config(**changes), tmp_path / "out", how=How(resume=True))


def truncated(state):
    file = state / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(name):
    def remove(state):
        (state / name).unlink()

    return remove


def written(text):
    def write(state):
        (state / "state.json").write_text(text)

    return write


def without_entry(state):
    tree = json.loads((state / "state.json").read_text())
    del tree["ledger"]["flops"]
    (state / "state.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        without("weights.safetensors"),
        without("state.json"),
        written("{"),
        written("{}"),
        written("[]"),
        without_entry,
    ],
)
def test_a_damaged_state_is_named(interrupted, damage):
    damage(interrupted)
    with pytest.raises(CheckpointError, match=r"state-0000000\d: damaged, or of .*--overwrite") as caught:
        resume(interrupted)
    assert "\n" not in str(caught.value)


def test_a_torn_log_is_named(interrupted):
    (interrupted.parent / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: 0 lines, but the saved state is of step 2"):
        resume(interrupted)


def test_without_resume_interrupted_work_is_dropped_only_where_that_is_asked_for(interrupted, uninterrupted):
    out = interrupted.parent.with_name("out")
    (interrupted.parent / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="--resume to go on with it, --overwrite to drop it"):
        train.run(config(), out)
    train.run(config(), out, how=How(overwrite=True))
    assert_same_bits(out, uninterrupted)


def finished(directory):
    directory.mkdir()
    write_manifest(directory, stage="test", config=config(), inputs={})
    return directory


def test_outputs_are_replaced_only_when_asked_and_only_when_complete(tmp_path):
    out = finished(tmp_path / "out")
    (out / "old").touch()
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite"), output_directory(out):
        pass
    with pytest.raises(PulledPlug), output_directory(out, overwrite=True) as working:
        (working / "new").touch()
        raise PulledPlug
    assert (out / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    with output_directory(out, overwrite=True) as working:
        (working / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]


def test_what_no_stage_made_is_not_overwritten(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter").touch()
    for out in (precious, precious / "chapter"):
        with pytest.raises(CheckpointError, match="no limbeck output"), output_directory(out, overwrite=True):
            pass
    assert (precious / "chapter").exists()
    shutil.rmtree(precious)
    precious.mkdir()
    with output_directory(precious, overwrite=True) as working:
        (working / "new").touch()
    assert (precious / "new").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\ufeff{}"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        _ = Checkpoint(tmp_path).manifest
    with pytest.raises(CheckpointError, match="no finished limbeck output"):
        _ = Checkpoint(tmp_path / "none").manifest


def test_validation_and_logging_do_not_touch_the_training(tmp_path, uninterrupted):
    train.run(config(**{"training.validate_every_steps": 1, "training.save_every_steps": 0}), tmp_path / "out")
    mine, theirs = metrics_of(tmp_path / "out"), metrics_of(uninterrupted)
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]
