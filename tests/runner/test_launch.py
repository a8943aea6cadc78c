"""Which process this is: each launcher's variables, and what they leave open."""

import pytest

from limbeck.errors import ConfigError
from limbeck.runner.launch import Launch, first_node, launched, meet

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch(None, 0, 1, 0)),
        (TORCHRUN, Launch("torchrun", 3, 8, 1)),
        (SRUN, Launch("srun", 1, 2, 1)),
        (MPI, Launch("Open MPI", 1, 4, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, Launch("MPICH", 2, 3, 0)),
        (SRUN | TORCHRUN, Launch("torchrun", 3, 8, 1)),  # torchrun inside a job of Slurm
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Launch("srun", 1, 2, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch(None, 0, 1, 0)),  # the batch script itself
    ],
)
def test_processes_know_which_they_are(environ, expected):
    assert launched(environ) == expected


def test_a_number_beyond_the_others_is_refused():
    with pytest.raises(ConfigError, match="RANK 8 is not below WORLD_SIZE 8"):
        launched(TORCHRUN | {"RANK": "8"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9],x1", "gpu03"),
        ("a,b", "a"),
        ("n-1-[7]", "n-1-7"),
        ("rack2gpu[1,3]", "rack2gpu1"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


def test_where_processes_meet():
    environ = SRUN | {"SLURM_STEP_NODELIST": "gpu[03-05]"}
    meet(launched(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("gpu03", str(29400 + 711))
    environ = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    meet(launched(environ), environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ConfigError, match="4 processes started by Open MPI: set MASTER_ADDR"):
        meet(launched(MPI), dict(MPI))
    environ = TORCHRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
    meet(launched(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("here", "1")
