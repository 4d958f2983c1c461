"""Checkpoints under damage: every file, any bit, a kill at any point of a save, a full disk."""

import dataclasses
import importlib
import json
import os
import pathlib
import random
import shutil
import sys

import jax
import pytest
from helpers import small_state

from tinylm.core import log
from tinylm.core.errors import StorageError, UserError
from tinylm.run import checksums, orbax_s3
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1 and 2."""
    folder = RunFolder(str(tmp_path_factory.mktemp("saved"))).checkpoints
    checkpoints = Checkpoints(folder, CheckpointConfig())
    for step in 1, 2:
        checkpoints.save(small_state(step), None)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, which is also a run folder that was moved."""
    copy = RunFolder(str(tmp_path)).checkpoints
    shutil.copytree(saved, copy)
    return copy


@pytest.fixture
def said(monkeypatch):
    """The lines that were said."""
    lines = []
    monkeypatch.setattr(
        "tinylm.run.checkpoint.say", lambda line, from_all=False: lines.append(line)
    )
    return lines


def files_of(folder):
    return sorted(path for path in pathlib.Path(folder / "2").rglob("*") if path.is_file())


def test_a_moved_folder_is_whole(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.newest() == 2
    restored = checkpoints.restore(2, jax.eval_shape(lambda: small_state(0)))
    assert (int(restored.step), restored.params["w"].tolist()) == (2, [2.0] * 4)


@pytest.mark.parametrize("how", ["missing", "cut", "longer"])
def test_every_damaged_file_is_named_and_the_step_before_taken(folder, said, how):
    assert len(files_of(folder)) > 10
    for path in files_of(folder):
        content = path.read_bytes()
        path.unlink() if how == "missing" else path.write_bytes(
            content[:-1] if how == "cut" else content + b"\0"
        )
        assert Checkpoints(folder).newest() == 1, path
        assert f"step 2 in {folder} is damaged: {path.relative_to(folder / '2')} " in said.pop()
        path.write_bytes(content)
    assert Checkpoints(folder).newest() == 2


def test_every_flipped_bit_is_found(folder, said):
    rng, files = random.Random(0), files_of(folder)
    for number in range(100):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        original = path.read_bytes()
        path.write_bytes(content)
        assert Checkpoints(folder).newest() == 1, f"bit {place} of {path}"
        path.write_bytes(original)


@pytest.mark.parametrize(
    "body",
    [
        "x",
        "5",
        "[]",
        "{}",
        '{"files": 5, "loss": null}',
        '{"files": {}, "loss": "x"}',
        "[" * 100_000,
    ],
)
def test_a_list_of_another_shape_counts_as_altered(folder, said, body):
    file = folder / "2" / checksums.NAME
    file.write_bytes(checksums._digest(body.encode()).encode() + b"\n" + body.encode())
    assert Checkpoints(folder, CheckpointConfig()).find("best") == 1
    assert "checksums is altered" in said[-1]


def test_an_entry_of_another_shape_counts_as_an_altered_file(folder, said):
    _, _, body = (folder / "2" / checksums.NAME).read_bytes().partition(b"\n")
    for entry in None, 5, "ab", [], ["1", "2"]:
        content = json.loads(body)
        content["files"]["params/_METADATA"] = entry
        changed = json.dumps(content).encode()
        (folder / "2" / checksums.NAME).write_bytes(
            checksums._digest(changed).encode() + b"\n" + changed
        )
        assert Checkpoints(folder).newest() == 1
        assert "params/_METADATA is altered" in said[-1]


def test_a_file_too_many_and_a_link_are_named(folder, said, tmp_path):
    (folder / "2" / "params" / "more").write_text("?")
    assert Checkpoints(folder).newest() == 1
    assert "params/more does not belong to it" in said[-1]
    (folder / "2" / "params" / "more").unlink()
    file = folder / "2" / "params" / "_METADATA"
    shutil.move(file, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    assert Checkpoints(folder).newest() == 1
    assert "params/_METADATA is a link" in said[-1]


def test_only_what_dead_saves_left_here_is_cleared(folder, tmp_path):
    left = [folder / "2.unfinished", folder / "3.orbax-checkpoint-tmp-1" / "part"]
    stranger = RunFolder(str(tmp_path / "other")).checkpoints / "3.orbax-checkpoint-tmp-1" / "part"
    for path in *left, stranger:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert Checkpoints(folder, CheckpointConfig()).newest() == 1
    assert ([path.name for path in folder.iterdir()], stranger.exists()) == (["1"], True)


def test_damaged_checkpoints_alone_are_an_error_and_no_start_at_0(folder, said):
    for step in "1", "2":
        (folder / step / checksums.NAME).unlink()
    with pytest.raises(
        StorageError,
        match=r"no whole checkpoint is left \(step 2 .* checksums is missing\); remove",
    ):
        Checkpoints(folder, CheckpointConfig()).newest()
    shutil.rmtree(folder)
    assert Checkpoints(folder, CheckpointConfig()).newest() is None


def test_tools_pass_over_damage_but_for_a_number(folder, said):
    (folder / "2" / "train" / "_METADATA").write_text("?")
    assert Checkpoints(folder).find("latest", ["params"]) == 2, "only what is read must be whole"
    assert Checkpoints(folder).find("latest") == 1
    assert Checkpoints(folder).find("best") == 1
    with pytest.raises(StorageError, match="train/_METADATA has 1 bytes instead of"):
        Checkpoints(folder).find("2")


def test_a_damaged_step_is_written_again_and_goes_with_the_old(folder, said):
    (folder / "2" / "params" / "_METADATA").unlink()
    checkpoints = Checkpoints(folder, CheckpointConfig())
    assert checkpoints.newest() == 1
    checkpoints.save(small_state(2), None)
    checkpoints.close()
    assert Checkpoints(folder).newest() == 2
    (folder / "2" / "params" / "_METADATA").unlink()
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    assert checkpoints.newest() == 1
    checkpoints.save(small_state(3), None)
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert not (folder / "2").exists()


class Killed(BaseException):
    """Ends a save as SIGKILL would: nothing more is written."""


def writes(monkeypatch, kill_at):
    """Count what changes the folder while sealing and removing, and stop before number `kill_at`."""
    from etils.epath import gpath

    count = 0

    def guarded(name, real):
        def call(*arguments, **kwargs):
            nonlocal count
            if not sys._getframe(1).f_globals["__name__"].startswith("tinylm."):
                return real(*arguments, **kwargs)
            count += 1
            if count == kill_at:
                raise Killed(name)
            return real(*arguments, **kwargs)

        return call

    for name in "touch", "unlink", "rmtree", "write_bytes", "rename":
        monkeypatch.setattr(gpath.PosixGPath, name, guarded(name, getattr(gpath.PosixGPath, name)))
    return lambda: count


def save_until_killed(monkeypatch, folder, state, kill_at):
    """Save a state, killed before write `kill_at`; return the number of writes if it got through,
    0 if it was killed.
    """
    with monkeypatch.context() as patched:
        count = writes(patched, kill_at)
        checkpoints = Checkpoints(folder, CheckpointConfig())
        try:
            checkpoints.save(state, None)
            checkpoints.close()
        except Killed:
            checkpoints._orbax.close()
            return 0
        return count()


def test_a_kill_between_any_two_writes_leaves_a_whole_step(saved, tmp_path, monkeypatch):
    """Saving step 3 over 1 and 2 is stopped before each change of the folder.

    Then 2 or 3 restores, and leftovers go.
    """
    total, reached = 99, set()
    for kill_at in range(1, 100):
        if kill_at > total:
            break
        folder = RunFolder(str(tmp_path / str(kill_at))).checkpoints
        shutil.copytree(saved, folder)
        total = save_until_killed(monkeypatch, folder, small_state(3), kill_at) or total
        again = Checkpoints(folder, CheckpointConfig())
        reached.add(again.newest())
        assert {path.name for path in folder.iterdir()} == {str(step) for step in again.steps()}
        assert len(again.steps()) >= 2
    assert kill_at >= 5
    assert reached == {2, 3}


def test_a_kill_while_a_step_is_saved_again_loses_neither(saved, tmp_path, monkeypatch):
    """It is the only one; what it holds after the kill is the old state or the new one, whole."""
    total, found = 99, set()
    for kill_at in range(1, 100):
        if kill_at > total:
            break
        folder = RunFolder(str(tmp_path / str(kill_at))).checkpoints
        shutil.copytree(saved / "2", folder / "2")
        state = small_state(2)
        new = dataclasses.replace(state, params={"w": state.params["w"] + 5})
        total = save_until_killed(monkeypatch, folder, new, kill_at) or total
        again = Checkpoints(folder, CheckpointConfig())
        assert again.newest() == 2
        restored = again.restore(2, jax.eval_shape(lambda: small_state(0)))
        found.add(float(restored.params["w"][0]))
        assert {path.name for path in folder.iterdir()} == {"2"}
    assert found == {2.0, 7.0}


def test_a_save_that_fails_is_said_and_tried_again(folder, said, monkeypatch):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    with monkeypatch.context() as patched:
        patched.setattr(
            checksums, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        checkpoints.save(small_state(3), None)
        checkpoints.check(wait=True)
    assert "No space left; the next save tries again" in said[-1]
    assert Checkpoints(folder).newest() == 2, "the last whole one is still there"
    checkpoints.save(small_state(4), None)
    checkpoints.close()
    assert checkpoints.newest() == 4


@pytest.mark.parametrize("failures", [2, 1_000_000])
def test_the_last_save_is_tried_again_while_its_bucket_fails(folder, said, monkeypatch, failures):
    """A disk stands in for the bucket, which has no space for a while, or for good."""
    write = checksums.write
    tries = []

    def fail(*arguments, **values):
        tries.append(arguments)
        if len(tries) <= failures:
            raise OSError(5, "the bucket is away")
        write(*arguments, **values)

    monkeypatch.setattr(checksums, "write", fail)
    monkeypatch.setattr("tinylm.run.checkpoint.in_bucket", lambda _: True)
    monkeypatch.setattr("tinylm.run.checkpoint._PAUSE_SECS", 0.01)
    limit_secs = 100.0 if failures == 2 else 0.5
    checkpoints = Checkpoints(folder, CheckpointConfig(outage_secs=limit_secs))
    checkpoints.save(small_state(3), None)
    checkpoints.insist(small_state(3), None)
    if failures == 2:
        checkpoints.close()
        assert len(tries) == 3
        assert checkpoints.newest() == 3
    else:
        with pytest.raises(StorageError, match="the bucket is away; see that it can be reached"):
            checkpoints.close()
        assert len(tries) > 1
    assert len(said) == min(failures, len(tries))


def test_a_step_is_finished_after_what_it_waits_for(folder):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    found = []
    state = small_state(3)
    checkpoints.save(state, None, before_sealing=lambda: found.append(checkpoints.steps()))
    checkpoints.close()
    assert found == [[1, 2]]
    assert checkpoints.steps() == [2, 3]


def test_a_run_that_ends_unsaved_says_so_with_its_exit_code(folder, said, monkeypatch):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    monkeypatch.setattr(
        checksums, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    checkpoints.save(small_state(3), None)
    with pytest.raises(StorageError, match="No space left; free space there") as caught:
        checkpoints.close()
    assert caught.value.exit_code == 5


def test_checksums_hold_facts_and_every_file(folder):
    _, _, body = (folder / "2" / checksums.NAME).read_bytes().partition(b"\n")
    content = json.loads(body)
    assert content["step"] == 2
    assert sorted(content["files"]) == [
        path.relative_to(folder / "2").as_posix()
        for path in files_of(folder)
        if path.name != checksums.NAME
    ]


log.start()


@pytest.fixture
def naming(monkeypatch):
    """The module of Orbax that says for TensorStore where arrays are, as if it were new."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    module = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    monkeypatch.setattr(module, "build_kvstore_tspec", module.build_kvstore_tspec)
    orbax_s3.enable.cache_clear()
    yield module
    orbax_s3.enable.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def test_orbax_learns_of_s3_and_names_all_other_places_as_before(naming):
    others = ["gs://bucket/run/5", "/runs/a/5"]
    before = [naming.build_kvstore_tspec(place, name="w") for place in others]
    orbax_s3.enable()
    assert [naming.build_kvstore_tspec(place, name="w") for place in others] == before
    spec = naming.build_kvstore_tspec("s3://bucket/run/5", name="w")
    assert spec["base"].items() >= {"driver": "s3", "bucket": "bucket", "path": "run/5"}.items()
    assert spec["path"] == "w" and "gcs" not in json.dumps(spec)


@pytest.mark.parametrize(
    "build",
    [None, lambda *_: {"driver": "ocdbt"}, lambda *_: {"base": {"driver": "gcs", "url": "b/f"}}],
)
def test_a_version_of_orbax_that_names_places_otherwise_is_one_line(naming, build, monkeypatch):
    monkeypatch.setattr(naming, "build_kvstore_tspec", build)
    with pytest.raises(UserError, match=r"can't be written to s3:// by orbax-checkpoint .*install"):
        orbax_s3.enable()
    assert naming.build_kvstore_tspec is build
