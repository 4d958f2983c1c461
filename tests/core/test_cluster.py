"""Each platform's own variables lead to the same job on all of its processes."""

import http.server
import threading

import pytest

from tinylm.core import cluster
from tinylm.core.cluster import Job
from tinylm.core.errors import UserError


def test_no_variables_are_no_job():
    assert cluster.find({}) is None
    assert cluster.rank({}) == (0, -1)


# https://docs.skypilot.co/en/stable/running-jobs/environment-variables.html
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.3\n10.0.0.9",
    "SKYPILOT_NUM_NODES": "3",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "2",
}


def test_skypilots_first_node_is_the_coordinator():
    assert cluster.find(SKYPILOT) == Job("10.0.0.7:8476", 3, 2, "SkyPilot")
    assert cluster.local_devices(SKYPILOT) is None
    alone = {
        "SKYPILOT_NODE_IPS": "10.0.0.7",
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_RANK": "0",
    }
    assert cluster.find(alone) is None


# As Slurm 22.05 sets them for a task of `srun` in a batch job of four nodes.
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NODELIST": "node[007-009,012]",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("login,node[1-2]", "login"),
        ("node[007-009,012]", "node007"),
        ("node[3,5-7],other", "node3"),
        ("rack[1-4]-gpu,other", "rack1-gpu"),
        ("a-b.c[10-11]", "a-b.c10"),
    ],
)
def test_slurms_first_node_is_the_coordinator(nodes, first):
    job = cluster.find({**SLURM, "SLURM_STEP_NODELIST": nodes})
    port = 65536 - 4096 + 70001 % 4096
    assert job == Job(f"{first}:{port}", 4, 3, "Slurm")


def test_the_tasks_of_slurms_step_count_and_not_those_of_its_allocation():
    assert cluster.find({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}).num_processes == 2
    shell = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
    assert cluster.find(shell) is None


@pytest.mark.parametrize(
    ("tasks_of_nodes", "local", "devices"),
    [("1(x4)", "0", None), ("1", "0", None), ("8(x2)", "5", [5]), ("1,2(x3)", "1", [1])],
)
def test_a_process_that_has_its_host_alone_sees_all_gpus(tasks_of_nodes, local, devices):
    environment = {
        **SLURM,
        "SLURM_STEP_TASKS_PER_NODE": tasks_of_nodes,
        "SLURM_LOCALID": local,
    }
    assert cluster.local_devices(environment) == devices
    assert cluster.local_devices({**environment, "JAX_LOCAL_DEVICE_IDS": "0,1"}) is None


# As mpirun of Debian's Open MPI 4.1.4 sets them, with two hosts.
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_MCA_orte_hnp_uri": "1583480832.0;tcp://192.0.2.2,10.7.1.1:60719;tcp6://[fd00::2]:56167",
    "PMIX_NAMESPACE": "1583480833",
}
# As mpirun of Open MPI 5.0.11 sets them.
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-vm-14884@1",
}


def test_open_mpi_4_names_the_host_of_mpirun():
    job = cluster.find(OPEN_MPI_4)
    assert job.coordinator.startswith("192.0.2.2:")
    assert (job.num_processes, job.process_id) == (2, 1)
    assert cluster.local_devices(OPEN_MPI_4) is None
    ipv6 = {**OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fd00::2,fd00::3]:56167"}
    assert cluster.find(ipv6).coordinator.startswith("[fd00::2]:")


def test_open_mpi_5_is_found_on_one_host_and_asks_for_the_coordinator_of_several():
    job = cluster.find(OPEN_MPI_5)
    other = cluster.find({**OPEN_MPI_5, "OMPI_COMM_WORLD_RANK": "0"})
    assert job.coordinator == other.coordinator
    assert job.coordinator.startswith("127.0.0.1:")
    assert cluster.local_devices(OPEN_MPI_5) == [1]
    hosts = {**OPEN_MPI_5, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match=r"2 processes on several hosts .* --coordinator=HOST:PORT"):
        cluster.find(hosts)
    assert cluster.rank(hosts) == (2, 1)


# As launch/k8s_jobset.yaml sets them, and Kubernetes for each pod of an indexed Job.
POD = {
    "JAX_COORDINATOR_ADDRESS": "tinylm-hosts-0-0.tinylm:8476",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
NAMED = "JAX_COORDINATOR_ADDRESS"


def test_a_pod_knows_its_place():
    assert cluster.find(POD) == Job("tinylm-hosts-0-0.tinylm:8476", 4, 3, NAMED)
    assert cluster.find({**POD, "JAX_PROCESS_ID": "1"}).process_id == 1
    assert cluster.find({**POD, NAMED: "first"}).coordinator == "first:8476"
    # GKE names the hosts of a slice as well; what the manifest says counts.
    gke = {**POD, "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
    assert cluster.find(gke).num_processes == 4
    assert cluster.find({**POD, "JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}) is None
    assert cluster.find({NAMED: "first:1"}) == Job(source=NAMED)
    with pytest.raises(UserError, match=r"need each other; found .*:8476, 4 and 4"):
        cluster.find({**POD, "JOB_COMPLETION_INDEX": "4"})


@pytest.mark.parametrize("environment", [SKYPILOT, SLURM, OPEN_MPI_5])
def test_the_port_can_be_chosen(environment):
    job = cluster.find({**environment, "JAX_COORDINATOR_PORT": "1234"})
    assert job.coordinator.endswith(":1234")


@pytest.mark.parametrize(
    ("environment", "is_job"),
    [
        # GKE: https://cloud.google.com/kubernetes-engine/docs/how-to/tpus
        ({"TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8471,10.0.0.2:8471"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "b"}, True),
    ],
)
def test_a_slice_of_several_hosts_is_left_to_jax(environment, is_job):
    assert cluster.find(environment) == (Job(source="the TPU slice") if is_job else None)


@pytest.fixture
def vm(monkeypatch):
    """Play a TPU VM; return what its metadata server answers, by attribute, and its environment."""
    attributes = {}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            is_known = self.headers["Metadata-Flavor"] == "Google" and name in attributes
            self.send_response(200 if is_known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(cluster, "_has_device_of_google", lambda: True)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield attributes, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_a_vm_of_a_slice_asks_its_metadata(vm):
    attributes, environment = vm
    assert cluster.find(environment) is None
    attributes["worker-network-endpoints"] = "unknown:unknown:10.0.0.1"
    assert cluster.find(environment) is None
    attributes["worker-network-endpoints"] = "a:1:10.0.0.1,b:2:10.0.0.2"
    assert cluster.find(environment) == Job(source="the TPU slice")
    # JAX sets this where there is no TPU.
    assert cluster.find({**environment, "TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_vm_whose_metadata_is_out_of_reach_says_so(vm):
    with pytest.raises(UserError, match=r"metadata server 127.0.0.1:1 .* TPU_SKIP_MDS_QUERY=1"):
        cluster.find({"GCE_METADATA_IP": "127.0.0.1:1"})
