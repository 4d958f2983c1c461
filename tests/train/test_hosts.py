"""What metrics.jsonl says of hosts: the largest of each figure, and whose it is."""

import pytest

from tinylm.core import buckets
from tinylm.core.vitals import Vitals, device_bytes, resident_bytes
from tinylm.core.watchdog import Watchdog
from tinylm.train.hosts import Hosts, largest
from tinylm.view.history import HostFigure, hosts


class Job(Watchdog):
    """A watchdog of process 0 that has heard of a second process."""

    peer = Vitals(host_secs=0.5, input_wait_secs=0.01, memory_bytes=1.0)

    def told(self):
        return {**super().told(), 1: ("host-b", self.peer)}


def test_figures_are_for_each_step_since_the_last_line(monkeypatch):
    seen = Hosts(Watchdog(0))
    seen.note(4, host_secs=0.4, input_wait_secs=0.2)
    seen.note(1, host_secs=0.1, input_wait_secs=0.3)
    monkeypatch.setattr(buckets, "_traffic", buckets.Traffic(5000, 10))
    first = seen.figures()
    assert first["host_secs"] == pytest.approx(0.1)
    assert first["input_wait_secs"] == pytest.approx(0.1)
    assert (first["bucket_bytes"], first["bucket_requests"]) == (1000, 2)
    assert first["memory_bytes"] > 1e7
    assert seen.figures() == first, "no step came since"
    seen.note(2, host_secs=1.0, input_wait_secs=0.0)
    second = seen.figures()
    assert (second["host_secs"], second["input_wait_secs"]) == (0.5, 0.0)
    assert "bucket_bytes" not in second and not any(name.endswith("_on") for name in second)
    assert seen.summary() == ""


def test_of_several_hosts_the_one_with_the_largest_is_named():
    seen = Hosts(Job(0))
    for _ in range(3):
        seen.note(1, host_secs=0.1, input_wait_secs=0.05)
        found = seen.figures()
    assert (found["host_secs"], found["host_secs_on"]) == (0.5, "host-b (process 1)")
    assert found["input_wait_secs"] == pytest.approx(0.05)
    assert found["input_wait_secs_on"].endswith("(process 0)")
    assert "device_memory_bytes" not in found, "a CPU's memory is the process's"
    assert (
        "Slowest of 2 processes: host-b (process 1), with 500.0 ms of host work a step"
        in seen.summary()
    )


def test_the_report_names_the_host_that_is_slowest_most_often():
    lines = [
        {"step": step, **largest({"a": Vitals(host_secs=step), "b": Vitals(host_secs=3.5)})}
        for step in range(1, 11)
    ]
    slowest, *_ = hosts(lines)
    share = pytest.approx(0.7)
    assert slowest == HostFigure("host_secs", usual=5.5, most=10, on="a", share=share)
    assert hosts([{"step": 1, "loss": 2.0}]) == []


def test_memory_is_that_of_the_process_and_of_the_fullest_device():
    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: peak

    assert device_bytes([Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 7})]) == 7
    assert device_bytes([Device(None)]) == 0
    before = resident_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert resident_bytes() >= before
    assert 1e7 < resident_bytes() < 1e12
