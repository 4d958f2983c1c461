"""Write constraints.txt: what pip would install today for tests and development, on each Python
named.

    python .ci/lock.py python3.11 python3.12 python3.13

Installs nothing. A version that differs between Pythons gets a marker. Run .ci/run before you
commit the result.
"""

import collections
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# The versions that .ci/run passed with, for each Python. Written by .ci/lock.py; use "
    "with `pip install -c`.\n"
)


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """Return the Python's version and pip's choice of {package: version} for it."""
    command = [
        python,
        "-m",
        "pip",
        "-qq",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
    ]
    run = subprocess.run([*command, ".[test,dev]"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    report = json.loads(run.stdout)
    found = [item["metadata"] for item in report["install"]]
    versions = {
        m["name"].lower().replace("_", "-"): m["version"] for m in found if m["name"] != "tinylm"
    }
    return report["environment"]["python_version"], versions


def main() -> None:
    """Resolve for each Python of the command line and write the file."""
    pythons = [resolve(python) for python in sys.argv[1:]]
    if not pythons:
        sys.exit("usage: python .ci/lock.py PYTHON [PYTHON ...]")
    users = collections.defaultdict(list)
    for python, versions in pythons:
        for name, version in versions.items():
            users[name, version].append(python)
    lines = []
    for (name, version), on in sorted(users.items()):
        marker = " or ".join(f'python_version == "{python}"' for python in on)
        lines.append(f"{name}=={version}" + (f" ; {marker}" if len(on) < len(pythons) else ""))
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
