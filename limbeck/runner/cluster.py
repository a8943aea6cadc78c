"""Parts of a job as Ray tasks: on the cluster of RAY_ADDRESS, else on the cores of this machine.

A task whose worker dies is given to another one, RETRIES times. A task computes with as many threads as this process
would (OMP_NUM_THREADS) and takes as many cores, so that it gives the same bits and no core is asked twice; where the
cluster has GPUs and no CPU is asked for, it takes one of them and one core, with one thread. Relative paths mean what
they mean here: on several machines the working directory must be one that they share.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from limbeck.errors import ConfigError, LimbeckError
from limbeck.placement import Asked, asked, asking
from limbeck.runner.outcome import Outcome, name_of
from limbeck.runner.threads import threads

Item = TypeVar("Item")
RETRIES = 3
IN_FLIGHT_PER_CORE = 4
"""Tasks handed over ahead: enough to keep every core busy and to show an autoscaler that there is more to do."""
STORE_BYTES = 256 * 2**20
"""Ray's object store on one machine: what goes through it is small, results are files."""


def ray_map(
    function: Callable[[Any, Item], Any],
    items: Iterable[Item],
    *,
    prepare: Callable[[], Any] | None = None,
    cores: int | None = None,
    own_process: bool = False,
    name: str | None = None,
) -> Iterator[tuple[Item, Any]]:
    """(item, function(prepare(), item)) for every item, as they are done.

    Args:
      function: repeatable, since it is called again for an item whose worker died.
      prepare: makes what the calls share; a worker keeps it until it gets another job.
      cores: of a task; None takes one for each of torch's threads, or a GPU and a core where the cluster has GPUs.
      own_process: end a worker after one item.
      name: what the tasks are called; None takes the function's name.
    Raises: what a call raises; LimbeckError for an item whose workers died more than RETRIES times. The others end.
    """
    ray = connect()
    name = name or name_of(function)
    settings = {"name": name, "max_retries": RETRIES, "max_calls": int(own_process)}
    resources = _resources(ray, cores)
    work = ray.remote(**settings, **resources)(_work)
    key = hashlib.sha256(ray.cloudpickle.dumps(prepare)).digest()
    submit = partial(work.remote, os.getcwd(), _threads(resources), asked(), key, prepare, function)
    most = IN_FLIGHT_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(items)
    running: dict[Any, Any] = {}
    try:
        while True:
            for item in itertools.islice(waiting, most - len(running)):
                running[submit(item)] = item
            if not running:
                return
            [done], _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), _result(ray, done, name)
    finally:
        for left in running:
            ray.cancel(left, force=True)


def connect() -> Any:
    """The ray module, connected to RAY_ADDRESS or to a cluster of this machine alone that ends with this process.

    Raises: ConfigError when ray is not installed or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray's one switch for loopback; read when ray is imported, on any system in spite of its name.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--on ray: ray is not installed; pip install 'limbeck[ray]'.") from error
    if ray.is_initialized():
        return ray
    alone = {} if address else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"RAY_ADDRESS {address}" if address else "--on ray"
        raise ConfigError(
            f"{place}: no cluster answers ({error}); start one with ray start --head, or unset RAY_ADDRESS to use the "
            "cores of this machine."
        ) from error
    return ray


def _resources(ray: Any, cores: int | None) -> dict[str, float]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if cores is None and asked().device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes):
        return {"num_cpus": 1, "num_gpus": 1}
    # More than the largest machine has would never be granted.
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return {"num_cpus": max(1, min(cores or torch.get_num_threads(), largest))}


def _threads(resources: Mapping[str, float]) -> int:
    """Of a task: those of this process, or one beside a GPU, where only one core is reserved."""
    return 1 if "num_gpus" in resources else torch.get_num_threads()


def _result(ray: Any, task: Any, name: str) -> Any:
    try:
        outcome = ray.get(task)
    except ray.exceptions.RayError as error:
        raise LimbeckError(
            f"{name}: the workers of a task died again and again ({str(error).strip().splitlines()[0]}); was memory "
            "short? Called again, the command goes on."
        ) from error
    return outcome.unwrap()


_shared: dict[bytes, Any] = {}
"""In a worker: what the parts of its last job share."""


def _work(
    directory: str,
    cores: int,
    placement: Asked,
    key: bytes,
    prepare: Callable[[], Any] | None,
    function: Callable[..., Any],
    item: Any,
) -> Outcome:
    """One part, in a worker."""
    try:
        os.chdir(directory)
    except OSError as error:
        return Outcome(
            None,
            ConfigError(
                f"{directory}: not there on the worker {platform.node()} ({error}); --on ray needs a working directory "
                "that all machines of the cluster share."
            ),
        )
    with threads(cores), asking(*placement):
        if key not in _shared:
            _shared.clear()
            prepared = Outcome(None) if prepare is None else Outcome.of(prepare)
            if prepared.error is not None:
                return prepared
            _shared[key] = prepared.value
        return Outcome.of(function, _shared[key], item)
