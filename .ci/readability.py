"""Print how dense the code is: syntax nodes a line, for each room of the package and for all of it.

python .ci/readability.py            a table
python .ci/readability.py --worst 10 also the ten densest functions of ten lines or more

A node is a statement or an expression. Lines that hold only a comment, a docstring or nothing are
not counted. CONTRIBUTING.md has the limits; with --check the exit code is 1 where one is exceeded.
"""

import argparse
import ast
import collections
import pathlib
import sys
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "tinylm"
LIMITS = {"model": 5.5, "train": 5.5, "all": 6.0}  # nodes a line
SHORTEST = 10  # lines of a function worth naming


class Count(NamedTuple):
    """What was counted in some files."""

    files: int
    code_lines: int
    comment_lines: int
    nodes: int

    def plus(self, other: "Count") -> "Count":
        """Return the sums."""
        return Count(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def density(self) -> float:
        """Nodes a line."""
        return self.nodes / max(self.code_lines, 1)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings cover."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def count_nodes(tree: ast.AST) -> int:
    """Return the number of statements and expressions."""
    return sum(isinstance(node, ast.stmt | ast.expr) for node in ast.walk(tree))


def read(path: pathlib.Path) -> tuple[Count, list[tuple[float, str]]]:
    """Return the counts of a file, and its functions as (nodes a line, place)."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    documented = docstring_lines(tree)
    code: set[int] = set()
    num_comments = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or number in documented:
            continue
        if line.lstrip().startswith("#"):
            num_comments += 1
        else:
            code.add(number)
    functions = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            num_lines = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            if num_lines >= SHORTEST:
                place = f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}"
                functions.append((count_nodes(node) / num_lines, place))
    return Count(1, len(code), num_comments, count_nodes(tree)), functions


def main() -> None:
    """Count, print, and compare with the limits if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worst", type=int, default=0, help="functions to name")
    parser.add_argument("--check", action="store_true", help="fail where a limit is exceeded")
    options = parser.parse_args()

    rooms: dict[str, Count] = collections.defaultdict(lambda: Count(0, 0, 0, 0))
    functions: list[tuple[float, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        count, in_file = read(path)
        parts = path.relative_to(PACKAGE).parts
        room = parts[0] if len(parts) > 1 else "commands"
        rooms[room] = rooms[room].plus(count)
        rooms["all"] = rooms["all"].plus(count)
        functions += in_file

    print(f"{'room':<12}{'files':>8}{'lines':>8}{'comments':>10}{'nodes a line':>14}")
    exceeded = []
    for room in sorted(rooms, key=lambda name: (name == "all", name)):
        count = rooms[room]
        line = f"{room:<12}{count.files:>8}{count.code_lines:>8}{count.comment_lines:>10}"
        print(f"{line}{count.density:>14.2f}")
        if count.density > LIMITS.get(room, float("inf")):
            exceeded.append(f"{room} has {count.density:.2f} nodes a line, above {LIMITS[room]}")
    for density, place in sorted(functions, reverse=True)[: options.worst]:
        print(f"{density:5.1f}  {place}")
    if options.check and exceeded:
        sys.exit("; ".join(exceeded))


if __name__ == "__main__":
    main()
