"""Commands on Ray with a worker killed at work: the same files, the same report as here. Killed as a whole, they go on.

The commands run with one thread here and there, since the number of threads decides the last bits.
"""

import contextlib
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import yaml

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CHAIN = {"source": "builtin:chain", "chain_min_steps": 1, "chain_max_steps": 2}
SWEEP = {
    "distill": {
        "student": {"model": "tiny-student"},
        "teacher": {"model": "tiny-teacher"},
        "traces": {**CHAIN, "num_traces": 80},
        "num_validation": 8,
        "training": {"max_steps": 150, "batch_size": 4, "save_every_steps": 5},
    },
    "problems": {**CHAIN, "num_traces": 20, "seed": 9, "chain_min_steps": 3, "chain_max_steps": 3},
    "grid": {"lead_fraction": [0.5, 1.0]},
    "evaluate": {"max_new_tokens": 96},
}
CACHE = {"teacher": "tiny-teacher", "traces": {**CHAIN, "chain_max_steps": 6, "num_traces": 900}}
GENERATE = {
    "prompts": {**CHAIN, "num_traces": 40},
    "model": "tiny-teacher",
    "sampling": {"max_new_tokens": 96, "num_samples": 2, "temperature": 0.8, "seed": 3},
    "group_prompts": 4,
}
MEASURED = ("seconds", "peak_bytes", "baseline_bytes", "command")
"""What no two runs have in common: the clock, the memory and how they were called."""


def start(command, recipe, out, *more):
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    arguments = [sys.executable, "-m", "limbeck", *command.split(), str(file), "--out", str(out), *more]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def workers_at(process, name):
    """The Ray workers of a command that do the part `name` right now."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child] if " ".join(child.cmdline()).startswith(f"ray::{name}") else []
    return found


def kill_one(process, name, is_due=lambda: True):
    """SIGKILL for the first worker that does the part `name` once `is_due`."""
    while process.poll() is None:
        if is_due():
            for worker in workers_at(process, name):
                worker.kill()
                return
        time.sleep(0.01)
    pytest.fail(f"no worker did {name}: {process.communicate()[0]}")


def without_measures(tree):
    if isinstance(tree, dict):
        return {
            key: without_measures(value)
            for key, value in tree.items()
            if not any(key == name or key.endswith("_" + name) or key.startswith(name + "_") for name in MEASURED)
        }
    return [without_measures(item) for item in tree] if isinstance(tree, list) else tree


def report_of(out):
    """The summary that the report is made of, without measures and without the directory's name."""
    text = (out / "summary.json").read_text().replace(str(out), "OUT")
    return without_measures(json.loads(text))


def weights_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def shards_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The sweep in this machine's usual way."""
    out = tmp_path_factory.mktemp("here") / "sweep"
    finish(start("sweep", SWEEP, out))
    return out


def assert_same_sweep(out, here):
    assert report_of(out) == report_of(here)
    assert len(weights_of(out)) == 2 and weights_of(out) == weights_of(here)
    assert shards_of(out / "teacher_cache") == shards_of(here / "teacher_cache")
    assert (out / "report.html").is_file()


def test_a_sweep_with_a_killed_worker_gives_the_same_report(here, tmp_path):
    out = tmp_path / "sweep"
    process = start("sweep", SWEEP, out, "--on", "ray")
    # A run that has saved a state is in the middle of its training.
    kill_one(process, "run_one", lambda: any(out.glob("runs/*.partial/state-*")))
    finish(process)
    assert_same_sweep(out, here)


def test_a_killed_sweep_on_ray_goes_on(here, tmp_path):
    out = tmp_path / "sweep"
    process = start("sweep", SWEEP, out, "--on", "ray")
    while not any(out.glob("runs/*.partial/state-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(start("sweep", SWEEP, out, "--on", "ray"))
    assert_same_sweep(out, here)


def test_a_cache_with_a_killed_scorer_has_the_same_bytes(tmp_path):
    finish(start("teacher cache", CACHE, tmp_path / "here"))
    process = start("teacher cache", CACHE, tmp_path / "ray", "--on", "ray")
    kill_one(process, "score")
    finish(process)
    assert len(shards_of(tmp_path / "ray")) > 2 and shards_of(tmp_path / "ray") == shards_of(tmp_path / "here")


def test_traces_with_a_killed_writer_and_a_killed_checker_are_the_same(tmp_path):
    finish(start("traces generate", GENERATE, tmp_path / "here"))
    process = start("traces generate", GENERATE, tmp_path / "ray", "--on", "ray")
    kill_one(process, "sample_group")
    finish(process)
    assert (tmp_path / "ray" / "traces.jsonl").read_bytes() == (tmp_path / "here" / "traces.jsonl").read_bytes()
    verify = {"traces": {"source": str(tmp_path / "here")}}
    finish(start("traces verify", verify, tmp_path / "checked-here"))
    process = start("traces verify", verify, tmp_path / "checked-ray", "--on", "ray")
    kill_one(process, "check_part")
    finish(process)
    for name in ("traces.jsonl", "pass_rates.json"):
        assert (tmp_path / "checked-ray" / name).read_bytes() == (tmp_path / "checked-here" / name).read_bytes()
