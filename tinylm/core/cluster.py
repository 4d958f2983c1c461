"""What the environment of a cluster says about the job that this process belongs to.

Every platform tells its processes in variables of its own who takes part. This module reads them
into one `Job`; where several speak, the first of this list counts:

    JAX_COORDINATOR_ADDRESS   and JAX_NUM_PROCESSES, as Kubeflow's trainer, launch/k8s_jobset.yaml
                              or a person sets them; the number is JAX_PROCESS_ID's, or that of the
                              pod in its Job (Kubernetes sets JOB_COMPLETION_INDEX)
    SkyPilot                  SKYPILOT_NODE_IPS, one a line, SKYPILOT_NODE_RANK
    Slurm                     the variables that srun gives the tasks of a step
    Open MPI                  the variables that mpirun gives its ranks
    TPU                       GKE's TPU_WORKER_HOSTNAMES, or the metadata of a Cloud TPU VM: JAX
                              reads both, and here is only found out that they are there

JAX detects some of these itself (jax 0.10 to 0.12), but neither SkyPilot nor Open MPI 5, and in a
pod it asks Kubernetes with a package and permissions that are not there by default. To a process of
Slurm or Open MPI it shows a single GPU: where one process drives a host of eight, seven would idle.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping

from tinylm.core.errors import UserError

# Where process 0 listens on a host that this job has for itself.
_PORT = 8476
# Where it listens on a host that it may share with other jobs: one of the last ports, by the
# number of the job.
_SHARED_PORTS = 4096
_FIRST_SHARED_PORT = 65536 - _SHARED_PORTS
_WORKERS = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_METADATA_SECS = 5.0
_GOOGLE_PCI_VENDOR = "0x1ae0"


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes, as one of them sees it.

    Attributes:
      coordinator: HOST:PORT of process 0; "" where JAX is to find it, and all the rest, by itself.
      num_processes: of the job; 0 where it isn't known.
      process_id: which of them this is, from 0; -1 where it isn't known.
      source: what says so, as a message names it.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    source: str = ""

    def is_complete(self) -> bool:
        """Say whether this describes one process of a job."""
        has_port = re.fullmatch(r".+:\d{1,5}", self.coordinator, re.ASCII) is not None
        return has_port and 0 <= self.process_id < self.num_processes


def find(environment: Mapping[str, str] = os.environ) -> Job | None:
    """Return the job of several processes that the environment describes, if it does.

    Raises:
      UserError: there is one, but what it needs can't be read from the environment.
    """
    for read in (_from_jax, _from_skypilot, _from_slurm, _from_open_mpi, _from_tpu):
        job = read(environment)
        if job is not None:
            return job
    return None


def rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the number of processes and which of them this is, to complete a --coordinator.

    They are 0 and -1 where the environment doesn't have both.
    """
    for size_name, rank_names in (
        ("JAX_NUM_PROCESSES", ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")),
        ("SKYPILOT_NUM_NODES", ("SKYPILOT_NODE_RANK",)),
        ("SLURM_STEP_NUM_TASKS", ("SLURM_PROCID",)),
        ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_RANK",)),
    ):
        size = _number(environment, size_name)
        ranks = [_number(environment, name) for name in rank_names]
        known = [number for number in ranks if number is not None]
        if size is not None and known:
            return size, known[0]
    return 0, -1


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Return which GPUs of the host are this process's own; None where it is to take all it sees.

    Several processes of a job on one host take one GPU each, which is JAX's rule as well;
    JAX_LOCAL_DEVICE_IDS, which JAX reads, says otherwise.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    # "1(x4)" is one task on each of four nodes; "2,1(x3)" are two on the first, one on the others.
    tasks_of_nodes = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = re.findall(r"(?:^|,)(\d+)", tasks_of_nodes)
    has_several_tasks = any(int(count) > 1 for count in counts)
    if has_several_tasks and "SLURM_LOCALID" in environment:
        return [int(environment["SLURM_LOCALID"])]
    num_ranks = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if num_ranks is not None and num_ranks > 1:
        return [int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])]
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return a variable that is a whole number; None where it isn't there or isn't one."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def _port(environment: Mapping[str, str], default: int) -> str:
    """Return the port of process 0; JAX_COORDINATOR_PORT changes it, as it does for JAX."""
    return environment.get("JAX_COORDINATOR_PORT", "") or str(default)


def _from_jax(environment: Mapping[str, str]) -> Job | None:
    """Read https://www.kubeflow.org/docs/components/trainer's variables of a JAX job."""
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator or _number(environment, "JAX_NUM_PROCESSES") == 1:
        return None
    size, number = rank(environment)
    if not size:
        # Only the address: JAX has ways to the rest.
        return Job(source="JAX_COORDINATOR_ADDRESS")
    if ":" not in coordinator:
        coordinator = f"{coordinator}:{_port(environment, _PORT)}"
    job = Job(coordinator, size, number, "JAX_COORDINATOR_ADDRESS")
    if not job.is_complete():
        raise UserError(
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or a pod's "
            f"JOB_COMPLETION_INDEX), numbered from 0, need each other; found {coordinator}, {size} "
            f"and {number}."
        )
    return job


def _from_skypilot(environment: Mapping[str, str]) -> Job | None:
    """Read https://docs.skypilot.co/en/stable/running-jobs/environment-variables.html."""
    size = _number(environment, "SKYPILOT_NUM_NODES") or 1
    number = _number(environment, "SKYPILOT_NODE_RANK")
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
    if size == 1 or number is None or not addresses:
        return None
    return Job(f"{addresses[0]}:{_port(environment, _PORT)}", size, number, "SkyPilot")


def _from_slurm(environment: Mapping[str, str]) -> Job | None:
    """Read the output variables of https://slurm.schedmd.com/srun.html.

    SLURM_NTASKS is in the shell of an allocation as well, and there it stands for a step that may
    never be. The tasks of the step are srun's alone.
    """
    size = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    number = _number(environment, "SLURM_PROCID")
    host = _first_node(environment.get("SLURM_STEP_NODELIST", ""))
    if size == 1 or number is None or not host:
        return None
    job_id = _number(environment, "SLURM_JOB_ID") or 0
    port = _port(environment, _FIRST_SHARED_PORT + job_id % _SHARED_PORTS)
    return Job(f"{host}:{port}", size, number, "Slurm")


def _first_node(nodes: str) -> str:
    """Return the first name of Slurm's short list of nodes; "" where there is none.

    The list is like "node7,other", "node[003-5,8]" or "rack[1-2]-gpu".
    """
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        return ""
    name, first_number, ending = found.groups(default="")
    return f"{name}{first_number}{ending}"


def _from_open_mpi(environment: Mapping[str, str]) -> Job | None:
    """Read what mpirun of Open MPI 4 and 5 gives its ranks.

    Open MPI 4 names the addresses of the host of mpirun, where rank 0 runs unless hosts are given
    in another order. Open MPI 5 names no other host: without --coordinator, only ranks of the same
    host find each other.
    """
    size = _number(environment, "OMPI_COMM_WORLD_SIZE") or 1
    number = _number(environment, "OMPI_COMM_WORLD_RANK")
    if size == 1 or number is None:
        return None
    # The same text for all ranks of one mpirun, such as "1314521088.0;tcp://10.96.0.1,10.1.0.1:34"
    # or "prterun-host-14884@1".
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    name = uri or environment.get("PMIX_NAMESPACE", "")
    port = _port(environment, _FIRST_SHARED_PORT + zlib.crc32(name.encode()) % _SHARED_PORTS)
    launcher = re.search(r"tcp://([^,:]+)", uri) or re.search(r"tcp6://(\[[^,\]]+)", uri)
    if _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == size:
        host = "127.0.0.1"
    elif launcher is not None:
        address = launcher.group(1)
        host = f"{address}]" if address.startswith("[") else address
    else:
        raise UserError(
            f"this mpirun has {size} processes on several hosts and doesn't tell them which host "
            "process 0 is on; give --coordinator=HOST:PORT, with the first host of its list."
        )
    return Job(f"{host}:{port}", size, number, "Open MPI")


def _from_tpu(environment: Mapping[str, str]) -> Job | None:
    """Say whether JAX will find a TPU job of several hosts."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    has_peers = any("," in environment.get(name, "") for name in names)
    has_slices = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    if has_peers or has_slices or _is_vm_of_a_pod(environment):
        return Job(source="the TPU slice")
    return None


def _is_vm_of_a_pod(environment: Mapping[str, str]) -> bool:
    """Say whether this is one of several VMs of a Cloud TPU slice.

    Nothing in the environment of such a VM says so, only the metadata server, which is asked where
    there are a device of Google's and libtpu. (JAX sets TPU_SKIP_MDS_QUERY where there is no TPU;
    GKE names the hosts in the environment.)
    """
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    if importlib.util.find_spec("libtpu") is None or not _has_device_of_google():
        return False
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(_WORKERS.format(server), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECS) as answer:
            return b"," in answer.read()
    except urllib.error.HTTPError:
        # A VM that is in no slice has no such attribute.
        return False
    except OSError as error:
        raise UserError(
            f"this machine has a TPU, but the metadata server {server} doesn't say which slice it "
            f"belongs to ({error}); give --coordinator=HOST:PORT, --num_processes and "
            "--process_id, or set TPU_SKIP_MDS_QUERY=1 to run on this host alone."
        ) from error


def _has_device_of_google(devices: pathlib.Path = pathlib.Path("/sys/bus/pci/devices")) -> bool:
    """Say whether a PCI device of this machine is by Google, as a TPU is."""
    for path in devices.glob("*/vendor"):
        if path.read_text(encoding="ascii").strip() == _GOOGLE_PCI_VENDOR:
            return True
    return False
