"""Starting JAX on one machine or many, and the few things that processes must agree on.

The platform and the number of simulated CPU devices are fixed before the first use of a backend,
which is why commands call `start` first. A job starts like this:

    process 0   start --- roll call --- JAX listens --+-- devices of all -- agree: "what I run" --+
                             |                        |                                           |
    process 1   start ---- hello ------ JAX joins ----+-- devices of all -- agree: compares ------+
                |<- start_secs -->||<--- at most start_secs ---->|       |<- at most start_secs ->|

`tinylm.main` takes part in the job that its cluster describes (see cluster.py); flags win.
Waiting always has a time limit: a peer that died must not hang the others. JAX aborts a process
that waits for its peers too long (exit code 134, a stack trace), so a timer of ours is first, with
one line. Processes compare how they were started through the key-value store of JAX's coordination
service, which needs no device and knows time limits.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import jax

from tinylm.core import cluster, roll_call
from tinylm.core.cluster import Job
from tinylm.core.errors import UserError, one_line

START_SECS = 50.0
LEAVE_SECS = 10.0
# JAX's own limit is so much later than ours, whose line a user can act on.
_JAX_LATER_SECS = 30

# What the numbers of a run depend on.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Files that are locked for as long as this process runs.
_places: list[IO[bytes]] = []


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

    Ends the program with one line and exit code 2 where not all processes have joined in time.

    Args:
      cpu_devices: simulated CPU devices of each process (0: the devices that are there).
      coordinator: HOST:PORT of process 0; "auto" for the cluster, which must be there.
      num_processes: of the job. Where it and process_id are left out, the environment may have
        them (Slurm, Open MPI, SkyPilot, a pod of Kubernetes).
      process_id: which of them this is, from 0.
      secs: how long to wait for the others (0: START_SECS).
      joins_cluster: whether an empty `coordinator` means the cluster, where there is one.
    """
    if cpu_devices:
        _simulate(cpu_devices)
    job = _job(coordinator, num_processes, process_id, joins_cluster)
    if job is not None:
        _join(job, secs or START_SECS)


def _job(coordinator: str, num_processes: int, process_id: int, joins_cluster: bool) -> Job | None:
    """Return the job to join, as flags and cluster describe it; None to run alone.

    The arguments are those of `start`.
    """
    if coordinator == "auto":
        job = cluster.find()
        if job is None:
            raise UserError(
                "--coordinator=auto finds no job of several processes (Slurm's srun, Open MPI, "
                "SkyPilot, JobSet, a TPU pod); start the command with srun, or give "
                "--coordinator=HOST:PORT, --num_processes and --process_id."
            )
        return job
    if coordinator and not num_processes and process_id == -1:
        num_processes, process_id = cluster.rank()
    if not coordinator and not num_processes and process_id == -1:
        return cluster.find() if joins_cluster else None
    job = Job(coordinator, num_processes, process_id)
    if not job.is_complete():
        raise UserError(
            "--coordinator=HOST:PORT, --num_processes and --process_id, numbered from 0, need "
            f"each other; found --coordinator={coordinator} --num_processes={num_processes} "
            f"--process_id={process_id}."
        )
    return job


def _join(job: Job, secs: float) -> None:
    """Join the other processes, or end the program with one line after `secs`."""
    arguments: dict[str, Any] = {}
    if job.coordinator:
        _take_place(job)
        arguments = {
            "coordinator_address": job.coordinator,
            "num_processes": job.num_processes,
            "process_id": job.process_id,
            "local_device_ids": cluster.local_devices(),
            # JAX would look for a cluster all the same, to choose one GPU of several.
            "cluster_detection_method": "deactivate",
        }
    if job.process_id == 0:
        _check_port_is_free(job)
    if job.coordinator and job.num_processes > 1:
        _call_the_roll(job, secs)
    with time_limit(secs, lambda: _nobody_came(job, secs)):
        try:
            jax.distributed.initialize(
                **arguments, initialization_timeout=int(secs) + _JAX_LATER_SECS
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{host()} could not join the job: {str(error).splitlines()[0]}"
            ) from error
        # The first use of the devices, where hosts tell each other what they have.
        try:
            jax.process_index()
        except RuntimeError as error:
            # Gloo connects CPUs by the names of the hosts.
            if "gloo" not in str(error):
                raise
            raise UserError(
                f"{host()} can't be reached by its own name ({one_line(error)}); give it an "
                "address in /etc/hosts."
            ) from error


def _call_the_roll(job: Job, secs: float) -> None:
    """Wait until all processes of the job came, with their numbers; raise UserError otherwise."""
    until = time.monotonic() + secs
    if job.process_id == 0:
        roll_call.answer(job, host(), until, lambda missing: _nobody_came(job, secs, missing))
        return
    try:
        roll_call.say_hello(job, host(), until)
    except roll_call.NotAllCame as error:
        if error.is_other_job:
            raise UserError(
                f"process {job.process_id} of {job.num_processes} on {host()} found another job, "
                f"or its own that runs without it, at {_address(job)} for {secs:.0f} s; stop that "
                "first, or give this one another --process_id or --coordinator."
            ) from error
        raise UserError(_nobody_came(job, secs)) from error


def _take_place(job: Job) -> None:
    """Raise UserError where this process of the job runs on this host already.

    JAX would let it join a second time, and abort all the others for it. The system unlocks the
    file when the process ends, however it does.
    """
    name = hashlib.sha256(f"{job.coordinator}/{job.process_id}".encode()).hexdigest()[:16]
    path = pathlib.Path(tempfile.gettempdir(), f"tinylm-{os.getuid()}-process-{name}.lock")
    try:
        place = path.open("ab")
    except OSError:
        # Without a folder for temporary files there is no telling.
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        place.close()
        raise UserError(
            f"process {job.process_id} of {job.num_processes} runs on {host()} already; stop it "
            "first, or give this one another --process_id or --coordinator."
        ) from error
    except OSError:
        place.close()
    else:
        _places.append(place)


def _simulate(cpu_devices: int) -> None:
    """Have this process see so many CPU devices; raise UserError where it sees others by now."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    except RuntimeError:
        # JAX has made its devices, as in a notebook that called another command before.
        found = jax.local_devices()
        if found[0].platform != "cpu" or len(found) != cpu_devices:
            raise UserError(
                f"--cpu_devices={cpu_devices} comes too late: JAX has {len(found)} "
                f"{found[0].platform} devices in this process; restart Python."
            ) from None


def is_shell_of_slurm() -> bool:
    """Say whether this is a shell or script of a Slurm job of several tasks, not started by srun as
    one of them.
    """
    tasks = os.environ.get("SLURM_NTASKS", "")
    has_several_tasks = tasks.isdigit() and int(tasks) > 1
    in_step = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return has_several_tasks and not in_step and not jax.distributed.is_initialized()


def _address(job: Job) -> str:
    """Return what a message calls the address of process 0, and where it comes from."""
    if job.source:
        return f"{job.coordinator} (from {job.source})"
    return f"--coordinator={job.coordinator}"


def _check_port_is_free(job: Job) -> None:
    """Raise UserError where another program of this machine listens at the coordinator's port.

    JAX would share the port with it, or wait for its peers until the time is over.
    """
    port = int(job.coordinator.rpartition(":")[2])
    remedy = " (JAX_COORDINATOR_PORT)" if job.source else ""
    with socket.socket() as probe:
        # As servers do, so that connections which an earlier job left half closed don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{_address(job)}: port {port} of {host()} cannot be used ({error}); another "
                f"program may have it: give all processes another port{remedy}."
            ) from error


def host() -> str:
    """Return the name of this machine, in words."""
    return f"host {socket.gethostname()}"


def _nobody_came(job: Job, secs: float, missing: Sequence[int] = ()) -> str:
    """Return the line of a process that has waited `secs` for the rest of its job.

    Args:
      job: ours.
      secs: how long it has waited.
      missing: the numbers of those that didn't come, as far as they are known.
    """
    if not job.coordinator:
        return (
            f"{host()} waited {secs:.0f} s for the other hosts that the cluster names; start this "
            "command on all of them, or raise --start_secs where they start far apart."
        )
    who = f"process {job.process_id} of {job.num_processes} on {host()}"
    if job.process_id and not _is_reachable(job.coordinator):
        return (
            f"{who} found nobody at {_address(job)} for {secs:.0f} s; is process 0 running there?"
        )
    names = f" (missing: {roll_call.names_of(missing)})" if missing else ""
    if job.source:
        return (
            f"{who} waited {secs:.0f} s, but not all {job.num_processes} processes that "
            f"{job.source} names came{names}; look at the output of the others, or raise "
            "--start_secs where they start far apart."
        )
    return (
        f"{who} waited {secs:.0f} s, but not all {job.num_processes} processes came{names}; start "
        "this command on every host with the same --coordinator and --num_processes and each its "
        "own --process_id."
    )


def _is_reachable(address: str) -> bool:
    """Say whether something listens at host:port."""
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def time_limit(
    secs: float, line: Callable[[], str], error: type[UserError] = UserError
) -> Iterator[None]:
    """End the program where the body takes longer than `secs`.

    A timer on a thread does it, for nothing in Python interrupts a wait inside JAX.

    Args:
      secs: the limit.
      line: makes the one line that is printed.
      error: the kind of error, which has the exit code.
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
    """Return what an error line of this process begins with.

    In a job of several that is its number and host; alone it is nothing.
    """
    if not jax.distributed.is_initialized():
        return ""
    return f"process {jax.process_index()} of {jax.process_count()} ({host()}): "


def lost_peer(error: Exception) -> bool:
    """Say whether an error of JAX came from a process of this job that is no longer there."""
    if not jax.distributed.is_initialized() or not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    signs = ("peer", "gloo", "nccl", "connection", "heartbeat", "unavailable")
    return any(sign in message for sign in signs)


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


def leave_soon(exit_code: int, secs: float = LEAVE_SECS) -> None:
    """See that this process, which ends after an error, is gone within `secs`.

    Its peers may not know of the error, and JAX waits for them at the exit.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        # At exit JAX waits for its peers, which may wait for this process.
        timer = threading.Timer(secs, lambda: os._exit(exit_code))
        timer.daemon = True
        timer.start()


def code_versions() -> dict[str, str]:
    """Return what code this process runs: a digest of our own, and the versions of what the numbers
    depend on.
    """
    package = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(b"\0")
        digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"tinylm code": digest.hexdigest()[:12], "python": platform.python_version(), **versions}
