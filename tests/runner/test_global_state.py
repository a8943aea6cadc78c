"""What a call changes of the process, it puts back: threads, standard error, what transformers prints."""

import io
import sys
import threading

import pytest
import torch
import transformers
from tiny_runs import run_config

from limbeck.distill import train
from limbeck.models.load import load_model, quiet
from limbeck.runner.threads import threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "within"), [(None, 2), (1, 1), (3, 3)])
def test_threads_are_those_of_the_block_alone(two_threads, count, within):
    with threads(count):
        assert torch.get_num_threads() == within
    assert torch.get_num_threads() == 2


def test_threads_are_put_back_behind_an_error(two_threads):
    with pytest.raises(ZeroDivisionError), threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_run_leaves_the_threads_as_they_were(two_threads, tmp_path):
    train.run(run_config({"training.num_threads": 1, "training.max_steps": 1}), tmp_path / "out")
    assert torch.get_num_threads() == 2


def test_a_load_leaves_messages_and_bars_as_they_were(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load_model("tiny-student")
    assert sys.stderr is stream
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_loads_that_overlap_put_back_the_first_stream(monkeypatch):
    stream, entered, leave = io.StringIO(), threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", stream)

    def first():
        with quiet():
            entered.set()
            leave.wait(10)

    def second():
        with quiet(), quiet():
            assert sys.stderr is not stream

    workers = [threading.Thread(target=first), threading.Thread(target=second)]
    workers[0].start()
    entered.wait(10)
    workers[1].start()
    leave.set()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert sys.stderr is stream
