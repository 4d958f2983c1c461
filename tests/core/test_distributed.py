"""A launch that doesn't fit is refused on every host, in one line that says what to do, with exit
code 2.
"""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from helpers import ROOT

from tinylm.core import distributed
from tinylm.core.errors import UserError


class Pair:
    """Two processes of one job, or one that waits for the other."""

    def __init__(self, folder, secs=20):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.job = [
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--start_secs={secs}",
            "--cpu_devices=2",
        ]
        self.processes = []

    def start(self, process: int, *arguments: str, root=ROOT, command=("-m", "tinylm.main")):
        line = [sys.executable, *command, *self.job, f"--process_id={process}", *arguments]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
        process = subprocess.Popen(
            line, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.processes.append(process)

    def ends(self) -> list[tuple[int, str]]:
        """Return exit code and stderr of each."""
        try:
            errors = [process.communicate(timeout=100)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return list(zip([process.returncode for process in self.processes], errors, strict=True))

    def refused(self) -> list[str]:
        """Return what each wrote after checking that it is one line and that nothing was written."""
        ends = self.ends()
        assert [code for code, _ in ends] == [2] * len(ends), ends
        assert all(error.count("\n") == 1 for _, error in ends), ends
        assert not (self.folder / "run").exists()
        return [error for _, error in ends]


TALES = ["--config=tales", "--workdir=run"]


def test_another_config_on_one_host_is_refused_on_both(tmp_path):
    pair = Pair(tmp_path)
    pair.start(0, *TALES)
    pair.start(1, *TALES, "--config.optimizer.beta2=0.5", "--config.mesh.model=2")
    errors = pair.refused()
    for process, error in enumerate(errors):
        assert error.startswith(f"error: process {process} of 2 (host ")
        assert "process 1 on host" in error
        assert "config.mesh.model=2 instead of 1" in error
        assert "config.optimizer.beta2=0.5 instead of 0." in error
        assert "same command" in error


def test_another_code_version_on_one_host_is_refused_on_both(tmp_path):
    for folder in "tinylm", "configs":
        shutil.copytree(
            ROOT / folder, tmp_path / "other" / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (tmp_path / "other" / "tinylm" / "model" / "losses.py").open("a") as file:
        file.write("# a change that only one host has\n")
    pair = Pair(tmp_path)
    pair.start(0, *TALES)
    pair.start(1, *TALES, root=tmp_path / "other")
    assert all("tinylm code=" in error for error in pair.refused())


@pytest.mark.parametrize(
    ("alone", "wanted"), [(0, "not all 2 processes came"), (1, "is process 0 running there?")]
)
def test_one_host_alone_gives_up_in_time(tmp_path, alone, wanted):
    pair = Pair(tmp_path, secs=1)
    pair.start(alone, *TALES)
    assert wanted in pair.refused()[0]


@pytest.mark.parametrize(
    ("alone", "wanted"),
    [
        (0, "not all 2 processes that JAX_COORDINATOR_ADDRESS names came"),
        (1, r"nobody at 127.0.0.1:\d+ \(from JAX_COORDINATOR_ADDRESS\) for 1 s"),
    ],
)
def test_one_host_of_a_cluster_alone_gives_up_in_time(tmp_path, monkeypatch, alone, wanted):
    pair = Pair(tmp_path, secs=1)
    address = pair.job[0].partition("=")[2]
    pair.job = pair.job[2:]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(alone))
    pair.processes.append(
        subprocess.Popen(
            [sys.executable, "-m", "tinylm.main", *pair.job, *TALES],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    (error,) = pair.refused()
    assert re.search(wanted, error)


def test_a_mesh_that_is_smaller_than_the_job_is_refused_on_both(tmp_path):
    pair = Pair(tmp_path)
    for process in 0, 1:
        pair.start(process, *TALES, "--config.mesh.data=2")
    assert all("smaller than the 4 devices" in error for error in pair.refused())


@pytest.mark.parametrize(
    "job",
    [
        ("127.0.0.1:1", 2, 2),
        ("127.0.0.1:1", 0, -1),
        ("", 2, 1),
        ("", 0, 0),
        ("nonsense", 2, 0),
        (":1", 2, 0),
        ("a:b", 2, 0),
    ],
)
def test_a_job_that_is_not_whole_is_refused(job):
    with pytest.raises(
        UserError, match=r"found --coordinator={} --num_processes={} --process_id={}\.".format(*job)
    ):
        distributed.start(coordinator=job[0], num_processes=job[1], process_id=job[2])


def test_a_coordinators_port_that_another_program_has_is_named():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as JAX's server does
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--coordinator=localhost:{port}: port {port} of .* another port"
        ):
            distributed.start(coordinator=f"localhost:{port}", num_processes=2, process_id=0)


def test_a_tool_in_a_shell_of_a_cluster_runs_alone_and_a_training_says_so(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    for joins_cluster in True, False:
        distributed.start(joins_cluster=joins_cluster)
    assert distributed.is_shell_of_slurm()
    with pytest.raises(UserError, match="--coordinator=auto finds no job"):
        distributed.start(coordinator="auto")
    # Under srun, a training joins (and waits for its peers), a tool doesn't.
    for name, value in (("STEP_NUM_TASKS", "4"), ("PROCID", "1"), ("STEP_NODELIST", "n[0-3]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert not distributed.is_shell_of_slurm()
    joined = []
    monkeypatch.setattr(distributed, "_take_place", lambda job: None)
    monkeypatch.setattr(distributed, "_call_the_roll", lambda job, secs: None)
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda **kwargs: joined.append(kwargs)
    )
    distributed.start(joins_cluster=False)
    assert joined == []
    distributed.start(joins_cluster=True)
    distributed.start(coordinator="auto", joins_cluster=False)
    # The flag names the host, and Slurm which of the processes this is.
    distributed.start(coordinator="n9:1234", joins_cluster=False)
    assert [job["process_id"] for job in joined] == [1, 1, 1]
    assert joined[0]["coordinator_address"].startswith("n0:")
    assert joined[2]["coordinator_address"] == "n9:1234"
    assert all(job["num_processes"] == 4 for job in joined)
    # JAX by itself would show a process of Slurm the first GPU of its host alone.
    assert all(job["cluster_detection_method"] == "deactivate" for job in joined)
    assert all(job["local_device_ids"] is None for job in joined)


def test_an_error_on_one_process_ends_both_and_has_its_number(tmp_path):
    (tmp_path / "player.py").write_text(
        "import sys\n"
        "from tinylm import cli\n"
        "from tinylm.core import agreement, distributed\n"
        "def main(flags):\n"
        "    if not distributed.is_main():\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    agreement.barrier('a point that only one comes to', 5)\n"
        "sys.exit(cli.run(cli.Command(__doc__, main)))\n"
    )
    pair = Pair(tmp_path)
    for process in 0, 1:
        pair.start(process, command=(str(tmp_path / "player.py"),))
    (first, first_error), (second, second_error) = pair.ends()
    assert first in (4, -6)  # JAX may abort it before it has waited for long enough
    assert second == 1
    assert "process 1 of 2 (host" in second_error
    assert "ZeroDivisionError: a bug" in second_error
    if first == 4:
        assert "not all processes came to 'a point that only one comes to'" in first_error
