"""A run's folder may be a bucket: lock, logs, config and checksums work there as on a disk.

The store is fsspec's memory behind epath's gs://, with what Google's lacks: appending to an object
begins it again from nothing.
"""

import json
import threading

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from helpers import png_of

from tinylm import report
from tinylm.config import load_config
from tinylm.core import buckets
from tinylm.core.errors import StorageError, UserError
from tinylm.core.settings import to_dict
from tinylm.run import bucket_lock, checksums, log_files
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train import trackers
from tinylm.view.history import gather
from tinylm.view.plot import draw_loss, figure_of_curves


class Bucket(MemoryFileSystem):
    """An object store in memory."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **kwargs):
        return super()._open(path, mode.replace("a", "w"), **kwargs)


@pytest.fixture
def folder(monkeypatch):
    """The folder of a run in an empty bucket."""
    monkeypatch.setattr(bucket_lock, "RENEW_SECS", 0.5)
    monkeypatch.setattr(bucket_lock, "WATCH_SECS", 3.0)
    monkeypatch.setattr(Bucket, "store", {})
    for scheme in Bucket.protocol:
        fsspec.register_implementation(scheme, Bucket, clobber=True)
    run = RunFolder("gs://bucket/run")
    run.create()
    return run


def test_logs_grow_over_restarts_and_torn_lines_are_cut_off(folder):
    folder.log({"step": 1, "split": "train", "loss": 3.0})
    folder.wait_for_logs()
    folder.log({"step": 2, "split": "train", "loss": 2.0})
    folder.wait_for_logs()
    assert len(folder.metrics()) == 1, "the second line waits for others, or for a save"
    folder.log({"step": 2, "split": "time"})
    folder.wait_for_logs()
    assert len(folder.metrics()) == 3
    folder.log({"step": 3, "split": "train", "loss": 1.0})
    folder.send_logs()
    folder.wait_for_logs()
    assert len(folder.metrics()) == 4
    folder.metrics_file.write_text(folder.metrics_file.read_text() + '{"step": 3, "sp')
    again = RunFolder("gs://bucket/run")
    for loss in 1.5, 1.0:
        again.log({"step": 3, "split": "train", "loss": loss})
    again.flush()
    assert [line["loss"] for line in again.metrics() if "loss" in line] == [3.0, 2.0, 1.0]
    assert len(list(again.lines())) == 6


def test_nobody_waits_for_a_log_while_it_is_written(folder, monkeypatch):
    began = threading.Event()
    goes_on = threading.Event()
    writes = []

    def write(path, content):
        began.set()
        assert goes_on.wait(20)
        writes.append(content)

    monkeypatch.setattr(epath.Path("gs://bucket").__class__, "write_bytes", write)
    folder.log({"step": 0, "split": "train"})
    assert began.wait(20)
    for step in 1, 2, 3:
        folder.log({"step": step, "split": "train"})
    folder.log({"step": 4, "split": "time"})
    assert not writes
    goes_on.set()
    folder.wait_for_logs()
    assert [content.count(b"\n") for content in writes] == [1, 5]


def test_the_end_of_a_run_waits_for_its_log_while_the_bucket_fails(folder, monkeypatch):
    tries = []

    def write(path, content):
        tries.append(content)
        if len(tries) < 3:
            raise OSError(5, "the bucket is away")

    monkeypatch.setattr(buckets, "_FIRST_PAUSE_SECS", 0.01)
    monkeypatch.setattr(log_files, "say", lambda _: None)
    monkeypatch.setattr(epath.Path("gs://bucket").__class__, "write_bytes", write)
    folder.log({"step": 1, "split": "train"})
    folder.wait_for_logs()
    with pytest.raises(StorageError, match=r"--workdir=gs://bucket/run/metrics.jsonl cannot be"):
        folder.flush(outage_secs=0.0)
    folder.flush(outage_secs=20.0)
    assert len(tries) == 3 and tries[-1].count(b"\n") == 1


def test_a_bucket_that_fails_after_lines_were_held_back_is_said_once(folder, monkeypatch):
    said = []
    monkeypatch.setattr(log_files, "say", said.append)
    folder.log({"step": 1, "split": "train"})
    folder.wait_for_logs()
    folder.log({"step": 2, "split": "train"})  # held back
    with monkeypatch.context() as broken:
        broken.setattr(epath.Path("gs://bucket").__class__, "write_bytes", fails)
        for _ in range(2):
            folder.log({"step": 2, "split": "time"})
            folder.wait_for_logs()
    assert len(said) == 1 and "cannot be written" in said[0]
    folder.flush()
    assert len(list(folder.lines())) == 4


def test_a_log_is_not_written_over_after_its_service_failed(folder, monkeypatch):
    folder.log({"step": 1, "split": "time"})
    folder.wait_for_logs()
    bucket_path = epath.Path("gs://bucket").__class__
    with monkeypatch.context() as broken:
        broken.setattr(bucket_path, "write_bytes", fails)
        folder.log({"step": 2, "split": "time"})
        folder.wait_for_logs()
    with monkeypatch.context() as broken:
        # As a library says that answers from an old listing.
        broken.setattr(bucket_path, "exists", lambda _: False)
        folder.log({"step": 3, "split": "time"})
        folder.wait_for_logs()
    assert [line["step"] for line in folder.lines()] == [1, 2, 3]


def fails(*_):
    raise OSError(5, "the bucket is away")


def test_a_config_is_replaced_in_one_step(folder):
    for number in 1, 2:
        folder.write_config({"seed": number})
        assert json.loads(folder.config_file.read_text()) == {"seed": number}
    assert {path.name for path in folder.path.iterdir()} == {"config.json"}


def test_one_run_at_a_time(folder):
    first = bucket_lock.BucketLock(folder.path)
    with pytest.raises(UserError, match="in use by process"):
        bucket_lock.BucketLock(folder.path)
    first.release()
    bucket_lock.BucketLock(folder.path).release()


def test_damage_is_found(folder):
    step = epath.Path("gs://bucket/run/checkpoints/5")
    (step / "params").mkdir(parents=True)
    (step / "params" / "array").write_bytes(b"weights")
    checksums.write(step, step=5, loss=None)
    assert checksums.damage(step, ["params"]) == ""
    (step / "params" / "array").write_bytes(b"weighty")
    assert checksums.damage(step, ["params"]) == "params/array is altered"


@pytest.mark.parametrize("part", ["checksums", "params/array"])
def test_a_bucket_that_cannot_be_reached_is_no_damage(folder, monkeypatch, part):
    steps = folder.checkpoints
    for step in "5", "6":
        (steps / step / "params").mkdir(parents=True, exist_ok=True)
        (steps / step / "params" / "array").write_bytes(b"weights")
        checksums.write(steps / step, step=int(step), loss=None)
    checkpoints = Checkpoints(steps)
    with monkeypatch.context() as broken:
        open_whole = Bucket._open

        def refuse(self, path, *args, **kwargs):
            if f"/6/{part}" in path:
                raise ConnectionRefusedError(111, "nobody answers")
            return open_whole(self, path, *args, **kwargs)

        broken.setattr(Bucket, "_open", refuse)
        for find in checkpoints.newest, lambda: checkpoints.find("latest"):
            with pytest.raises(
                StorageError, match=r"gs://bucket/run/checkpoints cannot be reached"
            ):
                find()
    assert checkpoints.newest() == 6


def test_pictures_and_the_report_stay_in_the_bucket(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config("tales")
    config = config.resolve(1024)
    folder.write_config({"config": to_dict(config), "versions": {"mesh": {"data": 1}}})
    folder.log({"step": 1, "split": "train", "loss": 3.0})
    folder.wait_for_logs()
    assert draw_loss(folder)
    curves = [gather(str(folder.path))]
    assert folder.plot_file.read_bytes() == png_of(figure_of_curves(curves, ["loss"]))
    assert trackers.pixels(str(folder.plot_file)).ndim == 3
    assert report.main([f"--workdir={folder.path}"]) == 0
    assert {path.name for path in folder.path.glob("report.*")} == {"report.html", "report.png"}
    assert (folder.path / "report.png").read_bytes() == png_of(figure_of_curves(curves))
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_does_not_answer_holds_up_no_release(folder, monkeypatch):
    lock = bucket_lock.BucketLock(folder.path)
    answers = threading.Event()
    monkeypatch.setattr(buckets, "write_there", lambda *_: answers.wait(60))
    releasing = threading.Thread(target=lock.release)
    releasing.start()
    releasing.join(20)
    assert not releasing.is_alive()
    answers.set()
