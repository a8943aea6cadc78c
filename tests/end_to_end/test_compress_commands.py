"""prune, quantize and moments as a user calls them, killed at some point and taken up again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.cli import main

SMALL = ["--model", "tiny-student", "--calibration.sequences", "8", "--gate.sequences", "2"]
COMMANDS = {
    "quantize": ["quantize", *SMALL, "--group-size", "32", "--method", "gptq", "--dense-targets", "true"],
    "prune": ["prune", *SMALL, "--neuron-sparsity", "0.5"],
    "moments": ["moments", "--model", "tiny-student", "--calibration.sequences", "8"],
}


def call(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def start(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def kill_after(process, journal: Path, blocks: int, delay_seconds: float):
    """Kill as soon as the journal has so many blocks, or let the process end when it was faster."""
    while process.poll() is None:
        if journal.is_file() and json.loads(journal.read_text())["blocks"] >= blocks:
            time.sleep(delay_seconds)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    return process.wait()


def files_of(directory: Path):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix == ".safetensors"}


def killed_and_resumed(name, tmp_path, kills):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start([*COMMANDS[name], "--out", str(whole)]).wait() == 0
    journal = tmp_path / "parts.partial" / "state-walk.json"
    codes = []
    for blocks, delay_seconds in kills:
        process = start([*COMMANDS[name], "--out", str(parts), "--resume"])
        codes.append(kill_after(process, journal, blocks, delay_seconds))
        if codes[-1] == 0:
            break
    if not parts.exists():
        assert start([*COMMANDS[name], "--out", str(parts), "--resume"]).wait() == 0
    assert -signal.SIGKILL in codes
    assert files_of(whole) == files_of(parts)
    assert not list(parts.glob("state-*"))


def test_a_killed_quantisation_goes_on_with_the_same_bits(tmp_path):
    killed_and_resumed("quantize", tmp_path, [(1, 0.0)])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_anywhere_and_taken_up_again(name, tmp_path):
    chance = random.Random(0)
    killed_and_resumed(name, tmp_path, [(blocks, chance.random() * 0.05) for blocks in (0, 1, 1, 2)])


def test_prune_then_quantise_then_evaluate(tmp_path, capsys):
    assert call([*COMMANDS["prune"], "--out", str(tmp_path / "pruned")]) == 0
    pruned = ["--model", str(tmp_path / "pruned"), "--calibration.traces.source", "builtin:chain"]
    pruned += ["--calibration.traces.num-traces", "12", "--group-size", "32", "--json"]
    capsys.readouterr()
    assert call(["quantize", *pruned, "--out", str(tmp_path / "small")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["held_out"]["kl_nats"] < 0.1
    manifest = json.loads((tmp_path / "small" / "limbeck.json").read_text())
    assert manifest["stage"] == "quantize"
    assert manifest["ledger"]["seconds"]["quantize"] > 0
    problems = ["--problems.source", "builtin:chain", "--problems.num-traces", "4", "--max-new-tokens", "8"]
    assert call(["evaluate", "--model", str(tmp_path / "small"), *problems, "--out", str(tmp_path / "score")]) == 0


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    for name in ("prune", "quantize"):
        assert call([*COMMANDS[name], "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["seconds"] >= 0 and found["peak_bytes"]["total"] > 0
    assert not list(tmp_path.iterdir())


def test_a_resume_with_other_settings_is_refused(tmp_path, capsys):
    journal = tmp_path / "out.partial" / "state-walk.json"
    process = start([*COMMANDS["quantize"], "--out", str(tmp_path / "out")])
    if kill_after(process, journal, 1, 0.0) == 0:
        pytest.skip("the run ended before it could be killed")
    other = [*COMMANDS["quantize"], "--scheme", "w8a16", "--out", str(tmp_path / "out"), "--resume"]
    assert call(other) == 2
    assert "another model, calibration or method" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_one_line(tmp_path, capsys):
    assert call(["quantize", "--model", "tiny-student", "--group-size", "100", "--out", str(tmp_path / "out")]) == 2
    assert "no multiple of group_size 100" in " ".join(capsys.readouterr().err.split())
    assert call(["prune", "--model", "tiny-student", "--methd", "alps"]) == 2
    assert "method" in capsys.readouterr().err
