"""One run in a workdir: the process that has it is named, and a dead one doesn't have it."""

import json
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from tinylm.core.errors import UserError
from tinylm.run import lock
from tinylm.run.lock import WorkdirLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Renew as often as a test can wait for."""
    monkeypatch.setattr(lock, "RENEW_SECS", 1.0)


@pytest.fixture(params=["locks", "no locks"])
def folder(request, tmp_path, monkeypatch):
    """A folder on a disk, and one where files can't be locked, as in a bucket."""
    if request.param == "no locks":
        monkeypatch.setattr(
            lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available"))
        )
    return epath.Path(tmp_path)


def test_the_second_is_refused_with_the_first_ones_name_until_it_ends(folder):
    first = WorkdirLock(folder)
    who = rf"in use by process {os.getpid()} on {socket.gethostname()} since \d+-"
    with pytest.raises(UserError, match=who) as caught:
        WorkdirLock(folder)
    assert caught.value.exit_code == 2
    first.release()
    WorkdirLock(folder).release()


def test_a_dead_process_of_this_host_has_nothing(folder):
    take = f"WorkdirLock(epath.Path({str(folder)!r})); os._exit(9)"
    script = f"import os; from etils import epath; from tinylm.run.lock import WorkdirLock\n{take}"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert json.loads((folder / "lock.json").read_text())["pid"] != os.getpid()
    WorkdirLock(folder).release()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "5", '{"host": 1, "pid": 2, "id": 3, "since": 4}', "[" * 100_000]
)
def test_what_is_not_a_lease_holds_nothing(folder, content):
    (folder / "lock.json").write_text(content)
    WorkdirLock(folder).release()


def test_another_hosts_lease_counts_while_it_is_renewed(folder):
    (folder / "lock.json").write_text(
        json.dumps({"host": "other", "pid": 1, "id": "x", "since": "then", "renewals": 1})
    )
    # Nobody renewed it.
    WorkdirLock(folder).release()
    first = WorkdirLock(folder)
    first._me["host"] = "other"
    first._write()
    if first._file is not None:
        # As a lock that this host can't see.
        first._file.close()
    with pytest.raises(UserError, match=r"in use by process .* on other"):
        WorkdirLock(folder)
    first._ended.set()
