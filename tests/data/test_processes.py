"""Batches on any number of hosts: real processes, each with its own rows, make the same global
batches.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np

from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.data.pipeline import train_batches

ROOT = pathlib.Path(__file__).resolve().parents[2]
# As process 0 to 3 of four, and then of two (0, 1, 0, 1): a hash of each row it owns in three
# batches from the fifth.
WORKER = """
import sys
from test_processes import row_hashes
print(*row_hashes(sys.argv[1], int(sys.argv[2]), 4, (0, 1, 4, 2)[int(sys.argv[2])]), sep="\\n")
print(*row_hashes(sys.argv[1], int(sys.argv[2]) % 2, 2, (4, 0)[int(sys.argv[2]) % 2]), sep="\\n")
"""


def row_hashes(folder, part, parts, threads):
    """Return a line for each row of `part`; the store is prepared by part 0 while the others wait
    for it.
    """
    source = f"text:{folder}/text.txt"
    config = DataConfig(
        source=source, tokenizer="byte", seq_len=32, batch_size=16, store_dir=f"{folder}/stores"
    )
    data = open_data(config, seed=3, is_writer=part == 0, progress=False, wait_secs=60)
    owned = np.arange(8)[part * 8 // parts : (part + 1) * 8 // parts]
    batches = train_batches(
        data.train, batch_shape=(2, 8), owned_rows=owned, start=5, num_threads=threads
    )
    lines = []
    for _ in range(3):
        index, batch = next(batches)
        for micro, (place, row) in (
            (micro, pair) for micro in range(2) for pair in enumerate(owned)
        ):
            ids = b"".join(batch[name][micro, place].tobytes() for name in sorted(batch))
            lines.append(f"{parts} {index} {micro} {row} {hashlib.sha256(ids).hexdigest()}")
    batches.close()
    return lines


def test_any_number_of_processes_and_threads_makes_the_same_batches(tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"{i} and {i * i}" for i in range(400)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/data'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(part)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(4)
    ]
    lines = [
        line for process in processes for line in process.communicate(timeout=120)[0].splitlines()
    ]
    assert [process.returncode for process in processes] == [0] * 4
    one = [line.split(" ", 1)[1] for line in row_hashes(str(tmp_path), 0, 1, 1)]
    assert len(set(one)) == 3 * 16
    for parts in ("4", "2"):
        rows = {line.split(" ", 1)[1] for line in lines if line.startswith(parts)}
        assert rows == set(one)
