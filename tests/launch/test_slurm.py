"""The Slurm launcher on real daemons: two nodes on this machine, one of them killed, the job
requeued and resumed.

Needs root and Debian's slurm-wlm and munge; adds the names n0 and n1 to /etc/hosts, for JAX looks
the first node up.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, lines, until

MISSING = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt install slurm-wlm munge)"
    ),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="Slurm's daemons need root"
    ),
]
CONF = """ClusterName=test
SlurmctldHost={host}
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=20
ReturnToService=2
KillWait=5
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=1000
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def call(*command, **kwargs):
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Start munge, the controller and two nodes; stop what was started."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    hosts = pathlib.Path("/etc/hosts")
    if " n0 n1" not in hosts.read_text(encoding="utf-8"):
        with hosts.open("a", encoding="utf-8") as file:
            file.write("127.0.0.1 n0 n1\n")
    for folder in "state", "n0", "n1":
        (tmp_path / folder).mkdir()
    (tmp_path / "slurm.conf").write_text(
        CONF.format(host=socket.gethostname().split(".")[0], folder=tmp_path)
    )
    pathlib.Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode:
        call("su", "-s", "/bin/sh", "munge", "-c", "munged")
    call("slurmctld")
    for node in "n0", "n1":
        call("slurmd", "-N", node)
    until(lambda: call("sinfo", "--noheader", "--format=%T").strip() == "idle", 30)
    yield tmp_path
    for path in pathlib.Path("/proc").glob(
        "[0-9]*"
    ):  # daemons and tasks alike, or they hold the ports of the next
        if f"SLURM_CONF={tmp_path}/".encode() in readable(path / "environ"):
            os.kill(int(path.name), signal.SIGKILL)


def kill_node(folder):
    """End everything of node n1 without warning."""
    tasks = [
        int(path.name)
        for path in pathlib.Path("/proc").glob("[0-9]*")
        if b"SLURM_PROCID=1\0" in readable(path / "environ")
        and b"tinylm.main" in readable(path / "cmdline")
    ]
    for pid in [int((folder / "n1.pid").read_text()), *tasks]:
        os.kill(pid, signal.SIGKILL)


def readable(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_killed_node_is_requeued_and_the_run_goes_on(cluster):
    run, log = cluster / "run", cluster / "log"
    environment = {
        **os.environ,
        "TINYLM_PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    call(
        "sbatch",
        "--nodes=2",
        f"--output={log}",
        str(ROOT / "launch" / "slurm.sbatch"),
        *SMALL,
        "--cpu_devices=2",
        "--config.model.num_layers=1",
        "--config.train.num_steps=4000",
        "--config.eval.every_steps=0",
        f"--workdir={run}",
        env=environment,
        cwd=cluster,
    )
    until(lambda: (run / "checkpoints" / "20" / "checksums").exists())
    kill_node(cluster)
    state = lambda: call("squeue", "--noheader", "--format=%T").strip()  # noqa: E731
    until(lambda: state() == "PENDING")
    call("slurmd", "-N", "n1")
    call("scontrol", "update", "jobid=1", "StartTime=now")
    until(lambda: "resuming from step" in log.read_text())
    reached = max(lines(run))
    until(lambda: max(lines(run)) > reached + 10)
    call("scancel", "--signal=TERM", "--batch", "1")
    until(lambda: "exit code 75 after SIGTERM: requeued" in log.read_text())
    assert sorted(lines(run)) == list(range(1, max(lines(run)) + 1))
