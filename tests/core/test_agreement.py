"""Of the processes that see the same folder one leads, whatever the file system can do, and those
that wait for each other don't flood process 0.

The processes are threads here, and each sees the folder that it is given.
"""

import concurrent.futures
import errno
import os
import threading

import pytest

from tinylm.core import agreement

WITHOUT_LINKS = {"EPERM": errno.EPERM, "ENOTSUP": errno.ENOTSUP, "ENOSYS": errno.ENOSYS}


@pytest.fixture(params=["links", *WITHOUT_LINKS])
def links(request, monkeypatch):
    """A file system with hard links, and ones that refuse to make any, each with its error."""
    if request.param == "links":
        return

    def refuse(*_):
        raise OSError(WITHOUT_LINKS[request.param], request.param)

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture
def ask(monkeypatch):
    """Ask a question about folders, one a process; return the answers in the same order."""
    here = threading.local()

    def ask_all(question, folders):
        count = len(folders)
        meeting = threading.Barrier(count)
        monkeypatch.setattr(agreement.jax, "process_count", lambda: count)
        monkeypatch.setattr(agreement.jax, "process_index", lambda: here.process)
        monkeypatch.setattr(agreement, "is_main", lambda: here.process == 0)
        monkeypatch.setattr(agreement, "from_main", lambda make, *_: ".job-1")
        monkeypatch.setattr(agreement, "barrier", lambda *_: meeting.wait(20))

        def answer(process, folder):
            here.process = process
            return question(folder)

        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            return list(threads.map(answer, range(count), folders))

    return ask_all


@pytest.mark.usefixtures("links")
def test_one_process_leads_all_that_see_the_same_folder(ask, tmp_path):
    shared = [tmp_path / "shared", tmp_path / "shared", tmp_path / "shared"]
    alone = tmp_path / "alone"
    pair = [tmp_path / "pair", tmp_path / "pair"]
    folders = [*shared, alone, *pair]
    for folder in {*folders}:
        folder.mkdir()
    leading = ask(agreement.leads, folders)
    assert leading[:4] == [True, False, False, True]
    assert sum(leading[4:]) == 1
    assert ask(agreement.is_shared, folders) == [True, True, True, False, False, False]
    assert not list(tmp_path.rglob(".job*"))


@pytest.mark.usefixtures("links")
def test_who_can_not_write_follows_one_who_can_and_leads_itself_where_nobody_can(
    ask, tmp_path, monkeypatch
):
    """A process that waited for nobody would give up only after half an hour."""
    seen = tmp_path / "seen"
    seen.mkdir()
    # The same folder, mounted so that it can only be read; permissions don't hold root back.
    (tmp_path / "read-only").symlink_to(seen)
    refuse_writes(tmp_path / "read-only", monkeypatch)
    assert ask(agreement.leads, [seen, tmp_path / "read-only"]) == [True, False]
    assert ask(agreement.leads, [tmp_path / "read-only", seen]) == [False, True]
    assert ask(agreement.leads, [tmp_path / "read-only"] * 2) == [True, True]


def refuse_writes(folder, monkeypatch):
    """Let no file be made below the path `folder`."""
    io_open = agreement.pathlib.Path.open

    def open_unless_refused(path, mode="r", *arguments, **others):
        if mode != "r" and path.parent == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        return io_open(path, mode, *arguments, **others)

    monkeypatch.setattr(agreement.pathlib.Path, "open", open_unless_refused)
    monkeypatch.setattr(agreement.pathlib.Path, "write_text", write_text)


def write_text(path, text, encoding):
    """Write a file as pathlib does, by the `open` above."""
    with path.open("w", encoding=encoding) as file:
        file.write(text)


@pytest.mark.parametrize("count", [2, 64, 4096])
def test_what_waiting_processes_ask_of_process_0_does_not_grow_with_their_square(
    count, monkeypatch
):
    pauses = []
    monkeypatch.setattr(agreement.jax, "process_count", lambda: count)
    monkeypatch.setattr(agreement, "work_of_others", str)
    monkeypatch.setattr(agreement.time, "sleep", pauses.append)
    agreement.wait_until(lambda: len(pauses) == 3, "the others", silent_secs=60)
    assert all(count / pause <= 100 for pause in pauses)
