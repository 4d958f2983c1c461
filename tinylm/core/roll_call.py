"""Who is there, before JAX connects the processes of a job.

JAX aborts every process with a stack trace where two come with the same number, and waits without a
word where they disagree on how many they are. So process 0 first listens at the coordinator's port
itself, and each other process says who it is:

    process 0   listens ... all said hello, and fit | "go" to all | closes, JAX listens there
    process 1        connects -> hello ------------------> "go" --> JAX connects
    process 1 again        connects -> hello -> the same line for all: process 1 came twice

What comes later finds JAX's server there, which doesn't know this greeting, and tries again until
its time is over: after a restart that may still be the server of the job before.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from tinylm.core.cluster import Job
from tinylm.core.errors import UserError

_MOST_BYTES = 4096
_PAUSE_SECS = 0.5
# In a message that names processes.
_MOST_NAMES = 8
# Process 0 has the last word where the time is over for all at once.
_LATER_SECS = 5.0


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a process says of itself."""

    process_id: int
    num_processes: int
    host: str
    # Tells processes apart that come with the same number.
    nonce: str


class NotAllCame(Exception):
    """The time is over; has the numbers of the processes that are missing, where they are known."""

    def __init__(self, missing: list[int], is_other_job: bool = False):
        """Keep what is known.

        Args:
          missing: the numbers.
          is_other_job: whether somebody else answers at the coordinator's address.
        """
        super().__init__()
        self.missing = missing
        self.is_other_job = is_other_job


def answer(job: Job, host: str, until: float, describe_missing: Callable[[list[int]], str]) -> None:
    """Be process 0: wait until all others came.

    Args:
      job: ours.
      host: the name of this one, in words.
      until: when the time is over, by the monotonic clock.
      describe_missing: makes the line for all from the numbers of those that are missing.

    Raises:
      UserError: on all processes, where two don't fit together or some are missing in the end.
    """
    with _Desk(job, host) as desk:
        try:
            while desk.missing():
                if time.monotonic() > until:
                    raise UserError(describe_missing(desk.missing()))
                desk.serve(_PAUSE_SECS)
        except UserError as error:
            desk.tell_all({"error": str(error)})
            raise
        desk.tell_all({"go": True})


def say_hello(job: Job, host: str, until: float) -> None:
    """Be another process: wait until process 0 lets all go on.

    Args:
      job: ours.
      host: the name of this one, in words.
      until: when the time is over, by the monotonic clock.

    Raises:
      UserError: what process 0 says is wrong.
      NotAllCame: the time is over.
    """
    name, _, port = job.coordinator.rpartition(":")
    hello = Hello(job.process_id, job.num_processes, host, nonce=os.urandom(8).hex())
    is_other_job = False
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            address = (name.strip("[]"), int(port))
            left_secs = max(0.1, until - time.monotonic())
            with socket.create_connection(address, timeout=min(5.0, left_secs)) as connection:
                connection.sendall(_line(dataclasses.asdict(hello)))
                connection.settimeout(max(0.0, until - time.monotonic()) + _LATER_SECS)
                verdict = _read_verdict(connection)
            if "go" in verdict:
                return
            if "error" in verdict:
                raise UserError(str(verdict["error"]))
            is_other_job = True
        time.sleep(_PAUSE_SECS)
    raise NotAllCame([], is_other_job)


def names_of(processes: Sequence[int]) -> str:
    """Return numbers of processes as a message names them, the first few of them."""
    shown = ", ".join(map(str, processes[:_MOST_NAMES]))
    more = len(processes) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


class _Desk:
    """Where process 0 receives the others."""

    def __init__(self, job: Job, host: str):
        self._job = job
        self._host = host
        self._port = int(job.coordinator.rpartition(":")[2])
        self._selector = selectors.DefaultSelector()
        # What each connection has sent so far, and those that have said who they are.
        self._received: dict[socket.socket, bytes] = {}
        self._present: dict[int, tuple[Hello, socket.socket]] = {}

    def __enter__(self) -> "_Desk":
        self._server = _listen(self._port)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._received):
            # The other side closes first, so that the port is free at once for JAX.
            connection.settimeout(2.0)
            with contextlib.suppress(OSError):
                while connection.recv(_MOST_BYTES):
                    pass
            connection.close()
        self._server.close()
        self._selector.close()

    def missing(self) -> list[int]:
        """Return the numbers of the processes that haven't come."""
        return [n for n in range(1, self._job.num_processes) if n not in self._present]

    def serve(self, secs: float) -> None:
        """Listen for so long; raise UserError where somebody doesn't fit."""
        for key, _ in self._selector.select(secs):
            if key.fileobj is self._server:
                connection, _ = self._server.accept()
                connection.setblocking(False)
                self._received[connection] = b""
                self._selector.register(connection, selectors.EVENT_READ)
            else:
                self._receive(key.fileobj)  # type: ignore[arg-type]

    def _receive(self, connection: socket.socket) -> None:
        try:
            content = connection.recv(_MOST_BYTES)
        except OSError:
            content = b""
        self._received[connection] += content
        # It has gone, or it isn't one of us.
        if not content or len(self._received[connection]) > _MOST_BYTES:
            self._forget(connection)
        elif self._received[connection].endswith(b"\n"):
            hello = _read_hello(self._received[connection])
            if hello is None:
                self._forget(connection)
            else:
                self._admit(hello, connection)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._received[connection]
        gone = [n for n, (_, of) in self._present.items() if of is connection]
        for process in gone:
            del self._present[process]

    def _admit(self, hello: Hello, connection: socket.socket) -> None:
        """Note who has come; raise UserError where it doesn't fit."""
        who = f"process {hello.process_id} on {hello.host}"
        count = self._job.num_processes
        if hello.num_processes != count:
            raise UserError(
                f"{who} was started as one of {hello.num_processes} processes, process 0 on "
                f"{self._host} as one of {count}; give all the same --num_processes."
            )
        first_host = self._host
        if hello.process_id in self._present:
            first, before = self._present[hello.process_id]
            first_host = first.host
            if first.nonce == hello.nonce:
                self._forget(before)
        if hello.process_id == 0 or hello.process_id in self._present:
            raise UserError(
                f"process {hello.process_id} came twice, from {first_host} and from {hello.host}; "
                "give each process a --process_id of its own."
            )
        self._present[hello.process_id] = (hello, connection)

    def tell_all(self, verdict: dict[str, Any]) -> None:
        """Send the verdict to all that are connected."""
        for connection in self._received:
            with contextlib.suppress(OSError):
                connection.sendall(_line({"tinylm": verdict}))


def _listen(port: int) -> socket.socket:
    """Return a socket that listens at a port of all addresses, as JAX's server will."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read_hello(content: bytes) -> Hello | None:
    """Return what a process says of itself; None where that isn't how ours do."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(content):
            case {
                "process_id": int(process_id),
                "num_processes": int(num_processes),
                "host": str(host),
                "nonce": str(nonce),
            }:
                return Hello(process_id, num_processes, host, nonce)
    return None


def _read_verdict(connection: socket.socket) -> dict[str, Any]:
    """Return what process 0 says; nothing where it is somebody else.

    Raises:
      OSError: there is no answer.
    """
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(_MOST_BYTES)
        content += part
        if not part or not content.startswith(b"{"):
            break
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(content):
            case {"tinylm": dict() as verdict}:
                return verdict
    return {}
