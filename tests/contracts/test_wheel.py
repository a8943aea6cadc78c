"""What is published is complete: archives, their descriptions, and a demo from an empty environment and folder."""

import os
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata

import pytest
from docs_blocks import ROOT

import limbeck

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_one_version():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "limbeck.version.__version__"}
    assert metadata.version("limbeck") == limbeck.__version__


def test_license_and_versions_of_python_are_declared():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in PYPROJECT["project"]["classifiers"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_archives_are_complete_and_the_wheel_runs_the_demo_anywhere(tmp_path):
    source, dist, python = tmp_path / "source", tmp_path / "dist", tmp_path / "venv" / "bin" / "python"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source, cwd=tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", "build", "twine", cwd=tmp_path)
    run(python, "-m", "build", "--outdir", dist, source, cwd=tmp_path)
    run(python, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=tmp_path)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert {name for name in tracked() if name.startswith("limbeck/")} <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert {name for name in tracked() if not name.startswith(".")} <= inside
    empty, folder = tmp_path / "empty", tmp_path / "folder"
    venv.create(empty, with_pip=True)
    folder.mkdir()
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(empty / "bin" / "pip", "install", "--quiet", *constraints, "torch==2.13.0", wheel, cwd=folder)
    run(empty / "bin" / "limbeck", "demo", "--num-traces", 60, "--num-problems", 10, cwd=folder)
    assert (folder / "runs" / "demo" / "report.html").stat().st_size > 10_000
    code = "import limbeck; print(limbeck.__version__, limbeck.__file__)"
    version, file = run(empty / "bin" / "python", "-c", code, cwd=folder).split()
    assert version == limbeck.__version__ and str(empty) in file
