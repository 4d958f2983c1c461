"""The folder of all token stores: where it is, how a store in it is named, which runs refer to it,
and the removal of stores that no run refers to.

A store is named by the content of its text, so every change of text or tokenizer leaves the store
before it behind. A run notes itself in its stores when it starts; whether it still refers to them
is asked of the run itself.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tinylm.core.errors import StorageError
from tinylm.core.files import user_cache
from tinylm.core.storage import in_bucket
from tinylm.data.atomic import lock_path
from tinylm.data.config import DataConfig, split_spec
from tinylm.data.manifest import FORMAT, MANIFEST
from tinylm.data.sources.base import Source, hash_bytes

USERS = "used_by.txt"
CHECKSUMS = "checksums"


@dataclasses.dataclass
class FoundStore:
    """A store in the folder of all: its name, the source it is of, its size, and the runs that
    refer to it.
    """

    folder: pathlib.Path
    source: str
    num_bytes: int
    runs: list[str]


class Cleaned(NamedTuple):
    """What a removal of unused stores came to.

    Attributes:
      removed: the stores that no run referred to.
      kept: the others, and those that another process is making right now.
      freed_bytes: what the removed stores took, and what unfinished ones had left.
    """

    removed: list[FoundStore]
    kept: list[FoundStore]
    freed_bytes: int


def store_folder(config: DataConfig) -> pathlib.Path:
    """Return the folder of all stores on this disk: as configured, in the user's cache, or private
    in the temporary folder.

    Where data.store_dir is in a bucket, copies of what is there go to the usual folder.
    """
    is_named = bool(config.store_dir) and not in_bucket(config.store_dir)
    if is_named:
        candidates = [pathlib.Path(config.store_dir).expanduser()]
    else:
        candidates = _usual_folders()
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            # In a shared temporary folder another user may have made one of this name.
            owners = {os.lstat(path).st_uid for path in (folder.parent, folder)}
            if is_named or owners == {os.getuid()}:
                return folder
    raise StorageError(
        f"{candidates[-1]} can't be made; set data.store_dir to a folder that can be written."
    )


def _usual_folders() -> list[pathlib.Path]:
    """Return where stores go unless the config says it, the best place first."""
    in_temporary = pathlib.Path(tempfile.gettempdir(), f"tinylm-{os.getuid()}", "stores")
    cache = user_cache()
    if cache is None:
        return [in_temporary]
    return [cache / "stores", in_temporary]


def text_key(source: Source, splits: tuple[str, ...], checksums: list[str]) -> list[Any]:
    """Return what decides the text of some splits of a source, which doesn't include its place.

    Args:
      source: the source.
      splits: the splits that a store has, such as ("train", "valid").
      checksums: of the files of the source, in their order.
    """
    c = source.config
    kind, _ = split_spec(source.spec)
    # How a file is read depends on the end of its name (.gz), so a content under another end is
    # another text.
    files = [
        [pathlib.Path(path).suffix, sha256]
        for path, sha256 in zip(source.content_files, checksums, strict=True)
    ]
    return [kind, source.identity(), files, splits, c.valid_fraction, c.valid_split, c.on_bad_text]


def store_name(text: list[Any], tokenizer: Any) -> str:
    """Return the name of the store of a text (its `text_key`) under a tokenizer."""
    return hash_bytes(json.dumps([FORMAT, text, tokenizer]).encode())


def checksum_notes(folder: pathlib.Path, source: Source) -> pathlib.Path:
    """Return the file with the checksums of a source's files, named by the place of these."""
    place = source.argument
    if not in_bucket(place):
        place = os.path.abspath(place)
    return folder / CHECKSUMS / f"{hash_bytes(place.encode('utf-8', 'surrogateescape'))}.json"


def wait_for(folders: Sequence[pathlib.Path], wait_secs: float) -> None:
    """Wait until another process that sees the same disk has prepared a store in one of `folders`.

    Raises:
      HangError: nothing has moved for `wait_secs`.
    """
    # This imports JAX, which the process that prepares goes without.
    from tinylm.core.agreement import wait_until

    def is_there() -> bool:
        return any((folder / MANIFEST).exists() for folder in folders)

    wait_until(is_there, f"another process to prepare {folders[0]}", wait_secs)


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
      folder: the folder of all stores.
      refers: says whether the run in a workdir refers to the store of a name.
      exists: says whether there is a run in a workdir that can be seen from here.
    """
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        store = manifest.parent
        if store.suffix == ".tmp":
            continue
        runs = []
        for line in _lines(store):
            host, _, workdir = line.rstrip("\n").partition("\t")
            # A run on another host's disk can't be asked from here.
            if host != socket.gethostname() and not exists(workdir):
                runs.append(f"{workdir} on {host}")
            elif refers(workdir, store.name):
                runs.append(workdir)
        yield FoundStore(store, _source_of(manifest), num_bytes(store), runs)


def clean(
    folder: pathlib.Path, refers: Callable[[str, str], bool], exists: Callable[[str], bool]
) -> Cleaned:
    """Remove the stores in `folder` that no run refers to, and what unfinished ones left.

    Args:
      folder: the folder of all stores.
      refers: says whether the run in a workdir refers to the store of a name.
      exists: says whether there is a run in a workdir that can be seen from here.

    Raises:
      StorageError: a store can't be removed.
    """
    removed = []
    kept = []
    for store in find_stores(folder, refers, exists):
        if not store.runs and remove(store.folder):
            removed.append(store)
        else:
            kept.append(store)
    freed_bytes = remove_leftovers(folder)
    freed_bytes += sum(store.num_bytes for store in removed)
    return Cleaned(removed, kept, freed_bytes)


def num_bytes(folder: pathlib.Path) -> int:
    """Return how many bytes the files below a folder have, which may not be there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _source_of(manifest: pathlib.Path) -> str:
    """Return the source that a manifest names, also one of another version of tinylm."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        return f"{found['source']} ({found['tokenizer']['name']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "damaged"


def remove(store: pathlib.Path) -> bool:
    """Remove a store and its lock; return False where another process is making it right now."""
    lock = lock_path(store)
    try:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                # A file system without locks; a store with a manifest is finished.
                pass
            # The manifest goes first: what is left of a removal that was cut off is then no store.
            (store / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(store)
            lock.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{store} can't be removed: {error.strerror}.") from error
    return True


def remove_leftovers(folder: pathlib.Path) -> int:
    """Remove what dead processes of this host left of unfinished stores, and the checksums of files
    that are all gone; return how many bytes the former had.
    """
    freed_bytes = 0
    for left in folder.glob(f"*.{socket.gethostname()}.*.tmp"):
        name = left.name.split(".", 1)[0]
        # Without a lock it may be another's work: on a file system that has none all stays.
        with lock_path(folder / name).open("ab") as file, contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            freed_bytes += num_bytes(left)
            shutil.rmtree(left, ignore_errors=True)
    for notes in (folder / CHECKSUMS).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            paths = json.loads(notes.read_text(encoding="utf-8"))
            if not any(pathlib.Path(path).exists() for path in paths):
                notes.unlink()
    return freed_bytes
