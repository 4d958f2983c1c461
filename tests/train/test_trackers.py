"""Trackers hold what metrics.jsonl holds, and none of them can stop or slow a run."""

import io
import json
import struct
import threading
import time

import numpy as np
import pytest
from matplotlib import image

from tinylm.config import load_config
from tinylm.core.errors import UserError
from tinylm.run.folder import RunFolder
from tinylm.train import trackers
from tinylm.train.trackers import Trackers

RECORDS = [{"step": step, "split": "train", "loss": 4.0 / step, "mfu": None} for step in (1, 2, 3)]


def open_trackers(workdir, *overrides):
    folder = RunFolder(str(workdir))
    folder.create()
    return Trackers(load_config("tales", overrides), folder)


def feed(opened, records=RECORDS, picture=None):
    for record in records:
        opened.record(record)
    opened.put("text", 3, ["Once upon a time"])
    if picture:
        opened.put("picture", 3, str(picture))
    opened.close()


def events(workdir):
    """Return the events of TensorBoard files: length, its checksum, a protocol buffer, its
    checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_has_scalars_samples_settings_and_the_plot(tmp_path):
    pytest.importorskip("tensorboardX")
    picture = tmp_path / "loss.png"
    image.imsave(picture, [[0.0, 1.0], [1.0, 0.0]])
    feed(
        open_trackers(
            tmp_path / "run", "writers.tensorboard=True", "optimizer.learning_rate=0.025"
        ),
        picture=picture,
    )
    found = events(tmp_path / "run")
    values = {(value.tag, event.step): value for event in found for value in event.summary.value}
    assert [values["train/loss", step].simple_value for step in (1, 2, 3)] == [
        4.0,
        2.0,
        pytest.approx(4 / 3),
    ]
    assert b"Once upon a time" in values["samples/text_summary", 3].tensor.string_val[0]
    assert (
        b'"optimizer.learning_rate": 0.025' in values["config/text_summary", 1].tensor.string_val[0]
    )
    drawn = image.imread(io.BytesIO(values["loss", 3].image.encoded_image_string))
    np.testing.assert_array_equal(drawn, image.imread(picture)[..., :3])
    assert any("hparams" in tag for tag, _ in values)
    assert not any("mfu" in tag for tag, _ in values)


def test_a_resumed_run_hides_the_steps_it_takes_again(tmp_path):
    pytest.importorskip("tensorboardX")
    for records in (RECORDS, RECORDS[1:]):
        feed(open_trackers(tmp_path, "writers.tensorboard=True"), records)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [1, 2]


def log_records(data):
    """Yield the records of a LevelDB log behind 7 bytes of header: blocks of 32 KiB, parts of
    checksum, size, type.
    """
    at, whole = 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    picture = tmp_path / "loss.png"
    image.imsave(picture, [[0.0, 1.0], [1.0, 0.0]])
    feed(open_trackers(tmp_path / "run", "writers.wandb=True"), picture=picture)
    path = next((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    records, end = [], time.monotonic() + 30
    while (
        not any(record.HasField("exit") for record in records) and time.monotonic() < end
    ):  # its own process writes
        time.sleep(0.05)
        records = [Record.FromString(data) for data in log_records(path.read_bytes())]
    rows = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [4.0, 2.0, 4 / 3]
    drawn = next((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/loss*.png"))
    np.testing.assert_array_equal(image.imread(drawn), image.imread(picture)[..., :3])
    assert {"samples", "loss"} <= {name.split("/")[0] for name in set().union(*rows)}
    run = next(record.run for record in records if record.HasField("run"))
    assert run.run_id == (tmp_path / "run" / "wandb_id").read_text()
    assert any(item.key == "optimizer.learning_rate" for item in run.config.update)


def broken(hangs=None):
    """Return a tracker that fails at its second line, or waits for ever."""

    def tracker(*_):
        yield
        if hangs:
            hangs.wait()
        yield
        raise OSError("no space left\non device")

    return tracker, "json"


def test_a_tracker_that_fails_is_dropped_with_one_line(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trackers, "say", said.append)
    monkeypatch.setitem(trackers.KINDS, "wandb", broken())
    feed(open_trackers(tmp_path, "writers.wandb=True", "writers.tensorboard=True"))
    assert said == [
        "wandb is dropped, it failed with: no space left on device; metrics.jsonl has all."
    ]
    assert len([event for event in events(tmp_path) if event.summary.value]) >= 3


def end_late(opened, release):
    """Let a tracker that hangs go on, and wait for its thread, which has more to say then."""
    release.set()
    opened._thread.join(10)


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, monkeypatch):
    said, release = [], threading.Event()
    monkeypatch.setattr(trackers, "say", said.append)
    monkeypatch.setattr(trackers, "CLOSE_SECS", 0.05)
    monkeypatch.setitem(trackers.KINDS, "wandb", broken(release))
    opened = open_trackers(tmp_path, "writers.wandb=True")
    feed(opened)
    said_in_time = list(said)
    end_late(opened, release)
    assert said_in_time == ["wandb did not finish within 0 s; metrics.jsonl has all."]


def test_who_is_asked_to_stop_waits_less_for_a_tracker(tmp_path, monkeypatch):
    said, release = [], threading.Event()
    monkeypatch.setattr(trackers, "say", said.append)
    monkeypatch.setattr(trackers, "HURRY_SECS", 0.05)
    monkeypatch.setitem(trackers.KINDS, "wandb", broken(release))
    opened = open_trackers(tmp_path, "writers.wandb=True")
    opened.put("text", 1, ["a"])
    opened.put("text", 2, ["b"])
    opened.close(hurry=lambda: True)
    said_in_time = list(said)
    end_late(opened, release)
    assert said_in_time == ["wandb did not finish within 0 s; metrics.jsonl has all."]


def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "wandb", (broken()[0], "no_such_package"))
    with pytest.raises(UserError, match=r"pip install 'tinylm\[wandb\]'"):
        open_trackers(tmp_path, "writers.wandb=True")


def test_other_processes_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_main", lambda: False)
    feed(open_trackers(tmp_path, "writers.tensorboard=True"))
    assert not (tmp_path / "tensorboard").exists()
