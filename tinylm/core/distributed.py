"""Starting JAX on one machine or many, and the few things that processes must agree on.

The platform and the number of simulated CPU devices are fixed before the first use of a backend, which is why
commands call `start` first. A cluster (Slurm, Kubernetes, Cloud TPU, Open MPI) is detected by JAX; explicit flags win.
Waiting always has a time limit: a peer that died must not hang the others.
"""

import os
from typing import Any

import jax
import numpy as np

from tinylm.core.errors import UserError

_CLUSTER_VARIABLES = (
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "JAX_COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)
START_SECS = 60


def start(*, cpu_devices: int = 0, coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Set platform and devices, and join the job's other processes where there are any.

    `cpu_devices` > 0 asks for that many simulated CPU devices per process. Raises UserError where a process cannot
    join within START_SECS.
    """
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if coordinator and (num_processes < 1 or process_id < 0):
        raise UserError("--coordinator needs --num_processes and --process_id as well.")
    if not coordinator and not _in_cluster():
        return
    arguments: dict[str, Any] = {} if not coordinator else {
        "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=START_SECS)
    except (RuntimeError, ValueError) as error:
        who = f"process {process_id} of {num_processes}" if coordinator else "this process"
        raise UserError(f"{who} could not join the job: {str(error).splitlines()[0]}") from error


def _in_cluster() -> bool:
    """Say whether the environment names a job of several processes."""
    sizes = [os.environ.get(name, "") for name in _CLUSTER_VARIABLES[:2]]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return any(s.isdigit() and int(s) > 1 for s in sizes) or "," in hosts or any(
        name in os.environ for name in _CLUSTER_VARIABLES[2:]
    )  # fmt: skip


def is_main() -> bool:
    """Say whether this is process 0, the only one that writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes have come to the point `name`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(name: str, value: str) -> None:
    """Raise UserError unless every process gives the same `value` for `name`."""
    if jax.process_count() == 1:
        return
    import hashlib

    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    for process, other in enumerate(np.asarray(digests)):
        if not np.array_equal(other, digests[0]):
            raise UserError(f"process {process} has another {name} than process 0; start all with the same command.")
