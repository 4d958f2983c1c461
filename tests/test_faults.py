"""Faults from outside, on whole runs: kills, stops, limits, pipes.

`python benchmarks/faults.py` runs the full matrix.
"""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, SMALL, finished, lines, state_digest

LONG = [
    "--config.train.num_steps=200",
    "--config.checkpoint.every_steps=5",
    "--config.eval.every_steps=50",
    "--config.train.steps_per_dispatch=2",
    "--config.sample.max_tokens=0",
]
FEW = "--config.train.stop_step=40"
CANARY = "canary-5f2d9c"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A private cache, so that only the first run of all compiles; and a secret that must show up
    nowhere.
    """
    cache = tmp_path_factory.getbasetemp() / "cache"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
        "SECRET_TOKEN": CANARY,
    }


@pytest.fixture
def start(environment):
    """A function that starts the training command; what still runs at the end is killed."""
    started = []

    def begin(workdir, *extra, command=None, env=None, **kwargs):
        command = command or [
            sys.executable,
            "-m",
            "tinylm.main",
            *SMALL,
            f"--workdir={workdir}",
            *extra,
        ]
        options = {
            "cwd": ROOT,
            "env": env or environment,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        started.append(subprocess.Popen(command, text=True, **{**options, **kwargs}))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ends(process, code=0):
    """Wait; return what it said."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return (out or "") + (error or "")


def until(condition, process=None):
    """Wait for a condition, which must come before the process ends."""
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def logged(workdir):
    return (
        max(lines(workdir), default=0) if (pathlib.Path(workdir) / "metrics.jsonl").exists() else 0
    )


def has_logged(workdir, step):
    return logged(workdir) >= step


def is_saving(folder, step):
    """Say whether a save of this step or a later one has begun and isn't finished."""
    return any(int(path.stem) >= step for path in folder.glob("*.unfinished"))


@pytest.fixture
def job(environment, start):
    """A function that starts the training command in several processes of a device each; they end
    with their start.
    """

    def begin(workdir, *extra, processes=2):
        options = [f"--processes={processes}", "--devices=1", "--restarts=0"]
        command = [
            sys.executable,
            "launch/local.py",
            *options,
            "--",
            *SMALL,
            *LONG,
            f"--workdir={workdir}",
            *extra,
        ]
        return start(None, command=command)

    return begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """200 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "tinylm.main", *SMALL, *LONG, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (workdir.parent / "said").write_text(done.stdout + done.stderr)
    return workdir


def same(workdir, whole):
    assert lines(workdir) == lines(whole)
    assert lines(workdir, "valid") == lines(whole, "valid")
    assert state_digest(workdir, 200) == state_digest(whole, 200)


@pytest.mark.slow
def test_fault_1_nothing_twice_on_four_devices(start, tmp_path):
    for name in "one", "two":
        ends(
            start(
                tmp_path / name,
                "--cpu_devices=4",
                "--config.mesh.fsdp=true",
                "--config.train.stop_step=20",
            )
        )
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert state_digest(tmp_path / "one", 20) == state_digest(tmp_path / "two", 20)


@pytest.mark.slow
def test_fault_2_killed_at_20_random_steps(start, whole, tmp_path):
    rng, workdir = random.Random(0), tmp_path / "run"
    for at in sorted(rng.sample(range(1, 190), 20)):
        process = start(workdir, *LONG)
        until(functools.partial(has_logged, workdir, at), process)
        process.kill()
        process.communicate()
    assert "resuming from step" in ends(start(workdir, *LONG))
    same(workdir, whole)


@pytest.mark.slow
def test_fault_4_killed_during_saves(start, whole, tmp_path):
    """Ten kills, each some milliseconds after a save began; leftovers go."""
    rng, workdir = random.Random(0), tmp_path / "run"
    for number in range(10):
        process = start(workdir, *LONG)
        folder = workdir / "checkpoints"
        until(functools.partial(is_saving, folder, 15 * (number + 1)), process)
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        process.communicate()
    ends(start(workdir, *LONG))
    same(workdir, whole)
    assert all(path.name.isdigit() for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "compile", "evaluation"])
def test_fault_5_sigterm(start, whole, tmp_path, when):
    workdir = tmp_path / "run"
    process = start(workdir, *LONG)
    if when == "start":
        until((workdir / "lock.json").exists, process)
    elif when == "compile":
        until((workdir / "lock.json").exists, process)
        time.sleep(1)
    else:
        until(lambda: logged(workdir) >= 50, process)
    process.terminate()
    asked = time.monotonic()
    said = ends(process, 75)
    assert time.monotonic() - asked < 30
    reached = logged(workdir)
    assert f"step {reached} is saved" in said if reached else "nothing is lost" in said, said
    ends(start(workdir, *LONG))
    same(workdir, whole)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, environment):
    """40 steps of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    command = [
        sys.executable,
        "launch/local.py",
        "--processes=2",
        "--devices=1",
        "--",
        *SMALL,
        *LONG,
        FEW,
    ]
    subprocess.run(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    return workdir


@pytest.mark.slow
def test_fault_5_sigterm_to_one_of_two_processes(job, pair, tmp_path):
    process = job(tmp_path, FEW)
    until(lambda: finished(tmp_path, 10), process)
    os.kill(pid_of(f"--workdir={tmp_path}", "--process_id=1"), signal.SIGTERM)
    asked = time.monotonic()
    said = ends(process, 75)
    assert time.monotonic() - asked < 30
    for number in 0, 1:
        assert re.search(
            rf"error: process {number} of 2 .* asked to stop; step {logged(tmp_path)} is saved",
            said,
        )
    ends(job(tmp_path, FEW))
    assert lines(tmp_path) == lines(pair)
    assert state_digest(tmp_path, 40) == state_digest(pair, 40)


@pytest.mark.slow
def test_fault_3_one_of_two_processes_killed(job, pair, tmp_path):
    """Process 1, and process 0 of the run that goes on."""
    for killed, saved in (1, 10), (0, 20):
        process = job(tmp_path, FEW)
        until(functools.partial(finished, tmp_path, saved), process)
        os.kill(pid_of(f"--workdir={tmp_path}", f"--process_id={killed}"), signal.SIGKILL)
        began = time.monotonic()
        said = ends(process, 6)
        assert time.monotonic() - began < 20
        assert f"process {killed} was killed" in said and "peer lost" in said
        assert not pid_of(f"--workdir={tmp_path}"), "an orphan"
    assert "resuming from step" in ends(job(tmp_path, FEW))
    assert lines(tmp_path) == lines(pair)
    assert state_digest(tmp_path, 40) == state_digest(pair, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "killed", "left"),
    [
        pytest.param(2, 0, 1, id="one of two"),
        pytest.param(4, 2, 2, id="one of four"),
    ],
)
def test_fault_3_a_replica_of_workers_is_lost_and_fewer_go_on(
    job, start, tmp_path, processes, killed, left
):
    """A worker on each process, one of which is killed between two syncs: on the processes that are
    left each replica trains two workers, and all losses are those of a run that lost nothing.
    """
    workers = [
        "--config.train.stop_step=30",
        "--config.train.sync_every_steps=8",
        f"--config.train.workers={processes}",
    ]
    alone = tmp_path / "alone"
    ends(start(alone, *LONG, *workers))
    workdir = tmp_path / "run"
    process = job(workdir, *workers, f"--config.mesh.replica={processes}", processes=processes)
    until(lambda: finished(workdir, 10), process)
    os.kill(pid_of(f"--workdir={workdir}", f"--process_id={killed}"), signal.SIGKILL)
    assert "peer lost" in ends(process, 6)
    said = ends(job(workdir, *workers, f"--config.mesh.replica={left}", processes=left))
    saved = int(re.search(r"resuming from step (\d+)", said).group(1))
    assert 10 <= saved < 30 and saved % 8
    ours, theirs = lines(workdir), lines(alone)
    assert sorted(ours) == list(range(1, 31))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


def pid_of(*arguments):
    """Return a process of the training command that has these arguments, 0 where there is none."""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if "tinylm.main" in words and set(arguments) <= set(words):
                return int(path.parent.name)
    return 0


@pytest.mark.slow
def test_fault_10_files_may_not_grow(start, tmp_path):
    """No file over 40 kB: the metrics fit, a checkpoint doesn't. Then the limit goes, and so does
    the run.
    """
    ends(start(tmp_path / "first", "--config.train.stop_step=1"))  # prepares the data
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    said = ends(start(tmp_path / "run", preexec_fn=limit), 5)
    assert "could not be written" in said
    assert "the next save tries again" in said
    assert "Traceback" not in said
    assert sorted(lines(tmp_path / "run")) == list(range(1, 41))
    ends(start(tmp_path / "run"))
    assert finished(tmp_path / "run", 40)


def disk_of(tmp_path):
    """Mount a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    return disk


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_fault_10_a_disk_that_takes_no_more(start, tmp_path, how):
    """It says so, keeps what it can't write, and writes it when the disk takes it again."""
    disk = disk_of(tmp_path)
    try:
        ballast, folders = disk / "ballast", [disk / "run", disk / "run" / "checkpoints"]
        process = start(disk / "run", *LONG)
        until(lambda: finished(disk / "run", 10), process)
        if how == "read-only":
            subprocess.run(["chattr", "+i", *folders, disk / "run" / "metrics.jsonl"], check=True)
        else:
            with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        said = ""
        for line in process.stderr:
            said += line
            if "could not be written" in line:
                break
        subprocess.run(["chattr", "-i", *folders, disk / "run" / "metrics.jsonl"])
        ballast.unlink(missing_ok=True)
        said += ends(process)
        assert "the next save tries again" in said
        assert "Traceback" not in said
        assert sorted(lines(disk / "run")) == list(range(1, 201)), "no line of the metrics is lost"
        assert finished(disk / "run", 200)
    finally:
        subprocess.run(["umount", "-l", disk])


LIMITED = """
import resource, runpy, sys
from tinylm.run import checkpoint
checkpoint._COMMIT_SECS, hard, fail = 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1], checkpoint.Checkpoints._fail
def lifted(self, error):
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    fail(self, error)
if "--process_id=1" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    checkpoint.Checkpoints._fail = lifted
sys.argv[0] = "tinylm.main"
runpy.run_module("tinylm.main", run_name="__main__")
"""


@pytest.mark.slow
def test_fault_10_one_process_of_two_cannot_write(environment, start, tmp_path):
    """Its files may not grow until a save has failed; the other waits for it no longer than it
    must.
    """
    (tmp_path / "limited.py").write_text(LIMITED)
    command = [
        sys.executable,
        "launch/local.py",
        "--processes=2",
        "--devices=1",
        "--restarts=0",
        "--module=limited",
    ]
    flags = [*SMALL, *LONG, FEW, "--config.mesh.fsdp=true", f"--workdir={tmp_path}/run"]
    said = ends(
        start(
            None, command=[*command, "--", *flags], env={**environment, "PYTHONPATH": str(tmp_path)}
        )
    )
    assert re.search(
        "process 1 of 2 .*: a checkpoint could not be written to .*: File too large; the next save",
        said,
    )
    assert re.search(
        "process 0 of 2 .*: a checkpoint could not be written to .*; the next save tries again",
        said,
    )
    assert "Traceback" not in said
    assert finished(tmp_path / "run", 40)
    assert sorted(lines(tmp_path / "run")) == list(range(1, 41))


@pytest.mark.slow
def test_fault_11_another_number_of_processes(job, whole, tmp_path):
    """From 2 to 1 to 4 processes, a device each: the state that was saved, and the losses of one
    process.
    """
    for processes, stop in (2, 10), (1, 20), (4, 30):
        said = ends(job(tmp_path / "run", f"--config.train.stop_step={stop}", processes=processes))
        assert stop == 10 or f"resuming from step {stop - 10}" in said
    ours, theirs = lines(tmp_path / "run"), lines(whole)
    assert sorted(ours) == list(range(1, 31))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


@pytest.mark.slow
def test_fault_16_a_secret_of_the_environment_is_written_nowhere(whole, environment):
    for folder in whole, pathlib.Path(environment["XDG_CACHE_HOME"]):
        for path in folder.rglob("*"):
            assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in (whole.parent / "said").read_text()


@pytest.mark.slow
def test_fault_17_two_runs_in_one_workdir(start, tmp_path):
    first = start(tmp_path / "run", *LONG)
    until(lambda: logged(tmp_path / "run") >= 1, first)
    assert f"is in use by process {first.pid} on " in ends(start(tmp_path / "run", *LONG), 2)
    ends(first)


@pytest.mark.slow
def test_fault_18_pipes_home_and_package(start, environment, tmp_path):
    """stdout breaks, nobody reads stderr (a pipe that is full), no HOME, the package can't be
    written.
    """
    package = tmp_path / "package"
    for name in "tinylm", "configs":
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["chmod", "-R", "a-w", package])
    env = {name: value for name, value in environment.items() if name not in ("HOME", "PYTHONPATH")}
    process = start(
        tmp_path / "run",
        cwd=package,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
    )
    process.stdout.close()
    until(lambda: logged(tmp_path / "run") >= 1, process)
    process.stdout = None
    assert "Traceback" not in ends(process)
    assert sorted(lines(tmp_path / "run")) == list(range(1, 41))


@pytest.mark.slow
def test_fault_18_nobody_reads_what_is_said(environment, tmp_path):
    """The pipe of stderr is full from the start; training ends and all is written."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(1024))
    except BlockingIOError:
        os.set_blocking(writer, True)
    command = [sys.executable, "-m", "tinylm.main", *SMALL, f"--workdir={tmp_path}/run"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=writer
    )
    until(lambda: finished(tmp_path / "run", 40), process)
    process.kill()
    process.wait()
    os.close(reader)
    os.close(writer)


JUMPING = """
import runpy, sys, time
real, start = time.time, time.time()
time.time = lambda: real() + {0: 0.0, 1: 86400.0, 2: -86400.0}.get(int((real() - start) / 3), 172800.0)
sys.argv[0] = "tinylm.main"
runpy.run_module("tinylm.main", run_name="__main__")
"""


@pytest.mark.slow
def test_fault_18_the_clock_jumps_by_days(environment, whole, tmp_path):
    """Forth, back, and forth again; a save that is under way just then may be given up, the next is
    made.
    """
    command = [sys.executable, "-c", JUMPING, *SMALL, *LONG, f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    same(tmp_path / "run", whole)
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert line["split"] != "time" or all(
            value >= 0 for name, value in line.items() if name.endswith("_secs")
        )
