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

import sys

from tinylm import cli
from tinylm.core import text

PROOFS = ("compiler", "mesh", "resume", "hosts")


def main(name: str, arguments: list[str]) -> None:
    """Run the proof `name` and print its table; `arguments` are the flags as they were given."""
    from tinylm.data import open_data
    from tinylm.tools import prove as proofs
    from tinylm.tools.compiler_proof import prove_compiler

    config = cli.config()
    if name == "compiler":
        size = config.model.vocab_size or open_data(config.data, seed=config.seed).vocab_size
        proof = prove_compiler(config.resolve(size))
    elif name == "resume":
        proof = proofs.prove_resume(config, arguments)
    else:
        proof = (proofs.prove_mesh if name == "mesh" else proofs.prove_hosts)(config)
    print("\n".join(text.table(proof.rows)))
    print(f"{'proved' if proof.holds else 'NOT proved'}: {proof.claim}.")
    sys.exit(0 if proof.holds else 1)


def chosen(argv: list[str]) -> str:
    """Take the name of the proof out of `argv`; exit with 2 where there is none."""
    if len(argv) > 1 and argv[1] in PROOFS:
        return argv.pop(1)
    if not any(argument in ("--help", "-h") for argument in argv):
        print(f"error: say first what to prove: {', '.join(PROOFS)}.", file=sys.stderr)
        sys.exit(2)
    return ""


if __name__ == "__main__":
    cli.define_config()
    proof_name = chosen(sys.argv)
    given = sys.argv[1:]
    cli.run(lambda: main(proof_name, given), __doc__)
