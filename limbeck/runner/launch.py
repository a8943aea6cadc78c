"""Which process of how many this is, as its launcher tells it in the environment: torchrun, srun, or an MPI.

torchrun also says where the processes meet. For srun that is the first node of the step, for an MPI on one machine that
machine; otherwise MASTER_ADDR has to say it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from limbeck.errors import ConfigError

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
"""Their variables for the number of a process, the number of all, and the number on this machine."""
PORT = 29400


class Launch(NamedTuple):
    """This process among those that were started together."""

    by: str | None
    """The launcher; None for a process that was started alone."""
    rank: int
    world_size: int
    local_rank: int


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says.

    Raises: ConfigError where it contradicts itself.
    """
    for name, (rank, size, local) in LAUNCHERS.items():
        if rank not in environ or size not in environ or (name == "srun" and not _is_step(environ)):
            continue
        found = Launch(name, int(environ[rank]), int(environ[size]), int(environ.get(local, "0")))
        if not 0 <= found.rank < found.world_size:
            raise ConfigError(f"{rank} {found.rank} is not below {size} {found.world_size}; started by {name}?")
        return found
    return Launch(None, 0, 1, 0)


def meet(launch: Launch, environ: MutableMapping[str, str] = os.environ) -> None:
    """Say where the processes meet, in MASTER_ADDR and MASTER_PORT, unless the launcher has.

    Raises: ConfigError where that cannot be known.
    """
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _address(launch, environ)
    # One port a job, so that two jobs on a machine do not meet.
    environ.setdefault("MASTER_PORT", str(PORT + int(environ.get("SLURM_JOB_ID", "0")) % 1000))


def _address(launch: Launch, environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if launch.by == "srun" and nodes:
        return first_node(nodes)
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(launch.world_size):
        return "127.0.0.1"
    raise ConfigError(
        f"{launch.world_size} processes started by {launch.by}: set MASTER_ADDR to the machine of process 0, or start "
        "them by torchrun."
    )


def first_node(nodes: str) -> str:
    """The first of Slurm's short list of nodes: `gpu[03-05,9],x1` -> `gpu03`."""
    name, numbers = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes).groups(default="")  # type: ignore[union-attr]
    return name + numbers


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has the variables of its whole job, and is one process."""
    return "SLURM_STEP_ID" in environ or "MASTER_ADDR" in environ or environ["SLURM_PROCID"] != "0"
