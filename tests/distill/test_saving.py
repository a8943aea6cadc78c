"""States written beside the training: same bits, one at a time, the last ones kept, failures told."""

import json
import threading

import pytest
import torch
from parallel_runs import on_ranks
from safetensors.torch import load_file
from tiny_runs import PulledPlug, assert_same_bits, metrics_of, pull_plug, run_config

from limbeck.config import build, to_dict
from limbeck.distill import saving, train
from limbeck.distill.config import DistillConfig
from limbeck.distill.state import State, states_in, write_state
from limbeck.errors import LimbeckError
from limbeck.stage import How

WAIT_SECONDS = 60.0


def config(**changes):
    return run_config({"training.max_steps": 6, "training.save_every_steps": 2, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    train.run(config(), out)
    return out


def test_training_goes_on_while_a_state_is_written_and_the_state_is_that_of_its_step(
    tmp_path, monkeypatch, uninterrupted
):
    """Three more steps end before the first state is let through; what it then holds is what it held at its step."""
    has_gone_on, whole_step, write = threading.Event(), train._step, saving.write_state
    taken, written = {}, {}

    def step(setup, number):
        if number == 2:
            taken.update({n: p.detach().clone() for n, p in setup.student.model.named_parameters()})
        done = whole_step(setup, number)
        if number == 2:
            has_gone_on.set()
        return done

    def late(directory, state, keep):
        assert has_gone_on.wait(WAIT_SECONDS)
        write(directory, state, keep)
        written.setdefault(state.step, load_file(directory / f"state-{state.step:08d}/weights.safetensors"))

    monkeypatch.setattr(train, "_step", step)
    monkeypatch.setattr(saving, "write_state", late)
    train.run(config(), tmp_path / "out")
    assert sorted(written) == [2, 4] and taken.keys() == written[2].keys()
    assert all(torch.equal(weight, written[2][name]) for name, weight in taken.items())
    assert_same_bits(tmp_path / "out", uninterrupted)


def test_the_last_states_stay_and_a_damaged_one_is_passed_over(tmp_path, monkeypatch, capsys):
    run = config(**{"training.save_every_steps": 1, "training.keep_states": 2})
    train.run(run, tmp_path / "whole")
    pull_plug(monkeypatch, run, tmp_path / "out", 4)
    states = states_in(tmp_path / "out.partial")
    assert [path.name for path in states] == ["state-00000003", "state-00000004"]
    (states[-1] / "weights.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    train.run(run, tmp_path / "out", how=How(resume=True))
    assert "state-00000004: damaged" in (told := capsys.readouterr().err) and "the state before it" in told
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


def test_how_many_states_stay_does_not_bind_a_resumed_run(tmp_path, monkeypatch, uninterrupted):
    pull_plug(monkeypatch, config(), tmp_path / "out", 3)
    train.run(config(**{"training.keep_states": 3}), tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", uninterrupted)


def test_a_state_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys, uninterrupted):
    write = saving.write_state

    def full(directory, state, keep):
        if state.step == 4:
            raise OSError(28, "No space left on device")
        write(directory, state, keep)

    monkeypatch.setattr(saving, "write_state", full)
    train.run(config(), tmp_path / "out")
    assert (
        "the state behind step 4 could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    )
    assert_same_bits(tmp_path / "out", uninterrupted)
    pull_plug(monkeypatch, config(), tmp_path / "again", 5)
    assert [path.name for path in states_in(tmp_path / "again.partial")] == ["state-00000002"]
    monkeypatch.undo()
    train.run(config(), tmp_path / "again", how=How(resume=True))
    assert_same_bits(tmp_path / "again", uninterrupted)


def test_whoever_is_asked_to_end_is_told_where_no_state_could_be_written(tmp_path, monkeypatch):
    def full(directory, state, keep):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_state", full)
    monkeypatch.setattr(train, "asked_to_end", asked_at_once)
    with pytest.raises(LimbeckError, match=r"behind step 1 could not be written .*No space left"):
        train.run(config(), tmp_path / "out")


class asked_at_once:
    """In the place of `asked_to_end`."""

    def __enter__(self):
        return lambda: True

    def __exit__(self, *_):
        return None


def state_of(step):
    return State(step, {"w": torch.full((2,), float(step))}, {}, {"step": step}, False)


def test_a_killed_write_leaves_the_states_before_it(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        write_state(tmp_path, state_of(step), keep=2)
    assert [path.name for path in states_in(tmp_path)] == ["state-00000020", "state-00000030"]
    with monkeypatch.context() as patch, pytest.raises(PulledPlug):
        patch.setattr("limbeck.distill.state.write_json", pulled)
        write_state(tmp_path, state_of(40), keep=2)
    assert [path.name for path in states_in(tmp_path)] == ["state-00000020", "state-00000030"]
    write_state(tmp_path, state_of(25), keep=2)
    assert [path.name for path in states_in(tmp_path)] == ["state-00000020", "state-00000025"]
    assert json.loads((tmp_path / "state-00000025/state.json").read_text()) == {"step": 25}


def pulled(*_):
    raise PulledPlug


def test_several_processes_end_together_when_one_is_asked(tmp_path, uninterrupted):
    """The second process alone is asked; both leave behind the same step, and one process goes on."""
    on_ranks(2, _asked_on_the_second, to_dict(config()), tmp_path / "out")
    assert len(metrics_of(tmp_path / "out.partial")) == 3
    assert [path.name for path in states_in(tmp_path / "out.partial")] == ["state-00000003"]
    train.run(config(), tmp_path / "out", how=How(resume=True))
    found, whole = metrics_of(tmp_path / "out"), metrics_of(uninterrupted)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in whole], rel=1e-5)


def _asked_on_the_second(tree, out):
    whole_step = train._step

    def step(setup, number):
        if number == 2 and setup.ranks.rank == 1:
            setup = setup._replace(is_ending=lambda: True)
        return whole_step(setup, number)

    train._step = step
    with pytest.raises(LimbeckError, match="saved behind step 3"):
        train.run(build(DistillConfig, tree), out)
