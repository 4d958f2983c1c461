"""Batches on any number of hosts: real processes, each with its own rows, make the same global batches."""

import hashlib
import os
import subprocess
import sys

import pytest
from helpers import ROOT

# Reads rows `part` of `parts` of three batches from batch 5 on, and prints a hash of each of its rows.
WORKER = """
import hashlib, sys
import numpy as np
from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.data.pipeline import train_batches

part, parts, threads, store = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = DataConfig(source="tales:40", tokenizer="byte", seq_len=32, batch_size=16, store_dir=store)
data = open_data(config, seed=3, is_writer=part == 0, progress=False, wait_secs=60)
owned = np.arange(8)[part * 8 // parts : (part + 1) * 8 // parts]
batches = train_batches(data.train, batch_shape=(2, 8), owned_rows=owned, start=5, num_threads=threads)
for _ in range(3):
    index, batch = next(batches)
    for micro in range(2):
        for place, row in enumerate(owned):
            ids = b"".join(batch[name][micro, place].tobytes() for name in sorted(batch))
            print(index, micro, row, hashlib.sha256(ids).hexdigest())
batches.close()
"""


def global_hash(parts: int, threads: int, store: str) -> str:
    """Return one hash over the rows that all processes printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(part), str(parts), str(threads), store],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )
        for part in range(parts)
    ]  # fmt: skip
    lines = sorted(line for process in processes for line in process.communicate(timeout=120)[0].splitlines())
    assert [process.returncode for process in processes] == [0] * parts
    assert len(lines) == 3 * 16
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(("parts", "threads"), [(2, 0), (4, 1), (1, 4)])
def test_any_number_of_processes_and_threads_makes_the_same_batches(tmp_path, parts, threads):
    """The store is prepared by process 0 while the others wait for it."""
    assert global_hash(parts, threads, str(tmp_path / "a")) == global_hash(1, 2, str(tmp_path / "b"))
