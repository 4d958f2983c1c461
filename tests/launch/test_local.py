"""The launcher for one machine: a real job, and processes that play every way in which a job can
end.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest
from helpers import ROOT, SMALL, lines

from tinylm.core.signals import SIGNALS

LAUNCHER = ROOT / "launch" / "local.py"
FEW_STEPS = [
    "--config.train.stop_step=6",
    "--config.train.steps_per_dispatch=1",
    "--config.eval.every_steps=0",
    "--config.sample.max_tokens=0",
    "--config.model.dropout=0.0",
    "--config.model.num_layers=1",
]


def launch(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture
def verdict():
    spec = importlib.util.spec_from_file_location("launch_local", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.verdict


@pytest.mark.slow  # tests/test_runs.py has a real job, too, of two processes of two devices
def test_two_processes_of_four_devices_train_as_one_of_eight(tmp_path):
    for processes, devices in (2, 4), (1, 8):
        done = launch(
            f"--processes={processes}",
            f"--devices={devices}",
            "--restarts=0",
            "--",
            *SMALL,
            *FEW_STEPS,
            "--config.mesh.model=2",
            f"--workdir={tmp_path}/{processes}",
        )
        assert done.returncode == 0, done.stderr
    ours, theirs = lines(tmp_path / "2"), lines(tmp_path / "1")
    assert sorted(ours) == sorted(theirs) == list(range(1, 7))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([0, 0], 0),
        ([134, 2], 2),  # the peer of a process that refused is aborted: the refusal is what counts
        ([-6, -9], 6),
        ([0, 137], 6),
        ([3, -6], 3),
        ([1, 75], 1),
        ([75, 75], 75),
        ([75, -9], 6),
        ([-15, 75], 75),
        ([-11, 0], 139),
        ([4], 4),
    ],
)
def test_the_exit_code_is_what_tells_most(verdict, codes, wanted):
    assert verdict(codes) == wanted


class Job:
    """A job whose processes run a small script in the place of training."""

    def __init__(self, folder: pathlib.Path, script: str):
        (folder / "player.py").write_text(
            "import os, pathlib, signal, sys, time\n"
            "number = int(next(a for a in sys.argv if "
            "a.startswith('--process_id=')).partition('=')[2])\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "starts = len(list(folder.glob(f'{number}-*')))\n"
            "(folder / f'{number}-{os.getpid()}').touch()\n" + textwrap.dedent(script)
        )
        self.folder, self.environment = folder, {**os.environ, "PYTHONPATH": str(folder)}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, LAUNCHER, "--module=player", "--processes=2", *arguments]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def pids(self) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in self.folder.glob("?-*")]

    def wait_for(self, count: int) -> None:
        while len(self.pids()) < count:
            time.sleep(0.01)

    def no_orphan(self) -> bool:
        """Say whether all processes are gone, within two seconds."""
        for _ in range(100):
            if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in self.pids()):
                return True
            time.sleep(0.02)
        return False


def test_a_lost_peer_ends_the_other_and_the_job_starts_again(tmp_path):
    job = Job(
        tmp_path, "if starts: sys.exit(0)\nif number: os.kill(os.getpid(), 9)\ntime.sleep(100)"
    )
    process = job.start("--grace_secs=0.2")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    assert "process 1 was killed or aborted" in error
    assert "process 0 did not end after a peer had failed" in error
    assert "peer lost" in error
    assert len(job.pids()) == 4
    assert job.no_orphan()


def test_restarts_have_a_limit(tmp_path):
    job = Job(tmp_path, "sys.exit(4)")
    process = job.start("--restarts=1")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 4
    assert "exit code 4; again in 1 s (1 of 1)" in error
    assert len(job.pids()) == 4


@pytest.mark.parametrize("code", [1, 2, 3, 5])
def test_what_cannot_be_resumed_is_not_started_again(tmp_path, code):
    job = Job(tmp_path, f"sys.exit({code})")
    process = job.start()
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len(job.pids()) == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_reach_every_process_as_a_request_to_stop(tmp_path, number):
    job = Job(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / f"ready{number}").touch()
        time.sleep(100)
    """,
    )
    process = job.start()
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert len(job.pids()) == 2, "what was asked to stop is not started again"
    assert job.no_orphan()


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells children that their parent died"
)
def test_no_process_outlives_a_killed_launcher(tmp_path):
    job = Job(tmp_path, "time.sleep(100)")
    process = job.start()
    job.wait_for(2)
    process.kill()
    process.communicate()
    assert job.no_orphan()


@pytest.mark.parametrize(("trained", "starts"), [(False, 2), (True, 3)])
def test_a_crash_before_the_first_step_is_tried_twice_alone(tmp_path, trained, starts):
    note = "open(os.environ['TINYLM_FIRST_STEP_FILE'], 'w').close()\n" if trained else ""
    job = Job(tmp_path, f"{note}if not number: os.abort()\ntime.sleep(100)")
    process = job.start("--restarts=2", "--grace_secs=0.2")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (6 if trained else 134), error
    assert len(job.pids()) == 2 * starts
    assert ("aborted twice before the first step" in error) == (not trained)
    assert job.no_orphan()
