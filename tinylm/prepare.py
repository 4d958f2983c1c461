"""Prepare the tokens of a config ahead of training, and look at what training will read.

python -m tinylm.prepare --config=configs/shakespeare_char.py
python -m tinylm.prepare --config=tales --print_batches=3
python -m tinylm.prepare --config=tales --to_tfds=DIR --tfds_name=my_tales
python -m tinylm.prepare --clean
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.distributed import is_main
from tinylm.core.errors import UserError


def prepare(flags: FlagValues) -> None:
    """Prepare as the flags say."""
    from tinylm.data import open_data
    from tinylm.train.init_from import take_over

    if flags.clean:
        clean(flags)
        return
    config = cli.config(flags)
    if flags.to_tfds:
        from tinylm.data.tfds_builder import write_tfds

        folder = str(write_tfds(config.data, flags.to_tfds, flags.tfds_name))
        print(json.dumps({"folder": folder}) if flags.json else folder)
        return
    data = open_data(
        config.data, seed=config.seed, is_writer=is_main(), tokenizer=take_over(config)[1]
    )
    if flags.verify:
        for one in data.every_store:
            one.verify()
    result = summary(data) | {
        "batches": batch_hashes(data, config.data.batch_size, flags.print_batches)
    }
    if is_main():
        print(json.dumps(result) if flags.json else text_of(result))


def clean(flags: FlagValues) -> None:
    """Show all token stores, and remove those that no run refers to."""
    from tinylm.config import Config
    from tinylm.data import stores
    from tinylm.run.folder import RunFolder

    def refers(workdir: str, name: str) -> bool:
        try:
            folder = RunFolder(workdir)
            return folder.exists() and name in folder.read_config().get("token_stores", {})
        except (UserError, OSError):
            # A run that can't be read, as one in a bucket out of reach, may still need its store.
            return True

    def exists(workdir: str) -> bool:
        try:
            return RunFolder(workdir).exists()
        except (UserError, OSError):
            return False

    folder = stores.store_folder((flags.config or Config()).data)
    removed: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for store in stores.find_stores(folder, refers, exists):
        is_removed = not store.runs and stores.remove(store.folder)
        row: dict[str, Any] = {
            "store": store.folder.name,
            "source": store.source,
            "bytes": store.num_bytes,
            "runs": store.runs,
        }
        (removed if is_removed else kept).append(row)
    freed = stores.remove_leftovers(folder) + sum(row["bytes"] for row in removed)
    if flags.json:
        print(json.dumps({"removed": removed, "kept": kept, "freed_bytes": freed}))
        return
    for row in kept:
        users = ", ".join(row["runs"]) or "a process that makes it"
        print(
            f"kept     {row['store']}  {row['bytes'] / 1e6:10,.1f} MB  {row['source']}: used by "
            f"{users}"
        )
    for row in removed:
        print(
            f"removed  {row['store']}  {row['bytes'] / 1e6:10,.1f} MB  {row['source']}: no run "
            "refers to it"
        )
    print(f"{freed / 1e6:,.1f} MB freed in {folder}")


def summary(data: Any) -> dict[str, Any]:
    """Return counts over all stores of a run, and where they are."""
    from tinylm.data.prepare import SKIPPED

    stores = data.every_store
    manifests = [store.manifest for store in stores]
    return {
        "tokens": sum(manifest.tokens for manifest in manifests),
        "documents": sum(manifest.documents for manifest in manifests),
        "skipped": sum(manifest.skipped.count for manifest in manifests),
        "unknown_tokens": sum(manifest.unknown for manifest in manifests),
        "skipped_lists": [
            str(store.folder / SKIPPED) for store in stores if store.manifest.skipped.count
        ],
        "held_out": [manifest.held_out for manifest in manifests if manifest.held_out],
        "vocab_size": data.vocab_size,
        "end_of_text": data.tokenizer.describe_end(),
        "rows": len(data.train),
        "valid_rows": len(data.valid) if data.valid else 0,
        "split_documents": data.split_documents,
        "tokenizer": data.tokenizer.fingerprint,
        "stores": [str(store.folder) for store in stores],
    }


def batch_hashes(data: Any, batch_size: int, count: int) -> list[str]:
    """Return the hash of each of the first global batches; it is the same on any number of
    hosts.
    """
    import numpy as np

    hashes = []
    for batch in range(count):
        examples = data.train.read(batch * batch_size + np.arange(batch_size))
        digest = hashlib.sha256()
        for name in sorted(examples):
            digest.update(np.ascontiguousarray(examples[name]).tobytes())
        hashes.append(digest.hexdigest()[:32])
    return hashes


def text_of(result: dict[str, Any]) -> str:
    """Return a line for each key, and for each batch and store."""
    lines = []
    for name, value in result.items():
        values = value if isinstance(value, list) else [value]
        for number, one in enumerate(values):
            shown = f"{one:,}" if isinstance(one, int) else str(one)
            lines.append(text.columns((name if number == 0 else "", shown), (16, 0)))
    return "\n".join(lines)


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_integer(
        "print_batches",
        0,
        "print the hash of this many global batches",
        lower_bound=0,
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "clean",
        False,
        "show all token stores and remove those that no run refers to",
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "verify", False, "compare every shard with its checksum", flag_values=flags
    )
    absl_flags.DEFINE_string(
        "to_tfds",
        "",
        "write the source as a TFDS data set below this folder instead",
        flag_values=flags,
    )
    absl_flags.DEFINE_string("tfds_name", "tinylm_text", "its name", flag_values=flags)
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, prepare, define_flags, has_config=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
