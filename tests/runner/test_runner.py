"""Parts of a job: in order here, and on Ray whole even where workers die; errors are those of the part."""

import functools
import importlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from limbeck.cli import main
from limbeck.errors import ConfigError, LimbeckError
from limbeck.runner import cluster
from limbeck.runner.place import Prepared, map_in_processes

SERVED = ["--prompts.source", "builtin:chain", "--num-traces", "2", "--server", "http://127.0.0.1:1"]


def label(shared, item):
    return f"{shared}{item}"


def process_of(item):
    return os.getpid()


def refuse(_, item):
    raise ConfigError(f"item {item} is not accepted")


def divide(_, item):
    return 1 // item


def die_once(directory, item):
    """Kill the worker at the first attempt at item 1; every attempt leaves a file."""
    attempt = directory / f"{item}-{len(list(directory.iterdir()))}"
    attempt.touch()
    if item == 1 and len(list(directory.glob("1-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def die(_, item):
    os.kill(os.getpid(), signal.SIGKILL)


def connections(process):
    try:
        return process.net_connections("inet")
    except psutil.NoSuchProcess:  # a worker that ends just now
        return []


def given(value):
    return value


@pytest.fixture(scope="module")
def on_ray():
    """A cluster of this machine alone; what this file defines is sent to its workers, which cannot import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray = cluster.connect()
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield "ray"
        ray.shutdown()


def test_parts_here_are_done_in_order_over_what_is_made_once():
    made = []
    parts = Prepared(lambda: made.append("model") or "a")
    assert list(parts.map(label, [2, 1])) == [(2, "a2"), (1, "a1")]
    assert list(parts.map(label, [3])) == [(3, "a3")]
    assert made == ["model"]


def test_each_call_has_a_process_of_its_own():
    found = [process for _, process in map_in_processes(os.getpid, [(), ()])]
    assert len({os.getpid(), *found}) == 3


@pytest.mark.slow
def test_on_ray_a_killed_worker_loses_no_result(on_ray, tmp_path):
    parts = Prepared(functools.partial(given, tmp_path), on_ray)
    assert dict(parts.map(die_once, range(9))) == {item: item * item for item in range(9)}
    assert len(list(tmp_path.glob("1-*"))) == 2


@pytest.mark.slow
def test_on_ray_each_call_has_a_process_of_its_own(on_ray):
    found = dict(map_in_processes(process_of, [(item,) for item in range(4)], on_ray))
    assert set(found) == {(0,), (1,), (2,), (3,)} and len({os.getpid(), *found.values()}) == 5


@pytest.mark.slow
def test_on_ray_errors_are_those_of_the_part(on_ray, capsys, monkeypatch):
    parts = Prepared(functools.partial(given, None), on_ray)
    with pytest.raises(ConfigError, match=r"^item 3 is not accepted$"):
        list(parts.map(refuse, [3]))
    with pytest.raises(LimbeckError, match="divide failed: ZeroDivisionError"):
        list(parts.map(divide, [1, 0]))
    assert "return 1 // item" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "RETRIES", 1)
    with pytest.raises(LimbeckError, match="die: the workers of a task died again and again"):
        list(parts.map(die, [0]))


@pytest.mark.slow
def test_on_ray_nothing_listens_beyond_this_machine_and_nothing_is_reported(on_ray):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert any(process.name() == "raylet" for process in processes)
    listening = [c for process in processes for c in connections(process) if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    usage = importlib.import_module("ray._common.usage.usage_lib")
    assert not usage.usage_stats_enabled()


def test_without_ray_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'limbeck\[ray\]'"):
        cluster.connect()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--on", "moon"], "--on needs local or ray; found 'moon'"),
        (["sweep", "--on"], "--on needs local or ray; found ''"),
        (["distill", "--on", "ray"], "--on means nothing to limbeck distill"),
        (["traces", "generate", *SERVED, "--on", "ray"], "a server does its own work"),
    ],
)
def test_the_place_is_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_script_without_a_main_guard_starts_processes_and_runs_once(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "from limbeck.runner.process import in_process\nfrom limbeck.errors import nearest\n"
        "print('begun')\nprint(in_process(nearest, 'on', ['one', 'two']))\nprint(__file__, __spec__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["begun", "did you mean 'one'?", f"{script} None"]
