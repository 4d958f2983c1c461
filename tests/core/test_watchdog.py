"""Jobs that no longer move: each process that plays a part is real, its training is not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from helpers import ROOT
from test_distributed import Pair

PLAYER = """
    import pathlib, sys, time
    import jax
    from tinylm import cli
    from tinylm.core import distributed, watchdog
    watchdog.SILENT_SECS = 4.0
    def main(flags):
        watched = watchdog.Watchdog(LIMIT)
        for step in range(1000):
            sleep = 0.05
            if jax.process_index() == 1:
                sleep = SLEEP(step)
            time.sleep(sleep)
            pathlib.Path(f"{jax.process_index()}-{step}").touch()
            watched.beat(step, sleep)
        watched.close()
    sys.exit(cli.run(cli.Command(__doc__, main)))
"""


def play(folder, limit, sleep):
    """Start two processes that take steps; the second sleeps `sleep(step)` seconds at each."""
    script = (
        textwrap.dedent(PLAYER)
        .replace("LIMIT", str(limit))
        .replace("SLEEP", f"(lambda step: {sleep})")
    )
    (folder / "player.py").write_text(script)
    pair = Pair(folder)
    for process in 0, 1:
        pair.start(process, command=(str(folder / "player.py"),))
    return pair


def test_the_stuck_process_is_named_by_both_with_the_stacks_of_all_threads(tmp_path):
    """The second sleeps before step 3; the first goes on, so it names the other only because that
    one gives up.
    """
    (first, first_error), (second, second_error) = play(
        tmp_path, 3, "1000 if step == 3 else 0.05"
    ).ends()
    assert (first, second) == (4, 4), (first_error, second_error)
    assert "error: process 1 of 2 (host" in second_error
    assert "after step 2 (train.hang_secs)" in second_error
    assert "furthest behind is process 1 (host" in second_error
    assert "player.py" in second_error and "in main" in second_error, (
        "the stack of the thread that sleeps"
    )
    assert "following a peer: no step for" in first_error


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other(tmp_path, stopped):
    pair = play(tmp_path, 60, "0.05")
    while not (tmp_path / "1-9").exists():
        time.sleep(0.01)
    os.kill(pair.processes[stopped].pid, signal.SIGSTOP)
    other = pair.processes[1 - stopped]
    error = other.communicate(timeout=60)[1]
    pair.processes[stopped].kill()
    pair.processes[stopped].communicate()
    assert other.returncode == 4, error
    assert f"process {stopped}" in error
    assert "gives no sign of life: it is stopped" in error
    assert "Current thread" in error


def test_a_straggler_is_named_within_ten_steps(tmp_path):
    pair = play(tmp_path, 60, "0.5")
    first = pair.processes[0]
    for line in first.stderr:
        if "is slow" in line:
            break
    for process in pair.processes:
        process.kill()
        process.communicate()
    assert "process 1 (host" in line
    assert len(list(tmp_path.glob("1-*"))) <= 10


@pytest.mark.parametrize("ending", ["pass", "raise OSError"])
def test_a_process_alone_gives_up_but_not_while_it_is_patient(ending):
    """After a section that was given more time the limit holds again, even if an error ended it."""
    script = f"""
        import contextlib
        import time
        from tinylm.core import watchdog
        watchdog.POLL_SECS = 0.05
        watched = watchdog.Watchdog(0.5)
        time.sleep(1)  # before the first step nothing is overdue
        watched.beat(1, 0.0)
        with contextlib.suppress(OSError), watched.patient():
            time.sleep(2)
            {ending}
        print("patient", flush=True)
        time.sleep(100)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 4, done.stderr
    assert done.stdout == "patient\n"
    assert "error: no step for 1 s after step 1 (train.hang_secs)" in done.stderr
