"""What the processes of a job tell each other outside of training.

They do so through the key-value store of JAX's coordination service, which process 0 serves. It
needs no device and no shared disk, and its calls know time limits. This is exchanged:

    from_main       process 0 decides or looks, and all get its answer or its error
    agree           all compare what must be the same, and all name the one that differs
    share_failures  what ends one process while a job starts ends all, within seconds
    wait_for_all    the processes that are done first say what the others are doing
    leads           of the processes that see the same folder, one makes what is to be in it

Each is called by all processes, in the same order.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tinylm.core import errors, log
from tinylm.core.distributed import START_SECS, host, is_main, leave_soon, speaker
from tinylm.core.errors import HangError, StorageError, UserError

BARRIER_SECS = 600.0
# How soon a failure of one process reaches the others.
POLL_SECS = 1.0
# How long after a failure the other processes, and process 0, are gone.
_OTHERS_SECS = 2.0
_LAST_SECS = 4.0
# In a message that says how processes differ.
_MOST_DIFFERENCES = 3
# How long a file that another process has just made may be out of sight on a network disk.
_VISIBLE_SECS = 60.0
# How often a wait looks whether it is over, and how often all processes together do at most: for
# each look process 0 answers with a list of all.
_LOOK_SECS = 0.2
_MOST_LOOKS_PER_SEC = 100
# What the line of a process that waits for others begins with.
WAITING = "waiting for"
_FAILURES = "tinylm/failed/"
_WORK = "tinylm/doing/"
# Number the calls that all processes make in the same order, so that each has a key of its own.
_answers = itertools.count()
_comparisons = itertools.count()
_gatherings = itertools.count()


@functools.cache
def client() -> Any:
    """Return the client of JAX's coordination service.

    JAX itself has no public name for it; Orbax has.
    """
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def barrier(name: str, secs: float = BARRIER_SECS) -> None:
    """Wait until all processes have come to the point `name`, once in a program.

    Raises HangError after `secs`.
    """
    if jax.process_count() == 1:
        return
    with _waiting(f"not all processes came to {name!r} within {secs:.0f} s"):
        client().wait_at_barrier(f"tinylm/{name}", int(secs * 1000))


@contextlib.contextmanager
def _waiting(line: str) -> Iterator[None]:
    """Raise HangError with `line` where a call of the coordination service gives up waiting."""
    try:
        yield
    except RuntimeError as error:
        raise HangError(f"{line}: {str(error).splitlines()[0]}") from error


def _from_0(key: str, secs: float) -> Any:
    """Return what process 0 has put, or puts within `secs`, under `key`."""
    with _waiting(f"process 0 did not answer within {secs:.0f} s"):
        return json.loads(client().blocking_key_value_get(key, int(secs * 1000)))


def from_main(make: Callable[[], Any], secs: float = BARRIER_SECS) -> Any:
    """Return on every process what `make` returns on process 0.

    Args:
      make: returns plain values, as JSON has them.
      secs: how long the others wait for it.

    Raises:
      UserError: on all processes, where `make` raises it.
      HangError: where process 0 doesn't answer in time.
    """
    if jax.process_count() == 1:
        return make()
    key = f"tinylm/from_main/{next(_answers)}"
    # The answer is [value], or [name of the error, its line].
    if is_main():
        try:
            value = make()
        except UserError as error:
            client().key_value_set(key, json.dumps([type(error).__name__, str(error)]))
            raise
        client().key_value_set(key, json.dumps([value]))
        return value
    answer = _from_0(key, secs)
    if len(answer) == 1:
        return answer[0]
    name, line = answer
    raise getattr(errors, name)(line)


def agree(
    facts: dict[str, Any],
    secs: float = START_SECS,
    what: str = "was started differently from",
    remedy: str = "start every host with the same command, files and versions",
) -> None:
    """Raise the same UserError on every process where one differs from process 0 in one of `facts`.

    The line names the host and up to three facts with both values.

    Args:
      facts: what must be the same, by the name that the line gives it.
      secs: how long to wait for the others.
      what: the verb of the line, between a process and process 0.
      remedy: what the user is to do.
    """
    if jax.process_count() == 1:
        return
    process = jax.process_index()
    prefix = f"tinylm/agree/{next(_comparisons)}"
    ours = {name: repr(fact) for name, fact in facts.items()}
    if process == 0:
        client().key_value_set(f"{prefix}/facts", json.dumps([host(), ours]))
    else:
        their_host, theirs = _from_0(f"{prefix}/facts", secs)
        differing = _differing(ours, theirs)
        if differing:
            client().key_value_set(
                f"{prefix}/differing/{process:06}",
                f"process {process} on {host()} {what} process 0 on {their_host}: {differing}; "
                f"{remedy}.",
            )
    barrier(f"{prefix}/compared", secs)
    # In the order of the processes, so that all name the same one.
    complaints = sorted(client().key_value_dir_get(f"{prefix}/differing/"))
    if complaints:
        _, line = complaints[0]
        raise UserError(line)


def _differing(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Return "X=a instead of b" for the facts that differ, the first few of them."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    shown = names[:_MOST_DIFFERENCES]
    text = ", ".join(f"{name}={ours.get(name)} instead of {theirs.get(name)}" for name in shown)
    if len(names) > len(shown):
        text += f" and {len(names) - len(shown)} more"
    return text


@contextlib.contextmanager
def share_failures() -> Iterator[None]:
    """End this process where another one of the job fails in the body, with the other's line and
    exit code, and let the others know what this process is doing.

    Nothing may be under way in the body that a sudden end would harm. A thread looks every
    POLL_SECS, so it doesn't matter what this process is doing: preparing for an hour, or waiting.
    """
    if jax.process_count() == 1:
        yield
        return
    is_over = threading.Event()
    threading.Thread(target=_exchange_news, args=(is_over,), daemon=True).start()
    try:
        yield
    except UserError as error:
        content = json.dumps([error.exit_code, f"{speaker()}{error}"])
        with contextlib.suppress(RuntimeError):
            client().key_value_set(f"{_FAILURES}{jax.process_index():06}", content)
        # The others end by themselves now, process 0 last of all, whose end JAX answers by aborting
        # those that are still there.
        leave_soon(error.exit_code, _LAST_SECS if is_main() else _OTHERS_SECS)
        raise
    finally:
        is_over.set()


def _exchange_news(is_over: threading.Event) -> None:
    """Until the body is over, publish what goes on here, and end the program soon after another
    process has failed.
    """
    published = ""
    while not is_over.wait(POLL_SECS):
        try:
            doing = log.current_work()
            if doing != published:
                published = doing
                content = json.dumps([host(), doing])
                key = f"{_WORK}{jax.process_index():06}"
                client().key_value_set(key, content, allow_overwrite=True)
            failures = client().key_value_dir_get(_FAILURES)
        except RuntimeError:
            # Process 0 is gone. JAX notices that too, and ends this process.
            return
        if failures and not is_over.is_set():
            _, content = min(failures)
            exit_code, line = json.loads(content)
            print(f"error: {line}", file=sys.stderr, flush=True)
            if is_main():
                time.sleep(_LAST_SECS)
            os._exit(exit_code)


def work_of_others() -> str:
    """Return what other processes say that they are doing, such as "host b: preparing tales:
    30 MB".

    They say it where they are in `share_failures`; those that do the same as others of their host
    are named once, and at most _MOST_DIFFERENCES are named.
    """
    if jax.process_count() == 1:
        return ""
    ours = f"{_WORK}{jax.process_index():06}"
    found: list[str] = []
    for key, content in sorted(client().key_value_dir_get(_WORK)):
        their_host, doing = json.loads(content)
        line = f"{their_host}: {doing}"
        # What waits itself tells nothing about whom it is waited for.
        if key != ours and doing and not doing.startswith(WAITING) and line not in found:
            found.append(line)
    text = "; ".join(found[:_MOST_DIFFERENCES])
    if len(found) > _MOST_DIFFERENCES:
        text += f"; and {len(found) - _MOST_DIFFERENCES} more"
    return text


def wait_until(is_done: Callable[[], bool], what: str, silent_secs: float) -> None:
    """Wait for the work of other processes, and say what they are doing.

    Args:
      is_done: says whether the wait is over.
      what: is waited for, as in "waiting for WHAT".
      silent_secs: how long to wait while no other process tells of any progress.

    Raises:
      HangError: nothing has moved for that long.
    """
    pause_secs = max(_LOOK_SECS, jax.process_count() / _MOST_LOOKS_PER_SEC)
    last_work = ""
    silent_since = time.monotonic()

    def describe() -> str:
        return f"{WAITING} {what} ({last_work})" if last_work else f"{WAITING} {what}"

    with log.alive(describe):
        while not is_done():
            work = work_of_others()
            if work != last_work:
                last_work = work
                silent_since = time.monotonic()
            if time.monotonic() - silent_since > silent_secs:
                raise HangError(f"waited {silent_secs:.0f} s for {what}, and nothing moved.")
            time.sleep(pause_secs)


def wait_for_all(what: str, silent_secs: float) -> None:
    """Wait until all processes have come here, however long they are at work, and say what they do.

    Args:
      what: they have done when they come here, such as "to prepare their data".
      silent_secs: how long to wait while none of the others tells of any progress.

    Raises:
      HangError: nothing has moved for that long.
    """
    count = jax.process_count()
    if count == 1:
        return
    prefix = f"tinylm/came/{next(_gatherings)}/"
    client().key_value_set(f"{prefix}{jax.process_index():06}", host())

    def all_came() -> bool:
        return len(client().key_value_dir_get(prefix)) == count

    wait_until(all_came, f"all {count} processes {what}", silent_secs)


def leads(folder: pathlib.Path) -> bool:
    """Say whether this process is the one that makes things in `folder`, for all that see it.

    Hosts may share a disk or not, and nothing in a path tells. So the processes race for a file
    that bears the name of this job: who makes it leads those who find it there. Where all share
    one disk that is process 0, which comes first. Where none of those that see a folder can write
    to it, each leads itself: it finds there what it needs, or fails and says why.

    Args:
      folder: it exists.
    """
    leader = _leader(folder)
    return leader is None or leader == jax.process_index()


def is_shared(folder: pathlib.Path) -> bool:
    """Say whether this process and process 0 see the same folder under that path, which is on a
    disk; False where neither can write there.
    """
    return _leader(folder) == 0


def _leader(folder: pathlib.Path) -> int | None:
    """Return the process that leads those that see `folder` as this one does: process 0 where it is
    one of them, otherwise the first that came; None where none of them can write there.
    """
    if jax.process_count() == 1:
        return 0
    job = from_main(lambda: f".job-{os.urandom(8).hex()}")
    mark = folder / job
    is_marked = False
    if is_main():
        is_marked = _claim(mark)
    barrier(f"{job}: process 0 came first")
    if not is_main():
        is_marked = _claim(mark)
    # A process that can't write to the folder may still find there the mark of one that can.
    barrier(f"{job}: all came")
    leader = _read_claim(mark, _VISIBLE_SECS if is_marked else 0)
    if is_marked and leader is None:
        raise StorageError(f"{mark} was made by another process, but can't be seen from {host()}.")
    # The file is needed until all have looked at it, and no longer.
    barrier(f"{job}: all looked")
    if leader == jax.process_index():
        mark.unlink(missing_ok=True)
    return leader


def _claim(mark: pathlib.Path) -> bool:
    """Make the file `mark` with the number of this process, unless it is there; return False where
    this process can't write to its folder.
    """
    ours = mark.with_name(f"{mark.name}.{jax.process_index()}")
    claim = f"{jax.process_index()}\n"
    try:
        ours.write_text(claim, encoding="utf-8")
    except OSError:
        return False
    try:
        # Unlike opening a file, a link is made whole or not at all, on a network disk too.
        os.link(ours, mark)
    except FileExistsError:
        pass
    except OSError:
        # Some file systems have no hard links (exFAT, many in user space): there the first to
        # create the file has it, and others may find it empty for a moment.
        with contextlib.suppress(FileExistsError), mark.open("x", encoding="utf-8") as file:
            file.write(claim)
    finally:
        with contextlib.suppress(OSError):
            ours.unlink(missing_ok=True)
    return True


def _read_claim(mark: pathlib.Path, secs: float) -> int | None:
    """Return the number in the file `mark`, waiting for up to `secs` until it is there, and whole;
    None where it isn't.
    """
    until = time.monotonic() + secs
    while True:
        with contextlib.suppress(OSError):
            claim = mark.read_text(encoding="utf-8")
            if claim.endswith("\n"):
                return int(claim)
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)
