"""Hosts that share nothing but a network and a bucket: a pod in a box (see pod.py), and what a job
on it must withstand.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pod
import pytest
from helpers import ROOT, SMALL, finished, lines, run_command, state_digest
from pod import BUCKET, Proxy, ends, make_pod, output, serve_s3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(pod.MISSING), reason=pod.MISSING),
    # Name spaces and their network are made once at a time.
    pytest.mark.xdist_group("pod"),
]

# How late a host comes, and how many there are where there are many. benchmarks/pod.py sets more.
LATE_SECS = float(os.environ.get("TINYLM_POD_LATE_SECS", "10"))
MANY = int(os.environ.get("TINYLM_POD_HOSTS", "32"))
# Two dispatches of four steps between saves, so that a kill falls between them.
RUN = [*SMALL, "--config.train.num_steps=20", "--config.checkpoint.every_steps=5"]
WORKDIR = f"gs://{BUCKET}/run"
RESUMABLE = {4, 6, 75, 134, -6, 137, -9}


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """A pod of two hosts."""
    with make_pod(tmp_path_factory.mktemp("pod") / "pod", 2) as made:
        yield made


@pytest.fixture(scope="module")
def four_hosts(tmp_path_factory):
    """A pod of four hosts."""
    with make_pod(tmp_path_factory.mktemp("pod") / "pod", 4) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(four_hosts):
    """The folder of a run that four hosts of two devices finished from empty caches."""
    done = ends(four_hosts.train(*RUN, f"--workdir={WORKDIR}"))
    assert [code for code, _ in done] == [0] * 4, done
    return four_hosts.store / BUCKET / "run"


@pytest.mark.pod
def test_a_job_on_hosts_that_share_nothing_trains_as_one_process_does(undisturbed, tmp_path):
    run = run_command(
        "tinylm.main",
        *RUN,
        "--cpu_devices=8",
        f"--workdir={tmp_path}/run",
        env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert run.returncode == 0, run.stderr
    here = lines(tmp_path / "run")
    there = lines(undisturbed)
    assert sorted(there) == sorted(here) == list(range(1, 21))
    assert np.allclose([here[step] for step in here], [there[step] for step in here], rtol=1e-5)
    for name in "config.json", "tokenizer", "samples.txt", "loss.png", "checkpoints/20":
        assert (undisturbed / name).exists()


def test_the_axes_of_the_mesh_may_span_hosts(four_hosts, undisturbed):
    """Four devices hold a layer together, of two hosts, and parameters are split over the rest."""
    mesh = ["--config.mesh.model=4", "--config.mesh.fsdp=True"]
    done = ends(four_hosts.train(*RUN, *mesh, f"--workdir=gs://{BUCKET}/spanning"))
    assert [code for code, _ in done] == [0] * 4, done
    theirs = lines(undisturbed)
    ours = lines(four_hosts.store / BUCKET / "spanning")
    assert np.allclose(
        [ours[step] for step in theirs], [theirs[step] for step in theirs], rtol=1e-5
    )


@pytest.mark.pod
@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_is_killed_and_comes_back_empty_changes_nothing(
    four_hosts, undisturbed, victim
):
    name = f"killed{victim}"
    folder = four_hosts.store / BUCKET / name
    command = [*RUN, f"--workdir=gs://{BUCKET}/{name}"]
    processes = four_hosts.train(*command)
    _until(lambda: finished(folder, 5), processes)
    os.killpg(processes[victim].pid, signal.SIGKILL)
    done = ends(processes, 100)
    del done[victim]
    assert all(code in RESUMABLE for code, _ in done), done
    four_hosts.hosts[victim].crash()
    four_hosts.hosts[victim].boot()
    done = ends(four_hosts.train(*command))
    assert [code for code, _ in done] == [0] * 4, done
    assert "resuming from step" in done[0][1]
    assert lines(folder) == lines(undisturbed)
    assert state_digest(folder, 20) == state_digest(undisturbed, 20)


@pytest.fixture
def s3(two_hosts):
    """The files of an empty bucket in S3, and the variables by which the two hosts reach it."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    server, port = serve_s3()
    proxy = Proxy(f"{two_hosts.network}.1", 4444, port)
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    files = s3fs.S3FileSystem(
        endpoint_url=f"http://127.0.0.1:{port}",
        key="key",
        secret="secret",
        use_listings_cache=False,
    )
    files.mkdir(BUCKET)
    yield files, {"AWS_ENDPOINT_URL": proxy.url, **keys}
    proxy.close()
    server.kill()
    server.wait()


def test_hosts_share_a_run_in_s3_as_one_in_gs(two_hosts, s3, tmp_path):
    """In S3 one of them is killed, too, and comes back empty."""
    files, variables = s3
    in_gs = ends(two_hosts.train(*RUN, f"--workdir=gs://{BUCKET}/same"))
    assert [code for code, _ in in_gs] == [0, 0], in_gs

    command = [*RUN, f"--workdir=s3://{BUCKET}/run"]
    processes = two_hosts.train(*command, **variables)

    def has_saved() -> bool:
        names = files.find(f"{BUCKET}/run/checkpoints")
        names = [name.removeprefix(f"{BUCKET}/run/checkpoints/") for name in names]
        return "5/checksums" in names and "5.unfinished" not in names

    _until(has_saved, processes)
    os.killpg(processes[1].pid, signal.SIGKILL)
    ends(processes, 100)
    two_hosts.hosts[1].crash()
    two_hosts.hosts[1].boot()
    in_s3 = ends(two_hosts.train(*command, **variables))
    assert [code for code, _ in in_s3] == [0, 0], in_s3
    assert "resuming from step" in in_s3[0][1]
    files.get_file(f"{BUCKET}/run/metrics.jsonl", f"{tmp_path}/metrics.jsonl")
    assert lines(tmp_path) == lines(two_hosts.store / BUCKET / "same")


def _until(is_so, processes: list[subprocess.Popen], secs: float = 200) -> None:
    """Wait for something while processes run."""
    deadline = time.monotonic() + secs
    while not is_so():
        assert time.monotonic() < deadline, [output(process) for process in processes]
        assert all(process.poll() is None for process in processes), [
            output(process) for process in processes
        ]
        time.sleep(0.05)


def trains(processes: list[subprocess.Popen]) -> bool:
    """Say whether a job has logged some ten steps."""
    return re.search(r"^step \d\d+/", output(processes[0]), re.MULTILINE) is not None


TEXT = "The cat sat on the mat. A dog ran by.\n" * 400


def write_texts(made: pod.Pod, *texts: str) -> None:
    """Give each host a file text.txt in its working folder."""
    for host, text in zip(made.hosts, texts, strict=True):
        host.path("text.txt").write_text(text)


def refused(made: pod.Pod, processes: list[subprocess.Popen], secs: float = 60) -> list[str]:
    """Return the one line with which all ended within `secs`, exit code 2."""
    started = time.monotonic()
    done = ends(processes, secs)
    assert [code for code, _ in done] == [2] * len(done), done
    assert time.monotonic() - started < secs
    found = [[line for line in text.splitlines() if "error:" in line] for _, text in done]
    assert all(len(errors) == 1 for errors in found), done
    return [errors[0] for errors in found]


OWN_TEXT = [*RUN, "--config.data.source=text:text.txt"]


@pytest.mark.pod
def test_a_host_with_another_text_is_named_on_all(two_hosts):
    write_texts(two_hosts, TEXT, TEXT.replace("cat", "cow"))
    errors = refused(two_hosts, two_hosts.train(*OWN_TEXT, f"--workdir=gs://{BUCKET}/texts"))
    for error in errors:
        assert "process 1 on host host1 has other data than process 0 on host host0" in error
        assert "text:text.txt" in error
    assert not (two_hosts.store / BUCKET / "texts" / "config.json").exists()


@pytest.mark.pod
def test_a_host_without_the_text_is_named_on_all(two_hosts):
    write_texts(two_hosts, TEXT, TEXT)
    two_hosts.hosts[1].path("text.txt").unlink()
    errors = refused(two_hosts, two_hosts.train(*OWN_TEXT, f"--workdir=gs://{BUCKET}/texts"))
    for error in errors:
        assert "process 1 of 2 (host host1): " in error
        assert "text.txt" in error


@pytest.mark.pod
def test_a_workdir_that_only_one_host_sees_is_refused(two_hosts):
    for error in refused(two_hosts, two_hosts.train(*RUN, "--workdir=run")):
        assert "--workdir=" in error and "on host host1 is not the folder that process 0" in error
    assert not any(host.path("run").exists() for host in two_hosts.hosts[1:])


def test_hosts_that_share_a_disk_prepare_once(two_hosts, tmp_path):
    """Their caches are private; a folder outside of those is seen by both."""
    write_texts(two_hosts, TEXT, TEXT)
    shared = tmp_path / "shared"
    shared.mkdir()
    done = ends(
        two_hosts.train(
            *OWN_TEXT,
            f"--config.data.store_dir={shared}",
            f"--workdir=gs://{BUCKET}/shared",
            "--config.train.stop_step=4",
        )
    )
    assert [code for code, _ in done] == [0, 0], done
    manifests = list(shared.glob("*/manifest.json"))
    assert len(manifests) == 1
    assert not list(shared.glob(".job-*"))


CLOCK = """
import runpy, sys, time
ahead = 3600.0
for name in "time", "time_ns":
    real = getattr(time, name)
    shift = ahead * (1e9 if name == "time_ns" else 1)
    setattr(time, name, lambda real=real, shift=shift: real() + type(real())(shift))
sys.argv[0] = "tinylm.main"
runpy.run_module("tinylm.main", run_name="__main__")
"""


@pytest.mark.pod
def test_a_clock_that_is_an_hour_off_does_not_matter(two_hosts):
    first, second = two_hosts.hosts
    job = [f"--coordinator={first.address}:5999", "--num_processes=2", "--cpu_devices=2"]
    command = [*RUN, f"--workdir=gs://{BUCKET}/clock", "--config.train.stop_step=4"]
    processes = [
        first.python("-m", "tinylm.main", *job, "--process_id=0", *command),
        second.python("-c", CLOCK, *job, "--process_id=1", *command),
    ]
    done = ends(processes)
    assert [code for code, _ in done] == [0, 0], done


@pytest.mark.pod
def test_another_version_of_the_code_is_named_on_all(two_hosts, tmp_path):
    for folder in "tinylm", "configs":
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (tmp_path / "tinylm" / "model" / "losses.py").open("a") as file:
        file.write("# a change that only one host has\n")
    first, second = two_hosts.hosts
    job = [f"--coordinator={first.address}:5998", "--num_processes=2", "--cpu_devices=2"]
    command = ["-m", "tinylm.main", *job, *RUN, f"--workdir=gs://{BUCKET}/versions"]
    processes = [
        first.python(*command, "--process_id=0"),
        second.python(*command, "--process_id=1", PYTHONPATH=str(tmp_path)),
    ]
    for error in refused(two_hosts, processes):
        assert "process 1 on host host1" in error and "tinylm code=" in error


def test_a_host_that_comes_late_is_waited_for_and_one_that_comes_twice_is_refused(four_hosts):
    first, second, third, _ = four_hosts.hosts
    job = [f"--coordinator={first.address}:5997", "--num_processes=2", "--cpu_devices=2"]
    run = [*RUN, f"--workdir=gs://{BUCKET}/late", "--config.train.stop_step=12"]
    command = ["-m", "tinylm.main", *job, *run]
    # As the launchers do, whose hosts may be minutes apart.
    patient = [*command, "--start_secs=600"]
    processes = [first.python(*patient, "--process_id=0")]
    time.sleep(LATE_SECS)
    processes.append(second.python(*patient, "--process_id=1"))
    _until(lambda: "model  " in output(processes[0]), processes)
    again = second.python(*command, "--process_id=1")
    (error,) = refused(four_hosts, [again])
    assert "process 1 of 2 runs on host host1 already" in error
    # From another host, which can't see the first one's lock.
    elsewhere = third.python(*command, "--process_id=1", "--start_secs=3")
    (error,) = refused(four_hosts, [elsewhere])
    assert "process 1 of 2 on host host2 found another job" in error
    done = ends(processes)
    assert [code for code, _ in done] == [0, 0], done


def test_two_hosts_with_the_same_number_are_named_on_all(four_hosts):
    first, second, third, _ = four_hosts.hosts
    job = [f"--coordinator={first.address}:5995", "--num_processes=3", "--cpu_devices=2"]
    command = ["-m", "tinylm.main", *job, *RUN, f"--workdir=gs://{BUCKET}/twice"]
    processes = [
        first.python(*command, "--process_id=0"),
        second.python(*command, "--process_id=1"),
        third.python(*command, "--process_id=1"),
    ]
    errors = refused(four_hosts, processes)
    assert len(set(errors)) == 1 and "process 1 came twice, from host host" in errors[0]


def test_a_host_that_never_comes_is_one_line(two_hosts):
    first, _ = two_hosts.hosts
    alone = first.python(
        "-m",
        "tinylm.main",
        f"--coordinator={first.address}:5996",
        "--num_processes=2",
        "--process_id=0",
        "--start_secs=5",
        *RUN,
        f"--workdir=gs://{BUCKET}/alone",
    )
    (error,) = refused(two_hosts, [alone])
    assert "waited 5 s, but not all 2 processes came" in error


STEP_OF_50_MS = [
    *RUN,
    "--config.model.embed_dim=64",
    "--config.data.seq_len=64",
    "--config.data.batch_size=32",
    "--config.data.packing=stream",
    "--config.train.num_steps=240",
    "--config.train.steps_per_dispatch=1",
    "--config.eval.every_steps=0",
    "--config.sample.every_steps=0",
    "--config.checkpoint.every_steps=80",
]
LONG_TEXT = "".join(f"Line {number}: {number * number} sheep sleep.\n" for number in range(400_000))


def rss_bytes(process: subprocess.Popen) -> int:
    """Return the memory of the Python that a host's process became."""
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def wait_and_step_secs(metrics: pathlib.Path) -> tuple[float, float]:
    """Return how long a step waited for its data, and how long it took, from the first save on."""
    accounts = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] == "time":
            accounts.append(record)
    first, last = accounts[0], accounts[-1]
    steps = last["step"] - first["step"]
    waited = last["data_secs"] - first["data_secs"]
    trained = last["train_secs"] - first["train_secs"]
    return waited / steps, (waited + trained) / steps


def test_rows_of_a_store_larger_than_the_cache_are_there_before_they_are_needed(two_hosts):
    """With 30 ms of latency before the store, less than 1% of the time of a step is lost against
    reading from the disk, and neither the disk nor the memory grows.
    """
    write_texts(two_hosts, 5 * LONG_TEXT, 5 * LONG_TEXT)
    bucket = two_hosts.store / BUCKET
    command = [*STEP_OF_50_MS, "--config.data.source=text:text.txt"]
    # Compiled as for a user, not as for tests.
    local = two_hosts.train(*command, f"--workdir=gs://{BUCKET}/local", XLA_FLAGS="")
    assert [code for code, _ in ends(local)] == [0, 0]

    for host in two_hosts.hosts:
        shutil.rmtree(host.path("home/cache/tinylm/stores"))
    cache_bytes = 16 << 20
    remote = [
        f"--config.data.store_dir=gs://{BUCKET}/large-stores",
        f"--config.data.cache_bytes={cache_bytes}",
        f"--workdir=gs://{BUCKET}/large",
    ]
    proxy = two_hosts.proxy
    proxy.latency_secs = 0.03
    used: list[int] = []
    memory: list[int] = []
    requests = sent_bytes = 0
    try:
        processes = two_hosts.train(*command, *remote, XLA_FLAGS="")
        while all(process.poll() is None for process in processes):
            if re.search(r"step 1\d\d/", output(processes[0])):
                if not used:
                    requests, sent_bytes = proxy.requests, proxy.sent_bytes
                used.append(shutil.disk_usage(two_hosts.hosts[1].path(".")).used)
                memory.append(rss_bytes(processes[1]))
            time.sleep(0.5)
        done = ends(processes)
    finally:
        proxy.latency_secs = 0.0
    assert [code for code, _ in done] == [0, 0], done
    assert lines(bucket / "large") == lines(bucket / "local")
    (tokens,) = bucket.glob("large-stores/*/tokens-00000.bin")
    assert tokens.stat().st_size > 2 * cache_bytes

    local_wait, _ = wait_and_step_secs(bucket / "local" / "metrics.jsonl")
    wait, step = wait_and_step_secs(bucket / "large" / "metrics.jsonl")
    memory = [size for size in memory if size]
    print(
        f"steps of {1e3 * step:.0f} ms, of which they load data for {1e3 * wait:.2f} ms, from the "
        f"disk {1e3 * local_wait:.2f} ms; disk {min(used) / 1e6:.1f} to {max(used) / 1e6:.1f} MB, "
        f"memory {min(memory) / 1e6:.0f} to {max(memory) / 1e6:.0f} MB; in some 140 steps of two "
        f"hosts {proxy.requests - requests} requests and {(proxy.sent_bytes - sent_bytes) / 1e6:.0f} MB"
    )
    assert wait - local_wait < 0.01 * step
    text_bytes = 5 * len(LONG_TEXT)
    assert max(used) < text_bytes + cache_bytes + (2 << 20)
    assert max(memory) - min(memory) < 100 << 20


def test_a_run_goes_on_after_its_data_were_out_of_reach(two_hosts):
    write_texts(two_hosts, LONG_TEXT[:400_000], "")
    command = [
        *RUN,
        "--config.data.source=text:text.txt",
        f"--config.data.store_dir=gs://{BUCKET}/stores-out",
        "--config.data.cache_bytes=70000",
        "--config.train.num_steps=400",
        "--config.train.steps_per_dispatch=1",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=200",
        "--config.train.hang_secs=20",
    ]
    quiet = two_hosts.train(*command, f"--workdir=gs://{BUCKET}/quiet")
    assert [code for code, _ in ends(quiet)] == [0, 0]
    processes = two_hosts.train(*command, f"--workdir=gs://{BUCKET}/out")
    _until(lambda: trains(processes), processes)
    two_hosts.proxy.status = 503
    time.sleep(40)
    two_hosts.proxy.status = 0
    done = ends(processes)
    assert [code for code, _ in done] == [0, 0], done
    assert "cannot be reached" in done[0][1] and "answers again, after" in done[0][1]
    bucket = two_hosts.store / BUCKET
    assert lines(bucket / "out") == lines(bucket / "quiet")


def test_a_run_loses_nothing_while_its_bucket_fails_in_three_ways(two_hosts):
    """Unavailable for a minute, then too busy, then slow; two saves and many lines fall into it."""
    command = [
        *RUN,
        "--config.train.num_steps=600",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=100",
    ]
    quiet = two_hosts.train(*command, f"--workdir=gs://{BUCKET}/steady")
    assert [code for code, _ in ends(quiet)] == [0, 0]
    processes = two_hosts.train(*command, f"--workdir=gs://{BUCKET}/shaken")
    _until(lambda: trains(processes), processes)
    for fault, value, secs in [
        ("status", 503, 60),
        ("status", 429, 20),
        ("bytes_per_sec", 1000, 20),
    ]:
        setattr(two_hosts.proxy, fault, value)
        time.sleep(secs)
        setattr(two_hosts.proxy, fault, 0)
    done = ends(processes)
    assert [code for code, _ in done] == [0, 0], done
    bucket = two_hosts.store / BUCKET
    assert lines(bucket / "shaken") == lines(bucket / "steady")
    assert sorted(lines(bucket / "shaken")) == list(range(1, 601))
    assert state_digest(bucket / "shaken", 600) == state_digest(bucket / "steady", 600)


def test_a_bucket_that_fails_for_good_ends_the_run_with_one_line_and_the_same_command_goes_on(
    two_hosts,
):
    command = [
        *RUN,
        "--config.train.num_steps=300",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=100",
        "--config.checkpoint.outage_secs=10",
        f"--workdir=gs://{BUCKET}/gone",
    ]
    processes = two_hosts.train(*command)
    _until(lambda: finished(two_hosts.store / BUCKET / "gone", 100), processes)
    two_hosts.proxy.status = 503
    try:
        done = ends(processes)
    finally:
        two_hosts.proxy.status = 0
    for code, text in done:
        errors = [line for line in text.splitlines() if "error:" in line]
        assert code == 5 and len(errors) == 1, text
        assert f"gs://{BUCKET}/gone" in errors[0] and "503" in errors[0]
    done = ends(two_hosts.train(*command))
    assert [code for code, _ in done] == [0, 0], done
    assert "resuming from step" in done[0][1]
    assert sorted(lines(two_hosts.store / BUCKET / "gone")) == list(range(1, 301))


def test_a_network_that_is_cut_for_five_seconds_is_survived(two_hosts):
    command = [*RUN, "--config.train.num_steps=400", f"--workdir=gs://{BUCKET}/cut5"]
    processes = two_hosts.train(*command)
    _until(lambda: trains(processes), processes)
    two_hosts.hosts[1].cut()
    time.sleep(5)
    two_hosts.hosts[1].mend()
    done = ends(processes)
    assert [code for code, _ in done] == [0, 0], done


def test_a_network_that_is_cut_for_good_ends_every_host_with_the_name_of_the_lost_one(two_hosts):
    command = [*RUN, "--config.train.num_steps=4000", f"--workdir=gs://{BUCKET}/cut"]
    processes = two_hosts.train(*command)
    try:
        _until(lambda: trains(processes), processes)
        two_hosts.hosts[1].cut()
        started = time.monotonic()
        done = ends(processes, 120)
        assert time.monotonic() - started < 60
    finally:
        two_hosts.hosts[1].mend()
    assert [code in RESUMABLE for code, _ in done] == [True, True], done
    assert "process 1 (host host1)" in done[0][1], done[0][1][-2000:]
    assert "process 0" in done[1][1], done[1][1][-2000:]


def test_a_run_goes_on_with_another_number_of_hosts(tmp_path):
    """2, 1, 8 and 2 hosts in turn, with 4, 4, 8 and 4 devices."""
    with make_pod(tmp_path / "pod", 8) as made:
        command = [*RUN, f"--workdir=gs://{BUCKET}/run"]
        whole = ends(made.train(*RUN, f"--workdir=gs://{BUCKET}/whole", hosts=[0, 1]))
        assert [code for code, _ in whole] == [0, 0], whole
        turns = [([2, 3], 2, 5), ([4], 4, 10), (list(range(8)), 1, 15), ([5, 6], 2, 20)]
        for hosts, devices, stop in turns:
            stopping = f"--config.train.stop_step={stop}"
            done = ends(made.train(*command, stopping, hosts=hosts, devices=devices), 400)
            assert [code for code, _ in done] == [0] * len(hosts), done
        whole_losses = lines(made.store / BUCKET / "whole")
        losses = lines(made.store / BUCKET / "run")
        assert sorted(losses) == sorted(whole_losses) == list(range(1, 21))
        pairs = [(losses[step], whole_losses[step]) for step in losses]
        assert np.allclose(*zip(*pairs, strict=True), rtol=1e-5)


def test_what_a_host_needs_to_start_does_not_grow_with_the_job(tmp_path):
    """The requests that each host but the first sends to the store before the first step, and those
    of the first host, in jobs of 4 hosts and of many.

    The first also renews the workdir's lease all the time, which costs two requests each time.
    """
    needed = []
    for num_hosts in 4, MANY:
        with make_pod(tmp_path / f"pod{num_hosts}", num_hosts) as made:
            command = [
                *RUN,
                f"--config.data.batch_size={MANY}",
                "--config.train.stop_step=6",
                "--config.sample.max_tokens=0",
                "--start_secs=500",
                f"--workdir={WORKDIR}",
            ]
            began = time.monotonic()
            processes = made.train(*command, devices=1)
            _until(lambda: "step 1/" in output(processes[0]), processes, 600)
            secs = time.monotonic() - began
            counts = [made.proxy.requests_from[host.address] for host in made.hosts]
            (lease,) = (made.store / BUCKET / "run" / "lock").iterdir()
            counts[0] -= 2 * json.loads(lease.read_text("utf-8"))["renewals"]
            done = ends(processes, 300)
            assert [code for code, _ in done] == [0] * num_hosts, done
        rest = sorted(counts[1:])
        needed.append((counts[0], rest[len(rest) // 2], rest[-1]))
        print(
            f"{num_hosts} hosts: first step after {secs:.0f} s; requests of the first host "
            f"but for its lease {counts[0]}, of the others {rest[0]} to {rest[-1]}"
        )
    (first, usual, _), (first_of_many, usual_of_many, most_of_many) = needed
    assert first_of_many <= 1.2 * first + 10
    assert usual_of_many <= usual + 2
    assert most_of_many <= usual + 10
