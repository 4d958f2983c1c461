"""Run the fault matrix and write docs/faults.md: python benchmarks/faults.py [NUMBER ...]

Each row is made of tests; faults come from outside the program (signals, files, limits, patched
functions of a test's driver). A row passes when all its tests do. Under an hour on two cores.
"""

import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
FAULTS = "tests/test_faults.py"
CHECKPOINTS, GUARD, WATCHDOG = (
    "tests/run/test_checkpoints.py",
    "tests/train/test_bad_steps.py",
    "tests/core/test_watchdog.py",
)
MATRIX = {
    1: ("none, twice", "1 process x 4 devices, 20 steps", [f"{FAULTS} -k fault_1_"]),
    2: ("kill -9 mid-step", "at 20 random steps of one run", [f"{FAULTS} -k fault_2_"]),
    3: (
        "kill -9 one of several processes",
        "process 1, and process 0 of the run that goes on; one of workers, and fewer go on",
        [f"{FAULTS} -k fault_3_"],
    ),
    4: (
        "kill -9 during a save",
        "before each change of the folder; 10 kills of real saves",
        [f"{CHECKPOINTS} -k kill", f"{FAULTS} -k fault_4_"],
    ),
    5: (
        "SIGTERM",
        "at start, during compile, training and evaluation; all processes of a job",
        [f"{FAULTS} -k fault_5_", "tests/test_runs.py -k sigterm"],
    ),
    6: (
        "a process that is stuck or stopped",
        "it sleeps; SIGSTOP of each",
        [f"{WATCHDOG} -k 'stuck or stopped or alone'"],
    ),
    7: ("a straggler", "half a second more a step", [f"{WATCHDOG} -k straggler"]),
    8: (
        "damaged checkpoint",
        "each file missing, cut, longer; a file too many; a link",
        [f"{CHECKPOINTS} -k 'damaged or many or tools'"],
    ),
    9: ("bit flip in a checkpoint", "100 bits over all files", [f"{CHECKPOINTS} -k flipped"]),
    10: (
        "disk full, read-only, quota",
        "a small tmpfs; an immutable folder; a limit of file sizes, of one process too",
        [
            f"{CHECKPOINTS} -k 'fails or unsaved'",
            "tests/run/test_run_folder.py -k full",
            f"{FAULTS} -k fault_10_",
        ],
    ),
    11: (
        "another mesh, another process count",
        "(8,1) to (4,2) to (1,8) devices; 2 to 1 to 4 processes",
        [f"{GUARD} -k another_mesh", f"{FAULTS} -k fault_11_", "tests/data/test_processes.py"],
    ),
    12: (
        "NaN, Inf, loss spike",
        "poisoned batches under halt, skip, rollback",
        [f"{GUARD} -k 'halt or skip or rollback or row or spike'"],
    ),
    13: ("silent corruption", "bits of one device's parameters", ["tests/core/test_replicas.py"]),
    14: (
        "data that fails",
        "files cut and overwritten under a run, its threads ended; a store that changed",
        [
            "tests/data/test_store.py -k 'changes_under or damage'",
            f"{GUARD} -k 'store or under_a_run'",
        ],
    ),
    15: (
        "bad config, data, tokenizer, workdir",
        "every mistake of law 9",
        ["tests/test_mistakes.py"],
    ),
    16: (
        "hostile files",
        "pickle, object arrays, giant headers, cut tokenizers, links and `..`, a canary secret",
        [
            (
                "tests/interop/test_hf.py tests/interop/test_llama2c.py -k 'refused or lies or "
                "inside or names or missing'"
            ),
            "tests/data/test_tokenizers.py -k 'damaged or altered or wrong'",
            "tests/data/test_sources.py -k objects",
            "tests/run/test_run_folder.py -k link",
            f"{CHECKPOINTS} -k many",
            f"{FAULTS} -k fault_16_",
        ],
    ),
    17: (
        "two runs in one workdir",
        "the same command twice; leases of dead and other hosts",
        ["tests/run/test_lock.py", f"{FAULTS} -k fault_17_"],
    ),
    18: (
        "clock, pipes, HOME, package folder",
        "days back and forth, stdout breaks, stderr is full, nothing writable",
        [f"{FAULTS} -k fault_18_"],
    ),
}


def run(tests_of_row: list[str]) -> tuple[str, float]:
    """Run a row's tests; return its verdict, with counts, and how many seconds it took."""
    began = time.monotonic()
    passed = 0
    failed = 0
    for tests in tests_of_row:
        command = f"{sys.executable} -m pytest -q -n 0 -m '' -p no:cacheprovider {tests}"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, encoding="utf-8")
        counts: dict[str, int] = {}
        for count, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1]):
            counts[kind] = int(count)
        passed += counts.get("passed", 0)
        failed += counts.get("failed", 0) + counts.get("error", 0)
        # Other exit codes than those of passed and failed tests: nothing was run.
        failed += done.returncode not in (0, 1)
        if failed:
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    secs = time.monotonic() - began
    if passed and not failed:
        return f"yes ({passed})", secs
    return f"**no** ({failed} of {passed + failed})", secs


def run_matrix(page: pathlib.Path, head: str, matrix: dict[int, tuple[str, str, list[str]]]) -> int:
    """Run the rows whose numbers are the command's arguments, or all, and write the page with their
    results; rows that weren't run stay as they are there, and what follows the table.

    Args:
      page: a Markdown file with the table.
      head: what it begins with.
      matrix: of each row what happens, how, and its tests.

    Returns the exit code.
    """
    numbers = [int(word) for word in sys.argv[1:]] or list(matrix)
    rows: dict[int, str] = {}
    after = ""
    if page.exists():
        content = page.read_text(encoding="utf-8")
        after = content.rpartition("|\n")[2]
        for line in content.splitlines():
            if re.match(r"\| \d", line):
                rows[int(line.split("|")[1])] = line
    for number in numbers:
        what, how, tests = matrix[number]
        verdict, secs = run(tests)
        rows[number] = f"| {number} | {what} | {how} | {verdict} | {secs:.0f} |"
        print(rows[number], flush=True)
        table = "| # | what | how | passed | seconds |\n|---|---|---|---|---|\n"
        body = "\n".join(rows[number] for number in sorted(rows))
        page.write_text(f"{head}\n\n{table}{body}\n{after}", encoding="utf-8")
    return int(any("**no**" in rows[number] for number in numbers))


HEAD = (
    f"# Faults\n\nWhat `python benchmarks/faults.py` found on {os.cpu_count()} cores. A row passes "
    "when all its tests do (their number in brackets). Hosts that share nothing are in "
    "[pod.md](pod.md); why a job doesn't go on without a process that it lost is in "
    "[scaling.md](scaling.md#a-lost-replica)."
)

if __name__ == "__main__":
    sys.exit(run_matrix(PAGE, HEAD, MATRIX))
