"""Run what hosts that share nothing must withstand, and write docs/pod.md.

python benchmarks/pod.py [NUMBER ...]      as root, about half an hour on two cores

The hosts are network and mount name spaces of this machine (tests/pod.py): what they have in
common is a bridge and an object store behind a proxy, which adds latency and faults.
"""

import os
import sys

from faults import ROOT, run_matrix

# The suite has these rows in a smaller size.
os.environ.setdefault("TINYLM_POD_LATE_SECS", "90")
POD = "tests/launch/test_pod.py"
DATA = "tests/data/test_bucket_data.py"
MATRIX = {
    1: (
        "a run from empty caches, its workdir in the bucket",
        "4 hosts of 2 devices; losses within 1e-5 of one process; axes may span hosts",
        [f"{POD} -k 'trains_as_one_process or span_hosts'"],
    ),
    2: (
        "text, jsonl, parquet, tokens and prepared stores in the bucket",
        "batches equal to local reading; 30 ms of latency cost a step less than 1%",
        [DATA, f"{POD} -k larger_than_the_cache"],
    ),
    3: (
        "a store larger than the local cache",
        "81 MB through 16 MB, at constant disk and memory",
        [f"{POD} -k larger_than_the_cache"],
    ),
    4: (
        "kill -9 of a host, which comes back empty",
        "4 hosts; process 2, and process 0; the same bits after the relaunch",
        [f"{POD} -k comes_back_empty"],
    ),
    5: (
        "the network between one host and the rest is cut",
        "for 5 s, and for good",
        [f"{POD} -k cut"],
    ),
    6: (
        "the object store fails",
        "503, 429, then slow, while rows, checkpoints and logs go through it; then for good",
        [f"{POD} -k 'out_of_reach or fails'", f"{DATA} -k fails"],
    ),
    7: (
        "one host has another text, config, code, clock",
        "named on every host within a minute; the clock doesn't matter",
        [f"{POD} -k 'named or clock or only_one'", "tests/core/test_distributed.py -k another"],
    ),
    8: (
        "a host comes late, twice, never",
        "90 s late with --start_secs=600; a second process with its number; one line when it ends",
        [f"{POD} -k 'late or never'"],
    ),
    9: (
        "another number of hosts",
        "2, 1, 8 and 2 in turn, losses within 1e-5 of two throughout",
        [f"{POD} -k another_number"],
    ),
    10: (
        "32 hosts of one device",
        "each sends as many requests before the first step as one of 4 hosts does",
        [f"{POD} -k does_not_grow"],
    ),
    11: (
        "a run in S3",
        "2 hosts, of which one is killed and comes back empty; every command; outages; locks",
        [
            f"{POD} -k in_s3",
            "tests/run/test_bucket_commands.py -k s3",
            "tests/run/test_bucket_lock.py -k s3",
        ],
    ),
}
HEAD = (
    "# A pod in a box\n\nWhat `python benchmarks/pod.py` found, as root, on "
    f"{os.cpu_count()} cores: hosts that share a network, an object store and a command line, and "
    "nothing else. Each has a network name space and a mount name space of its own, with an empty "
    "home, cache and temporary folder in memory; the store speaks Google's protocol over HTTP, in "
    "row 11 S3's. No real cluster was used. A row passes when all its tests do (their number in "
    "brackets)."
)

if __name__ == "__main__":
    sys.exit(run_matrix(ROOT / "docs" / "pod.md", HEAD, MATRIX))
