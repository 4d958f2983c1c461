"""Faults from outside, on whole runs: kills, stops, limits, pipes. `python tests/faults.py` runs the full matrix."""

import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, SMALL, finished, lines, state_digest

LONG = ["--config.train.num_steps=200", "--config.checkpoint.every_steps=5", "--config.eval.every_steps=50",
        "--config.train.steps_per_dispatch=2", "--config.sample.max_tokens=0"]  # fmt: skip
CANARY = "canary-5f2d9c"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A private cache, so that only the first run of all compiles; and a secret that must show up nowhere."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), "SECRET_TOKEN": CANARY}


@pytest.fixture
def start(environment):
    """A function that starts the training command; what still runs at the end is killed."""
    started = []

    def begin(workdir, *extra, env=None, **kwargs):
        command = [sys.executable, "-m", "tinylm.main", *SMALL, f"--workdir={workdir}", *extra]
        options = {"cwd": ROOT, "env": env or environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
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
    return max(lines(workdir), default=0) if (pathlib.Path(workdir) / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """200 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "tinylm.main", *SMALL, *LONG, f"--workdir={workdir}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return workdir


def same(workdir, whole):
    assert lines(workdir) == lines(whole)
    assert lines(workdir, "valid") == lines(whole, "valid")
    assert state_digest(workdir, 200) == state_digest(whole, 200)


@pytest.mark.slow
def test_fault_1_nothing_twice_on_four_devices(start, tmp_path):
    for name in "one", "two":
        ends(start(tmp_path / name, "--cpu_devices=4", "--config.mesh.fsdp=true", "--config.train.stop_step=20"))
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert state_digest(tmp_path / "one", 20) == state_digest(tmp_path / "two", 20)


@pytest.mark.slow
def test_fault_2_killed_at_20_random_steps(start, whole, tmp_path):
    rng, workdir = random.Random(0), tmp_path / "run"
    for at in sorted(rng.sample(range(1, 190), 20)):
        process = start(workdir, *LONG)
        until(lambda at=at: logged(workdir) >= at, process)
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
        until(lambda n=number: [p for p in folder.glob("*.unfinished") if int(p.stem) >= 15 * (n + 1)], process)
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


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_fault_3_one_of_two_processes_killed(environment, tmp_path, killed):
    flags = [*SMALL, *LONG, "--config.train.stop_step=40"]

    def job(workdir, restarts):
        command = [sys.executable, "launch/local.py", "--processes=2", "--devices=1", f"--restarts={restarts}", "--"]
        return subprocess.Popen([*command, *flags, f"--workdir={workdir}"], cwd=ROOT, env=environment, text=True,
                                stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    ends(job(tmp_path / "whole", 0))
    process = job(tmp_path / "run", 0)
    until(lambda: finished(tmp_path / "run", 10), process)
    os.kill(pid_of(f"--workdir={tmp_path}/run", f"--process_id={killed}"), signal.SIGKILL)
    began = time.monotonic()
    said = ends(process, 6)
    assert time.monotonic() - began < 20
    assert "peer lost" in said or f"process {killed} was killed" in said
    assert "resuming from step" in ends(job(tmp_path / "run", 0))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert state_digest(tmp_path / "run", 40) == state_digest(tmp_path / "whole", 40)


def pid_of(*arguments):
    """Return the process of the training command that has these arguments."""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if "tinylm.main" in words and set(arguments) <= set(words):
            return int(path.parent.name)
    raise AssertionError(f"no process with {arguments}")


@pytest.mark.slow
def test_fault_10_files_may_not_grow(start, tmp_path):
    """No file over 40 kB: the metrics fit, a checkpoint doesn't. Then the limit goes, and so does the run."""
    ends(start(tmp_path / "first", "--config.train.stop_step=1"))  # prepares the data
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    said = ends(start(tmp_path / "run", preexec_fn=limit), 5)
    assert "could not be written" in said
    assert "the next save tries again" in said
    assert "Traceback" not in said
    assert sorted(lines(tmp_path / "run")) == list(range(1, 41))
    ends(start(tmp_path / "run"))
    assert finished(tmp_path / "run", 40)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_fault_10_a_full_disk(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        ballast = disk / "ballast"
        process = start(disk / "run", *LONG)
        until(lambda: finished(disk / "run", 10), process)
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        said = ""
        for line in process.stderr:
            said += line
            if "could not be written" in line or "cannot be written" in line:
                break
        ballast.unlink()
        ends(process)
        assert "warning: " in said
        assert sorted(lines(disk / "run")) == list(range(1, 201)), "no line of the metrics is lost"
        assert finished(disk / "run", 200)
    finally:
        subprocess.run(["umount", "-l", disk])


@pytest.mark.slow
def test_fault_17_two_runs_in_one_workdir(start, tmp_path):
    first = start(tmp_path / "run", *LONG)
    until(lambda: logged(tmp_path / "run") >= 1, first)
    assert f"is in use by process {first.pid} on " in ends(start(tmp_path / "run", *LONG), 2)
    ends(first)


@pytest.mark.slow
def test_fault_18_pipes_home_package_and_secrets(start, environment, tmp_path):
    """stdout breaks, nobody reads stderr (a pipe that is full), no HOME, the package can't be written."""
    package = tmp_path / "package"
    for name in "tinylm", "configs":
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["chmod", "-R", "a-w", package])
    env = {name: value for name, value in environment.items() if name not in ("HOME", "PYTHONPATH")}
    process = start(
        tmp_path / "run", cwd=package, env={**env, "PYTHONDONTWRITEBYTECODE": "1"}, stdin=subprocess.DEVNULL
    )
    process.stdout.close()
    until(lambda: logged(tmp_path / "run") >= 1, process)
    process.stdout = None
    assert "Traceback" not in ends(process)
    assert sorted(lines(tmp_path / "run")) == list(range(1, 41))
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


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
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=writer)
    until(lambda: finished(tmp_path / "run", 40), process)
    process.kill()
    process.wait()
    os.close(reader)
    os.close(writer)
