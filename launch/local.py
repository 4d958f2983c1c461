"""Try a pod on one machine: several processes with simulated devices each, joined into one job.

python launch/local.py --processes=2 --devices=4 -- --config=tales --config.mesh.fsdp=true

What follows `--` goes to tinylm.main (another command: --module=tinylm.evaluate). Ctrl-C and
SIGTERM reach every process as SIGTERM, as do SIGHUP and the other signals of a stop: the run saves
and ends; a second Ctrl-C ends it at once. When a process dies, the others have --grace_secs to end
by themselves. After an exit code that can be resumed (tinylm/core/errors.py) the job starts again,
at most --restarts times, after 1, 2, 4, ... seconds; not after a second abort (134) before the
first step, for that is a crash. No process outlives this one.
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinylm.core.errors import RESUMABLE, PeerLost, Preempted  # noqa: E402
from tinylm.core.signals import SIGNALS, is_ignored  # noqa: E402

# How a process ends that was killed, or that JAX aborted because a peer was; and one that was
# stopped before it could save, which loses nothing that an earlier checkpoint hasn't.
ABORTED = (-signal.SIGABRT, 128 + signal.SIGABRT)
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL, *ABORTED)
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)


GIVE_UP = (
    "aborted twice before the first step (exit code 134): not a lost peer but a crash, "
    "perhaps of the compiler; its last lines above say where. Change model.unroll, model.attention "
    "or the mesh, and report it."
)


class Stop:
    """What this launcher was asked by signals, passed on to the processes of the job as SIGTERM."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.processes: list[subprocess.Popen] = []
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _) -> None:
        again = self.asked.is_set() and number == signal.SIGINT
        self.asked.set()
        end(self.processes, signal.SIGKILL if again else signal.SIGTERM)


def end(processes: list[subprocess.Popen], number: int) -> None:
    """Send a signal to each process that runs, and where it is SIGKILL to all that it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            elif process.poll() is None:
                process.send_signal(number)


def die_with_parent() -> None:
    """Have Linux kill this process when the launcher dies, however it dies."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def commands(options: argparse.Namespace) -> list[list[str]]:
    """Return the command of each process."""
    base = [
        sys.executable,
        "-m",
        options.module,
        *options.arguments,
        f"--cpu_devices={options.devices}",
    ]
    if options.processes == 1:
        return [base]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = [
            f"--coordinator=127.0.0.1:{free.getsockname()[1]}",
            f"--num_processes={options.processes}",
        ]
    return [[*base, *job, f"--process_id={i}"] for i in range(options.processes)]


def run_job(options: argparse.Namespace, stop: Stop, first_step: pathlib.Path) -> list[int]:
    """Run the job once; return the exit codes of the processes that ended by themselves.

    They make the file `first_step` when they have begun to train.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        "TINYLM_FIRST_STEP_FILE": str(first_step),
    }
    try:
        for command in commands(options):
            stop.processes.append(
                subprocess.Popen(
                    command, env=environment, start_new_session=True, preexec_fn=die_with_parent
                )
            )
        if stop.asked.is_set():  # a signal that came while they were being started
            end(stop.processes, signal.SIGTERM)
        return wait_for(stop.processes, options.grace_secs)
    finally:
        end(stop.processes, signal.SIGKILL)
        for process in stop.processes:
            process.wait()
        stop.processes.clear()


def wait_for(processes: list[subprocess.Popen], grace_secs: float) -> list[int]:
    """Wait until all have ended, or `grace_secs` after the first that failed; return the exit codes
    there are.
    """
    failed_at = None
    while True:
        codes = [process.poll() for process in processes]
        ended = [code for code in codes if code is not None]
        if any(ended) and failed_at is None:
            failed_at = time.monotonic()
        overdue = failed_at is not None and time.monotonic() - failed_at > grace_secs
        if len(ended) == len(processes) or overdue:
            for number, code in enumerate(codes):
                if code is None or code in KILLED:
                    print(f"launch: process {number} {_fate(code)}", file=sys.stderr)
            return ended
        time.sleep(0.05)


def _fate(code: int | None) -> str:
    return (
        "did not end after a peer had failed"
        if code is None
        else f"was killed or aborted (exit code {code})"
    )


def verdict(codes: list[int]) -> int:
    """Return the exit code that tells most about the job: what a process said, before that a peer
    was lost.

    The order: a mistake of the user (2), numbers (3), storage (5), a bug (1) or any other, a hang
    (4), a lost peer, and only where nothing else was said, that the run stopped and can be resumed
    (75).
    """
    if not any(codes):
        return 0
    said = {_meaning(code) for code in codes if code}
    others = sorted(said - {2, 3, 5, 1, *RESUMABLE})
    return next(code for code in (2, 3, 5, 1, *others, *sorted(RESUMABLE)) if code in said)


def _meaning(code: int) -> int:
    """Return the exit code that a code of the system stands for."""
    if code in KILLED:
        return PeerLost.exit_code
    if code in STOPPED:
        return Preempted.exit_code
    return code if code > 0 else 128 - code


def run(options: argparse.Namespace) -> int:
    """Run the job, again after failures that can be resumed; return the exit code."""
    stop = Stop()
    crashes = 0  # one after the other, before a first step
    for attempt in range(options.restarts + 1):
        with tempfile.TemporaryDirectory() as folder:
            first_step = pathlib.Path(folder, "first_step")
            codes = run_job(options, stop, first_step)
            crashed = not first_step.exists() and any(code in ABORTED for code in codes)
        code = verdict(codes)
        if code not in RESUMABLE or stop.asked.is_set():
            return code
        crashes = crashes + 1 if crashed else 0
        if crashes == 2:
            print(f"launch: {GIVE_UP}", file=sys.stderr)
            return 128 + signal.SIGABRT
        if code == PeerLost.exit_code:
            print(f"launch: peer lost (exit code {code})", file=sys.stderr)
        if attempt < options.restarts:
            seconds = 2**attempt
            print(
                (
                    f"launch: exit code {code}; again in {seconds} s ({attempt + 1} of "
                    f"{options.restarts})"
                ),
                file=sys.stderr,
            )
            if stop.asked.wait(seconds):
                return code
    return code


def main() -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of the job")
    parser.add_argument(
        "--devices", type=int, default=4, help="simulated CPU devices of each process"
    )
    parser.add_argument("--module", default="tinylm.main", help="the command to run")
    parser.add_argument(
        "--restarts", type=int, default=3, help="most times to start again (0: never)"
    )
    parser.add_argument(
        "--grace_secs", type=float, default=20, help="time to end by themselves after a peer failed"
    )
    parser.add_argument("arguments", nargs="*", help="after --: the flags of the command")
    options = parser.parse_args()
    if options.processes < 1 or options.devices < 1 or options.restarts < 0:
        parser.error("--processes and --devices must be at least 1, --restarts at least 0")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
