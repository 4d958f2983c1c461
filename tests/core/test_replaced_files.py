"""Files that are replaced in one step, and the user's cache."""

import pathlib

import pytest

from tinylm.core import files


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.replace_text(path, "old")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"


def test_a_file_system_that_cannot_sync_is_an_error_only_where_that_is_required(
    tmp_path, monkeypatch
):
    def fail(_):
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "fsync", fail)
    files.sync(tmp_path, required=False)
    with pytest.raises(OSError, match="not supported"):
        files.sync(tmp_path)


@pytest.mark.parametrize(
    ("cache", "home", "found"),
    [
        ("/c", "/h", "/c/tinylm"),
        ("", "/h", "/h/.cache/tinylm"),
        ("", "", None),
    ],
)
def test_the_cache_is_where_xdg_says(monkeypatch, cache, home, found):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", home)
    assert files.user_cache() == (pathlib.Path(found) if found else None)
