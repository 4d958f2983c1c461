"""Whatever announces the end is obeyed, at once while nothing is trained; Ctrl-C at any moment is
no traceback.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from tinylm.core.errors import Preempted
from tinylm.core.preemption import StopRequest
from tinylm.core.signals import SIGNALS

ANNOUNCING = [number for number in SIGNALS if number != signal.SIGINT]


@pytest.fixture
def stop():
    """A request in this process, its handlers gone afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.nothing_to_save = False
    yield request
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_that_announces_the_end_is_noted(stop, number):
    assert not stop.reached()
    signal.raise_signal(number)
    assert stop.reached()


def test_a_wait_is_interrupted_and_what_is_outside_is_not(stop):
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(Preempted), stop.interrupts():
        pytest.fail("it was asked to stop before")
    stop._stopping = False
    with pytest.raises(Preempted), stop.interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        pytest.fail("the wait was not interrupted")
    signal.raise_signal(signal.SIGTERM)


def test_what_the_caller_ignores_stays_ignored_as_under_nohup(stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


WAITS = """
import pathlib, sys, time
from tinylm.core.preemption import StopRequest
from tinylm.data.stores import wait_for
StopRequest()
print("ready", flush=True)
wait_for([pathlib.Path("a store that nobody makes")], 1800)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_waiting_for_the_store_of_another_process_ends_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 75
    assert error == b"error: asked to stop before anything was trained; nothing is lost.\n"


# Signals of a process of two before anything was trained, and after: JAX's own handler then carries
# it to the other.
JOB = """
import os, signal, socket, sys, time
import jax
from tinylm.core import agreement, distributed
from tinylm.core.preemption import StopRequest
number, trained = int(sys.argv[2]), sys.argv[3] == "trained"
distributed.start(cpu_devices=1, coordinator=sys.argv[1], num_processes=2, process_id=number)
stop = StopRequest()
stop.nothing_to_save = not trained
agreement.barrier("begin", 60)
if number == 1:
    os.kill(os.getpid(), signal.SIGHUP)
    if not trained:
        time.sleep(60)
for step in range(400):
    if stop.reached():
        print("stopped at", step, flush=True)
        break
    time.sleep(0.05)
# Process 0 carries the job's service: where it leaves first, JAX aborts the other.
agreement.barrier("stopped", 30)
time.sleep(1 - number)
os._exit(75)
"""


@pytest.mark.parametrize("trained", ["trained", "untrained"])
def test_a_signal_to_one_process_of_a_job(trained, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", JOB, address]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [*command, str(number), trained],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in (0, 1)
    ]
    try:
        said = pair[1].communicate(timeout=60)
        assert pair[1].returncode == 75, said[1]
        if trained == "untrained":
            assert "asked to stop before anything was trained" in said[1]
            return
        other = pair[0].communicate(timeout=60)
        assert pair[0].returncode == 75, other[1]
        assert said[0] == other[0] != ""
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def python_catches_ctrl_c(process):
    """Say whether a process has a handler for SIGINT, by what Linux knows of it."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    caught = int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16
    )
    return bool(caught >> (signal.SIGINT - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("secs", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_ctrl_c_in_the_first_seconds_is_no_traceback(secs, tmp_path):
    """From when the package is imported: what Python does before, it says itself."""
    command = [sys.executable, "-m", "tinylm.main", "--config=tales", f"--workdir={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for wanted in True, False:
        while python_catches_ctrl_c(process) != wanted:
            time.sleep(0.001)
    time.sleep(secs)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130, 75), error
    assert "Traceback" not in error


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(tmp_path):
    """Its first import of all sends the signal."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tinylm.main"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
