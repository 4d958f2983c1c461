"""Prove on this machine what tinylm promises, for your own config; prints a table, exits 0 or 1.

python -m tinylm.prove compiler --config=tales
        the compiled step against its operations one by one
python -m tinylm.prove mesh --config=tales --cpu_devices=8
        one step on every mesh shape: loss, gradient, parameters
python -m tinylm.prove resume --config=tales
        train, kill, resume twice, here and on another mesh
python -m tinylm.prove hosts --config=tales --cpu_devices=8
        the same batches for 1, 2, 4, ... processes

`compiler` reads no data where model.vocab_size is set; a config too large to be run in float64
within seconds is scaled down, and it says how. The others read the config's data.
"""

import functools
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text

PROOFS = ("compiler", "mesh", "resume", "hosts")


def prove(name: str, arguments: list[str], flags: FlagValues) -> int:
    """Run the proof `name` and print its table; `arguments` are the flags as they were given."""
    from tinylm.data import open_data
    from tinylm.tools import prove as proofs
    from tinylm.tools.compiler_proof import prove_compiler

    config = cli.config(flags)
    if name == "compiler":
        size = config.model.vocab_size or open_data(config.data, seed=config.seed).vocab_size
        proof = prove_compiler(config.resolve(size))
    elif name == "mesh":
        proof = proofs.prove_mesh(config)
    elif name == "resume":
        proof = proofs.prove_resume(config, arguments)
    else:
        proof = proofs.prove_hosts(config)
    print("\n".join(text.table(proof.rows)))
    print(f"{'proved' if proof.holds else 'NOT proved'}: {proof.claim}.")
    return 0 if proof.holds else 1


def command(name: str, arguments: list[str]) -> cli.Command:
    """Return the command that runs one proof."""
    return cli.Command(__doc__, functools.partial(prove, name, arguments), has_config=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = ""
    if arguments and arguments[0] in PROOFS:
        name = arguments.pop(0)
    elif not cli.asks_for_help(arguments):
        print(f"error: say first what to prove: {', '.join(PROOFS)}.", file=sys.stderr)
        return 2
    return cli.run(command(name, arguments), arguments, is_guest=argv is not None)


if __name__ == "__main__":
    sys.exit(main())
