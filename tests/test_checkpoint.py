"""Directories that stages write: nothing half-written, nothing lost, one run at a time; manifests of all versions."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from limbeck.checkpoint import FORMAT, MANIFEST, Checkpoint, output_directory, write_manifest
from limbeck.errors import CheckpointError


@dataclasses.dataclass
class Config:
    a: int = 1


def written(directory, **changes) -> Checkpoint:
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, stage="distill", config=Config(), inputs={"teacher": "x"}, metrics={"loss": 0.123456})
    if changes:
        tree = {**json.loads((directory / MANIFEST).read_text()), **changes}
        tree = {key: value for key, value in tree.items() if value is not None}
        (directory / MANIFEST).write_text(json.dumps(tree))
    return Checkpoint(directory)


def test_a_manifest_without_a_format_is_one_of_the_first_version(tmp_path):
    old = written(tmp_path / "old", format=None)
    assert old.metrics == {"loss": 0.123456} and old.is_made_of(Config(), {"teacher": "x"})
    assert written(tmp_path / "new").manifest["format"] == FORMAT


def test_a_manifest_of_a_newer_version_is_refused_with_what_to_do(tmp_path):
    newer = written(tmp_path / "newer", format=FORMAT + 1, limbeck_version="9.9")
    with pytest.raises(CheckpointError, match=r"written by a newer limbeck \(9\.9\); update this one"):
        _ = newer.metrics


def test_a_checkpoint_is_a_path_and_shows_itself(tmp_path):
    made = written(tmp_path / "a<b")
    assert os.fspath(made) == str(tmp_path / "a<b") and repr(made) == f"Checkpoint({str(tmp_path / 'a<b')!r})"
    page = made._repr_html_()
    assert "0.1235" in page and "distill" in page and "a&lt;b" in page and "a<b" not in page
    assert Checkpoint(tmp_path / "none")._repr_html_() == f"<code>{tmp_path / 'none'}</code>"
    assert made.cost == {}


def test_a_state_is_dropped_only_where_that_is_asked_for(tmp_path):
    out, working = tmp_path / "out", tmp_path / "out.partial"
    (working / "state-00000030").mkdir(parents=True)
    message = r"state-00000030.*--resume to go on with it, --overwrite to drop it"
    with pytest.raises(CheckpointError, match=message), output_directory(out):
        pass
    assert (working / "state-00000030").is_dir()
    with output_directory(out, resume=True) as found:
        assert (found / "state-00000030").is_dir()


def test_what_an_attempt_without_a_state_left_goes(tmp_path):
    working = tmp_path / "out.partial"
    working.mkdir()
    (working / "half").write_text("")
    with output_directory(tmp_path / "out") as found:
        assert not any(found.iterdir())


def test_overwrite_drops_a_state_and_replaces_the_output(tmp_path):
    out = tmp_path / "out"
    written(out)
    (tmp_path / "out.partial" / "state-1").mkdir(parents=True)
    with output_directory(out, overwrite=True) as found:
        assert not any(found.iterdir())
        (found / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_failure_leaves_nothing_and_a_failure_with_a_state_leaves_that(tmp_path):
    with pytest.raises(ValueError, match="broken"), output_directory(tmp_path / "deep" / "out"):
        raise ValueError("broken")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(ValueError, match="broken"), output_directory(tmp_path / "deep" / "out") as working:
        (working / "state-7").mkdir()
        raise ValueError("broken")
    assert (tmp_path / "deep" / "out.partial" / "state-7").is_dir()


def test_another_process_at_work_is_noticed_before_anything_is_done(tmp_path):
    code = (
        "import sys, pathlib; from limbeck.checkpoint import output_directory\n"
        "with output_directory(pathlib.Path(sys.argv[1])) as d: print('at work', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "at work\n"
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with (
            pytest.raises(CheckpointError, match="another run is at work there"),
            output_directory(tmp_path / "out", **how),
        ):
            pytest.fail("two runs in one directory")
    other.communicate("")
    assert (tmp_path / "out").is_dir()


def test_what_no_stage_made_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="no limbeck output"), output_directory(tmp_path / "mine", overwrite=True):
        pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_names_in_a_config_are_of_the_directory_that_the_stage_was_called_from(tmp_path, monkeypatch):
    (tmp_path / "there" / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    made = written(tmp_path / "there" / "runs" / "student")
    assert made.path_of("runs/teacher") == "runs/teacher"
    monkeypatch.chdir(tmp_path / "here")
    assert made.path_of("runs/teacher") == str(tmp_path / "there" / "runs" / "teacher")
    assert made.path_of("owner/name") == "owner/name" and made.path_of(str(tmp_path)) == str(tmp_path)
    (made.path / MANIFEST).write_text(made.path.joinpath(MANIFEST).read_text().replace("called_from", "unsaid"))
    assert made.path_of("runs/teacher") == "runs/teacher"
