"""The roll call: all processes of a job come together, or each ends with the same line."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import until
from pod import free_port

from tinylm.core import roll_call
from tinylm.core.cluster import Job
from tinylm.core.errors import UserError


def outcomes(port, num_processes, others, secs=20.0):
    """Return what process 0 and others ended with: None, or their line.

    Args:
      port: of process 0.
      num_processes: that process 0 waits for.
      others: (number, number of processes, seconds to wait before it comes) of each other one.
      secs: for which process 0 waits.
    """

    def zero():
        job = Job(f"localhost:{port}", num_processes, 0)
        until = time.monotonic() + secs
        return roll_call.answer(job, "host a", until, lambda missing: f"missing: {missing}")

    def other(process, count, delay):
        time.sleep(delay)
        job = Job(f"localhost:{port}", count, process)
        return roll_call.say_hello(job, f"host {process}", time.monotonic() + secs)

    def line_of(use, *arguments):
        try:
            return use(*arguments)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(others) + 1) as threads:
        started = [threads.submit(line_of, zero)]
        started += [threads.submit(line_of, other, *arguments) for arguments in others]
        return [one.result() for one in started]


def test_all_go_on_when_the_last_has_come_and_the_port_is_free_for_jax():
    port = free_port()
    assert outcomes(port, 4, [(3, 4, 0.0), (1, 4, 0.2), (2, 4, 0.5)]) == [None] * 4
    socket.create_server(("", port)).close()


def test_who_comes_with_another_number_of_processes_is_named_by_all():
    lines = outcomes(free_port(), 3, [(1, 3, 0.0), (2, 4, 0.5)])
    assert len(set(lines)) == 1
    assert "process 2 on host 2 was started as one of 4 processes, process 0 on host a" in lines[0]


def test_two_with_the_same_number_are_named_by_all():
    lines = outcomes(free_port(), 3, [(1, 3, 0.0), (1, 3, 0.5)])
    assert len(set(lines)) == 1
    assert "process 1 came twice, from host 1 and from host 1" in lines[0]


def test_those_that_are_missing_are_named_by_all():
    assert outcomes(free_port(), 4, [(2, 4, 0.0)], secs=1.0) == ["missing: [1, 3]"] * 2


def test_who_went_away_may_come_again_and_strangers_are_not_counted():
    port = free_port()
    found = []
    job = threading.Thread(
        target=lambda: found.extend(outcomes(port, 3, [(1, 3, 1.0), (2, 3, 1.0)]))
    )
    job.start()
    until(lambda: can_connect(port), secs=20)
    strangers = [socket.create_connection(("localhost", port)) for _ in range(3)]
    silent, rude, gone = strangers
    rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
    gone.sendall(b'{"process_id": 1, "num_processes": 3, "host": "b", "nonce": "c"}\n')
    gone.close()
    job.join(20)
    assert found == [None] * 3
    silent.close()
    rude.close()


def can_connect(port):
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


def test_another_server_at_the_address_is_told_from_none(monkeypatch):
    job = Job(f"localhost:{free_port()}", 2, 1)
    with pytest.raises(roll_call.NotAllCame) as caught:
        roll_call.say_hello(job, "host b", time.monotonic() + 0.7)
    assert not caught.value.is_other_job

    server = socket.create_server(("", 0))

    def greet():
        while True:
            connection, _ = server.accept()
            # As gRPC's server does.
            connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")

    threading.Thread(target=greet, daemon=True).start()
    job = Job(f"localhost:{server.getsockname()[1]}", 2, 1)
    with pytest.raises(roll_call.NotAllCame) as caught:
        roll_call.say_hello(job, "host b", time.monotonic() + 0.7)
    assert caught.value.is_other_job
