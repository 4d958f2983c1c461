"""Starts that meet in one workdir: one alone trains there, and the others leave its files as they are."""

import pytest

from tinylm.config import load_config
from tinylm.core.errors import StorageError, UserError
from tinylm.run.folder import RunFolder
from tinylm.run.lock import WorkdirLock
from tinylm.train import start

SMALL = [
    "data.source=tales:200", "data.tokenizer=byte", "data.seq_len=16", "data.batch_size=8", "model.embed_dim=16",
    "model.num_layers=1", "train.num_steps=2", "eval.every_steps=0", "sample.max_tokens=0", "writers.plot=False",
    "mesh.data=1",
]  # fmt: skip


def begin(workdir, *overrides):
    return start.start_run(load_config("tales", [*SMALL, *overrides]), str(workdir))


def content(workdir):
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != "lock.json")
    return {path.name: path.read_bytes() for path in files}


def test_a_start_that_comes_second_changes_nothing(tmp_path, monkeypatch):
    first, open_data = [], start.open_data

    def while_the_second_prepares(*arguments, **kwargs):
        monkeypatch.setattr(start, "open_data", open_data)
        first.append(begin(tmp_path))
        return open_data(*arguments, **kwargs)

    monkeypatch.setattr(start, "open_data", while_the_second_prepares)
    with pytest.raises(UserError, match="is in use by process"):
        begin(tmp_path, "data.tokenizer=char", "model.embed_dim=32")
    there = content(tmp_path)
    assert b'"embed_dim": 16' in there["config.json"]
    with pytest.raises(UserError, match="is in use by process"):
        begin(tmp_path, "checkpoint.keep=7")
    assert content(tmp_path) == there
    assert first[0].run().step == 2
    begin(tmp_path, "checkpoint.keep=7").run()
    assert b'"keep": 7' in content(tmp_path)["config.json"]


@pytest.mark.parametrize("fails", ["check_same_stores", "store_digests", "make_blueprint", "Trainer"])
def test_a_start_that_fails_gives_the_workdir_free(tmp_path, monkeypatch, fails):
    begin(tmp_path).lock.close()
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="it fails"):
        patched.setattr(start, fails, lambda *_: (_ for _ in ()).throw(StorageError("it fails")))
        begin(tmp_path)
    WorkdirLock(RunFolder(str(tmp_path)).path).release()
