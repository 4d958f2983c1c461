"""Starting JAX on one machine or many, and the few things that processes must agree on.

The platform and the number of simulated CPU devices are fixed before the first use of a backend,
which is why commands call `start` first. A cluster (Slurm, Cloud TPU, Open MPI) is detected by JAX,
for `tinylm.main`; explicit flags win. Waiting always has a time limit: a peer that died must not
hang the others. JAX aborts a process whose peers don't come (exit code 134, a stack trace), so a
timer of ours is first, with one line. Processes compare how they were started through the key-value
store of JAX's coordination service, which needs no device and knows time limits.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tinylm.core import errors
from tinylm.core.errors import HangError, UserError

# Of Slurm the tasks of the step, which srun alone sets: SLURM_NTASKS is there in the shell of an
# allocation, too.
_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_COORDINATORS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
START_SECS = 50.0
BARRIER_SECS = 600.0
LEAVE_SECS = 10.0
_calls = itertools.count()


def start(
    *,
    cpu_devices: int = 0,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    secs: float = 0,
    joins_cluster: bool = True,
) -> None:
    """Set platform and devices, and join the job's other processes where there are any.

    `cpu_devices` > 0 asks for that many simulated CPU devices per process. The job is the one that
    `coordinator` and the two numbers describe, or where `coordinator` is "auto", or `joins_cluster`
    and it is empty, the cluster. Ends the program with one line and exit code 2 where not all
    processes have joined within `secs` (0: START_SECS).
    """
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    complete = (
        re.fullmatch(r".+:\d{1,5}", coordinator, re.ASCII) and 0 <= process_id < num_processes
    )
    from_cluster = coordinator == "auto" or (joins_cluster and not coordinator)
    if coordinator == "auto":
        coordinator = ""
        if not _in_cluster():
            raise UserError(
                "--coordinator=auto finds no job of several processes (Slurm's srun, Open "
                "MPI, a TPU pod); start the "
                "command with srun, or give --coordinator=HOST:PORT, --num_processes and "
                "--process_id."
            )
    if (coordinator or num_processes or process_id != -1) and not complete:
        raise UserError(
            "--coordinator=HOST:PORT, --num_processes and --process_id, numbered from 0, "
            "need each other; found "
            f"--coordinator={coordinator} --num_processes={num_processes} "
            f"--process_id={process_id}."
        )
    if not coordinator and not (from_cluster and _in_cluster()):
        return
    if process_id == 0:
        _check_port_is_free(coordinator)
    arguments: dict[str, Any] = (
        {}
        if not coordinator
        else {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    )
    secs = secs or START_SECS
    with time_limit(secs, lambda: _nobody_came(coordinator, num_processes, process_id, secs)):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=int(secs) + 30)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{host()} could not join the job: {str(error).splitlines()[0]}"
            ) from error
        # The first use of the devices, where hosts tell each other what they have.
        jax.process_index()


def _in_cluster() -> bool:
    """Say whether the environment names a job of several processes."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (
        any(s.isdigit() and int(s) > 1 for s in sizes)
        or "," in hosts
        or any(name in os.environ for name in _COORDINATORS)
    )


def is_shell_of_slurm() -> bool:
    """Say whether this is a shell or script of a Slurm job of several tasks, not started by srun as
    one of them.
    """
    tasks = os.environ.get("SLURM_NTASKS", "")
    return (
        tasks.isdigit()
        and int(tasks) > 1
        and not (jax.distributed.is_initialized() or _in_cluster())
    )


def _check_port_is_free(coordinator: str) -> None:
    """Raise UserError where another program of this machine listens at the coordinator's port.

    JAX would share the port with it, or wait for its peers until the time is over.
    """
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        # As servers do, so that connections which an earlier job left half closed don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--coordinator={coordinator}: port {port} of {host()} cannot be used "
                f"({error}); another program may "
                "have it: give all processes another port."
            ) from error


def host() -> str:
    """Return the name of this machine, in words."""
    return f"host {socket.gethostname()}"


def _nobody_came(coordinator: str, num_processes: int, process_id: int, secs: float) -> str:
    """Return the line for a process that waited for its job in vain."""
    if not coordinator:
        return (
            f"{host()} waited {secs:.0f} s for the other hosts that the cluster names; "
            "start this command on all of "
            "them, or raise --start_secs where they start far apart."
        )
    who = f"process {process_id} of {num_processes} on {host()}"
    if process_id and not _reachable(coordinator):
        return (
            f"{who} found nobody at --coordinator={coordinator} for {secs:.0f} s; is process 0 "
            "running there?"
        )
    return (
        f"{who} waited {secs:.0f} s, but not all {num_processes} processes came; start "
        "this command on every host with "
        "the same --coordinator and --num_processes and each its own --process_id."
    )


def _reachable(address: str) -> bool:
    """Say whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def time_limit(
    secs: float, line: Callable[[], str], error: type[UserError] = UserError
) -> Iterator[None]:
    """End the program with one line and the exit code of `error` where the body takes longer than
    `secs`.

    A timer on a thread, for nothing in Python interrupts a wait inside JAX.
    """

    def give_up() -> None:
        print(f"error: {line()}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    timer = threading.Timer(secs, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_main() -> bool:
    """Say whether this is process 0, the only one that writes logs."""
    return jax.process_index() == 0


def speaker() -> str:
    """Return what an error line of this process begins with: nothing, or its number and host in a
    job of several.
    """
    if not jax.distributed.is_initialized():
        return ""
    return f"process {jax.process_index()} of {jax.process_count()} ({host()}): "


def lost_peer(error: Exception) -> bool:
    """Say whether an error of JAX came from a process of this job that is no longer there."""
    signs = ("peer", "gloo", "nccl", "connection", "heartbeat", "unavailable")
    return (
        jax.distributed.is_initialized()
        and isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in signs)
    )


def note_first_step() -> None:
    """Tell the launcher, where it asks for it, that a first step was compiled and is under way.

    JAX aborts a process with 134 when a peer is lost, and a compiler that crashes aborts it with
    134, too. A launcher starts again after the first; the second would come again, and always
    before there is this file.
    """
    path = os.environ.get("TINYLM_FIRST_STEP_FILE", "")
    if path:
        with contextlib.suppress(OSError):
            pathlib.Path(path).touch()


def leave(exit_code: int) -> None:
    """End this process after an error, within LEAVE_SECS though its peers may not know of it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        timer = threading.Timer(LEAVE_SECS, lambda: os._exit(exit_code))
        timer.daemon = True
        timer.start()
    sys.exit(exit_code)


@functools.cache
def client() -> Any:
    """Return the client of JAX's coordination service; JAX itself has no public name for it, Orbax
    has.
    """
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def barrier(name: str, secs: float = BARRIER_SECS) -> None:
    """Wait until all processes have come to the point `name`, once in a program; raise HangError
    after `secs`.
    """
    if jax.process_count() == 1:
        return
    with _waiting(f"not all processes came to {name!r} within {secs:.0f} s"):
        client().wait_at_barrier(f"tinylm/{name}", int(secs * 1000))


@contextlib.contextmanager
def _waiting(line: str) -> Iterator[None]:
    """Raise HangError with `line` where a call of the coordination service has waited in vain."""
    try:
        yield
    except RuntimeError as error:
        raise HangError(f"{line}: {str(error).splitlines()[0]}") from error


def _from_0(key: str, secs: float) -> Any:
    """Return what process 0 has put, or puts within `secs`, under `key`."""
    with _waiting(f"process 0 did not answer within {secs:.0f} s"):
        return json.loads(client().blocking_key_value_get(key, int(secs * 1000)))


def from_main(make: Callable[[], Any], secs: float = BARRIER_SECS) -> Any:
    """Return on every process what `make` returns on process 0, plain values; a UserError there is
    raised on all.
    """
    if jax.process_count() == 1:
        return make()
    key, service = f"tinylm/from_main/{next(_calls)}", client()
    if is_main():
        try:
            value = make()
        except UserError as error:
            service.key_value_set(key, json.dumps([type(error).__name__, str(error)]))
            raise
        service.key_value_set(key, json.dumps([value]))
        return value
    found = _from_0(key, secs)
    if len(found) > 1:
        raise getattr(errors, found[0])(found[1])
    return found[0]


def agree(facts: dict[str, Any], secs: float = START_SECS) -> None:
    """Raise the same UserError on every process where one differs from process 0 in one of `facts`.

    To be called once, by all processes; the line names the host and up to three facts with both
    values.
    """
    if jax.process_count() == 1:
        return
    process, service = jax.process_index(), client()
    ours = json.dumps([host(), {name: repr(fact) for name, fact in facts.items()}])
    if process == 0:
        service.key_value_set("tinylm/facts", ours)
    else:
        their_host, theirs = _from_0("tinylm/facts", secs)
        differing = _differing(json.loads(ours)[1], theirs)
        if differing:
            service.key_value_set(
                f"tinylm/differing/{process:06}",
                f"process {process} on {host()} was started otherwise than process 0 on "
                f"{their_host}: {differing}; "
                "start every host with the same command, files and versions.",
            )
    barrier("comparing how processes were started", secs)
    complaints = sorted(service.key_value_dir_get("tinylm/differing/"))
    if complaints:
        raise UserError(complaints[0][1])


def _differing(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Return "X=a instead of b" for the facts that differ, the first three of them."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    shown = [f"{name}={ours.get(name)} instead of {theirs.get(name)}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def code_versions() -> dict[str, str]:
    """Return what code this process runs: a digest of our own, and the versions of what the numbers
    depend on.
    """
    package = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"tinylm code": digest.hexdigest()[:12], "python": platform.python_version(), **versions}
