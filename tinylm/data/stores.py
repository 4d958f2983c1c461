"""The folder of all token stores: which runs refer to each, and the removal of those that none
refers to.

A store is named by the content of its text, so every change of text or tokenizer leaves the store
before it behind. A run notes itself in its stores when it starts; whether it still refers to them
is asked of the run itself.
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator

from tinylm.core.errors import StorageError
from tinylm.data.store import MANIFEST

USERS = "used_by.txt"


@dataclasses.dataclass
class FoundStore:
    """A store in the folder of all: its name, the source it is of, its size, and the runs that
    refer to it.
    """

    folder: pathlib.Path
    source: str
    num_bytes: int
    runs: list[str]


def note_run(folder: pathlib.Path, workdir: str) -> None:
    """Note in a store that the run in `workdir` on this host reads it, where this user may write to
    the store.
    """
    line = f"{socket.gethostname()}\t{workdir}\n"
    with contextlib.suppress(OSError):
        if line not in _lines(folder):
            with (folder / USERS).open("a", encoding="utf-8") as file:
                file.write(line)


def _lines(folder: pathlib.Path) -> list[str]:
    try:
        return (folder / USERS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []


def find_stores(
    folder: pathlib.Path, refers: Callable[[str, str], bool], exists: Callable[[str], bool]
) -> Iterator[FoundStore]:
    """Yield the stores in `folder`.

    Args:
        folder: The folder of all stores.
        refers: Says whether the run in a workdir refers to the store of a name.
        exists: Says whether there is a run in a workdir that can be seen from here.
    """
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        store = manifest.parent
        if store.suffix == ".tmp":
            continue
        runs = []
        for line in _lines(store):
            host, _, workdir = line.rstrip("\n").partition("\t")
            # A run on another host's disk can't be asked from here.
            is_unseen = host != socket.gethostname() and not exists(workdir)
            if is_unseen or refers(workdir, store.name):
                runs.append(f"{workdir} on {host}" if is_unseen else workdir)
        num_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        yield FoundStore(store, _source_of(manifest), num_bytes, runs)


def _source_of(manifest: pathlib.Path) -> str:
    """Return the source that a manifest names, also one of another version of tinylm."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        return f"{found['source']} ({found['tokenizer']['name']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "damaged"


def remove(store: pathlib.Path) -> bool:
    """Remove a store and its lock; return False where another process is making it right now."""
    lock = store.with_name(f"{store.name}.lock")
    try:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # The manifest goes first: what is left of a removal that was cut off is then no store.
            (store / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(store)
            lock.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{store} can't be removed: {error.strerror}.") from error
    return True


def remove_leftovers(folder: pathlib.Path) -> int:
    """Remove what dead processes of this host left of unfinished stores; return how many bytes that
    were.
    """
    freed = 0
    for left in folder.glob(f"*.{socket.gethostname()}.*.tmp"):
        name = left.name.split(".", 1)[0]
        with (folder / f"{name}.lock").open("ab") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            freed += sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
            shutil.rmtree(left, ignore_errors=True)
    for notes in (folder / "checksums").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if not any(
                pathlib.Path(path).exists()
                for path in json.loads(notes.read_text(encoding="utf-8"))
            ):
                notes.unlink()
    return freed
