"""All stages on a device that is not there: no tensors of two devices meet, and nothing waits, launches or moves more
than it may. The files beside this one are run in a process of their own each, with the device put in place first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretend import building

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hooks():
    reason = building.why_not()
    if reason:
        pytest.skip(reason)
    return building.library()


def on_device(name: str, marks: str = "not slow and not gpu") -> None:
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"LIMBECK_DEVICE": "auto", "PYTHONPATH": path}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "pretend.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "-x",
        "-m",
        marks,
    ]
    found = subprocess.run([*command, str(HERE / name)], capture_output=True, text=True, env=environ)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-3000:]


@pytest.mark.parametrize("name", ["step_on_device.py", "stages_on_device.py", "decoding_on_device.py"])
def test_contracts_on_the_pretend_device(hooks, name):
    on_device(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_on_device.py", "stages_on_device.py"])
def test_all_contracts_on_the_pretend_device(hooks, name):
    on_device(name, "slow")
