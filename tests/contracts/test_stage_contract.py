"""What every stage promises, whatever it makes: names and types are checked, an output is never lost, a full disk or a
second run is one line, a dry run writes nothing, and the manifest tells what was done.

The default suite checks a sample of the stages, `-m slow` all of them, kills included.
"""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

import limbeck
from limbeck import checkpoint
from limbeck.checkpoint import Checkpoint, hash_file, output_directory
from limbeck.commands import COMMANDS
from limbeck.config import build, config_hash
from limbeck.errors import CheckpointError, ConfigError
from limbeck.flags import apply_fields
from limbeck.library import function_of
from limbeck.stage import How, Stage

CHAIN = {"source": "builtin:chain", "num_traces": 8, "chain_min_steps": 2, "chain_max_steps": 2}
STUDENT = {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}}
DISTILL = {
    "student": STUDENT,
    "traces": CHAIN,
    "num_validation": 2,
    "training": {"max_steps": 3, "batch_size": 2, "save_every_steps": 1},
}
CALIBRATION = {"traces": CHAIN, "sequences": 2, "sequence_length_tokens": 16}
COMPRESS = {"model": "tiny-student", "calibration": CALIBRATION, "gate": {"sequences": 0}}
RANK = {
    "student": STUDENT,
    "data": {"source": "synthetic", "synthetic": {"requests": 40, "members": 8, "items": 12, "candidates": 3}},
    "vocabulary_tokens": 300,
    "training": {"max_steps": 2, "batch_size": 4, "save_every_steps": 1},
}
TINY = {
    "traces import": {"traces": CHAIN},
    "traces generate": {"prompts": CHAIN, "model": "tiny-student", "max_new_tokens": 4, "generate.on_bad": "keep"},
    "traces verify": {"traces": CHAIN, "checker": "exact", "keep": "all"},
    "traces complete": {
        "traces": CHAIN,
        "student": "tiny-student",
        "truncation": {"lead_fraction": 0.5},
        "max_new_tokens": 4,
        "checker": "exact",
    },
    "traces probe": {"traces": CHAIN, "teacher": "tiny-student"},
    "traces advise": {
        "distill": {"student": {"model": "tiny-student"}, "teacher": {"model": "tiny-student"}, "traces": CHAIN},
        "most_traces": 3,
        "most_prompts": 1,
    },
    "teacher cache": {"traces": CHAIN, "teacher": "tiny-student"},
    "distill": DISTILL,
    "evaluate": {"model": "tiny-student", "problems": CHAIN, "max_new_tokens": 4, "checker": "exact"},
    "moments": {"model": "tiny-student", "calibration": CALIBRATION},
    "prune": COMPRESS,
    "quantize": {**COMPRESS, "group_size": 32, "method": "gptq"},
    "export": {"model": "tiny-student", "format": "dense", "probe": {"traces": CHAIN, "sequences": 2}},
    "recover": {
        "prune": {**COMPRESS, "model": "tiny-student"},
        "distill": {key: value for key, value in DISTILL.items() if key != "student"},
    },
    "rank train": RANK,
}
SAMPLE = ("traces import", "distill", "prune", "evaluate")
"""Checked in the default suite."""
APART = {
    "demo",
    "sweep",
    "pipeline",
    "bench serve",
    "rank recover",
    "rank evaluate",
    "rank cache",
    "teacher export",
    "teacher import",
}
"""Whose directory is filled part by part, or which read another stage's output: their own tests have them."""


def bits(out) -> dict[str, str]:
    """Hash of every file of weights or records; the others tell seconds too."""
    return {p.name: hash_file(p) for p in sorted(out.iterdir()) if p.suffix in (".safetensors", ".jsonl")}


def stages(names):
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow, id=name) for name in names]


def fields_of(name: str) -> dict:
    own = dict(TINY[name])
    if own.pop("generate.on_bad", None):
        own["on_bad"] = "keep"
    return own


def config_of(name: str):
    stage = COMMANDS[name].load()
    given = [(field, value, field) for field, value in fields_of(name).items()]
    return stage, build(stage.config, apply_fields(stage.config, {}, given))


def test_every_stage_is_here():
    found = {name for name, command in COMMANDS.items() if isinstance(command.load(), Stage)}
    assert found == TINY.keys() | APART


@pytest.mark.parametrize("name", stages(TINY))
def test_a_finished_output_tells_what_it_is_and_is_never_lost(name, tmp_path):
    stage, config = config_of(name)
    out = tmp_path / "out"
    made = stage.run(config, out)
    assert isinstance(made, Checkpoint) and made.path == out and made.is_finished
    manifest = made.manifest
    assert manifest["stage"] == name and manifest["config_hash"] == config_hash(config)
    assert manifest["versions"]["torch"] and manifest["limbeck_version"] == limbeck.__version__
    assert not out.with_name("out.partial").exists()
    assert f"<td>{name}</td>" in made._repr_html_()
    if stage.inputs is not None:
        assert made.is_made_of(config, stage.inputs(config))
    before = bits(out)
    if "overwrite" in stage.takes and name != "traces generate":
        with pytest.raises(CheckpointError, match="exists already"):
            stage.run(config, out)
        assert bits(out) == before
        stage.run(config, out, how=How(overwrite=True))
    else:
        stage.run(config, out)
    assert bits(out) == before, "the same config gives the same bits"


@pytest.mark.parametrize("name", stages(TINY))
def test_names_and_types_are_checked_in_python_as_on_the_command_line(name, tmp_path):
    call, stage = function_of(name), COMMANDS[name].load()
    with pytest.raises(ConfigError, match=r"no such field; did you mean 'render'|no such field") as unknown:
        call(**fields_of(name), rendre={}, out=tmp_path / "out")
    assert "\n" not in str(unknown.value)
    first = next(iter(stage.config.__dataclass_fields__))
    with pytest.raises(ConfigError) as wrong:
        call(**{**fields_of(name), first: True}, out=tmp_path / "out")
    assert first in str(wrong.value) and "\n" not in str(wrong.value)
    with pytest.raises(ConfigError, match="means nothing here"):
        call(**fields_of(name), on="ray", resume=True, out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", stages(name for name in TINY if name != "teacher cache"))
def test_a_second_run_a_full_disk_and_a_file_in_the_way_are_one_line(name, tmp_path, monkeypatch):
    stage, config = config_of(name)
    out = tmp_path / "out"
    with output_directory(out), pytest.raises(CheckpointError, match="another run is at work"):
        stage.run(config, out, how=How(overwrite="overwrite" in stage.takes))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    full_out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            stage.run(config, full_out)
    assert not full_out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        stage.run(config, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", stages(name for name in TINY if COMMANDS[name].load().predict))
def test_a_dry_run_tells_the_cost_and_writes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = function_of(name)(**fields_of(name), dry_run=True)
    found = found if isinstance(found, list) else [found]
    assert sum(part.seconds for part in found) > 0 and all(part.peak_bytes > 0 for part in found)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in TINY if "resume" in COMMANDS[name].load().takes])
def test_killed_and_resumed_is_uninterrupted(name, tmp_path):
    stage, config = config_of(name)
    whole = stage.run(config, tmp_path / "whole")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_flat(name)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "limbeck", *name.split(), str(recipe), "--out", str(out)]
    for _ in range(3):
        process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _wait_for_a_state(out, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not out.exists():
        stage.run(config, out, how=How(resume=True))
    assert bits(out) == bits(whole.path)
    assert Checkpoint(out).metrics.get("loss") == whole.metrics.get("loss")


def _flat(name: str) -> dict:
    stage = COMMANDS[name].load()
    return apply_fields(stage.config, {}, [(field, value, field) for field, value in fields_of(name).items()])


def _wait_for_a_state(out, process) -> None:
    seen = set(os.listdir(out.with_name("out.partial"))) if out.with_name("out.partial").exists() else set()
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        partial = out.with_name("out.partial")
        if partial.exists() and {file for file in os.listdir(partial) if file.startswith("state-")} - seen:
            return
        time.sleep(0.02)
