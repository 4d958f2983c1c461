"""The console script `tinylm`, which is `python -m tinylm` as well: commands by their names.

`tinylm train --config=tales` is `python -m tinylm.main --config=tales`; the other commands have the
names of their modules. Without a name, the commands are listed.
"""

import ast
import importlib
import pathlib
import sys

from tinylm.core.settings import nearest

# The name of each command, and its module.
COMMANDS = {
    "train": "main",
    "generate": "generate",
    "evaluate": "evaluate",
    "report": "report",
    "sweep": "sweep",
    "show": "show",
    "plan": "plan",
    "bench": "bench",
    "prove": "prove",
    "prepare": "prepare",
    "convert": "convert",
}


def main() -> int:
    """Run the command that the first argument names; return its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(listing())
        return 0
    if name not in COMMANDS:
        hint = nearest(name, list(COMMANDS)) or "."
        print(
            f"error: {name} is not a command; give one of {', '.join(COMMANDS)}{hint}",
            file=sys.stderr,
        )
        return 2
    del sys.argv[1]
    return importlib.import_module(f"tinylm.{COMMANDS[name]}").main()


def listing() -> str:
    """Return a line for each command, the first of its module, without importing any."""
    lines = ["tinylm COMMAND --flags; tinylm COMMAND --help lists the flags.", ""]
    for name, module in COMMANDS.items():
        source = pathlib.Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<10}{doc.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
