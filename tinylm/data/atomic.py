"""A folder appears whole or not at all, also where several processes make it at the same time.

Work happens in a folder of its own next to the final one, and is renamed when all of it is on the
disk: a kill at any point leaves at most such a folder, which the next process on the host removes.
One process of a host works at a time (a file lock, freed by the system when its holder dies); hosts
that race for the same folder are settled by the rename.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import IO

from tinylm.core.errors import StorageError
from tinylm.core.files import sync
from tinylm.core.log import alive


def make(
    folder: pathlib.Path,
    is_whole: Callable[[pathlib.Path], bool],
    fill: Callable[[pathlib.Path], None],
) -> None:
    """Let `fill` make the content of `folder`, unless it is there by then.

    Another host's folder that came first is left as it is.

    Raises:
      StorageError: the folder can't be written.
    """
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with _locked(folder):
            if folder.exists():
                if is_whole(folder):
                    return
                shutil.rmtree(folder)
            temporary.mkdir(parents=True)
            fill(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            try:
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(folder.parent)
    except OSError as error:
        where = error.filename or folder.parent
        raise StorageError(
            f"{where}: {error.strerror or error}; free space there, or set data.store_dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lock_path(folder: pathlib.Path) -> pathlib.Path:
    """Return the file that processes of a host lock while they make or remove `folder`."""
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of one folder on this host, after removing what dead holders left.

    On a file system without locks the rename alone settles races, and leftovers stay: they may be
    another's work.
    """
    with lock_path(folder).open("ab") as file:
        try:
            _wait_for_lock(file, folder)
        except OSError:
            pass
        else:
            for left in folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _wait_for_lock(file: IO[bytes], folder: pathlib.Path) -> None:
    """Take the lock of a file, and say so where another process holds it for long."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with alive(lambda: f"waiting for another process that makes {folder}"):
            fcntl.flock(file, fcntl.LOCK_EX)
