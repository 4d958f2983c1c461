"""Prepare the tokens of a config ahead of training, and look at what training will read.

python -m tinylm.prepare --config=configs/shakespeare_char.py
python -m tinylm.prepare --config=tales --print_batches=3
python -m tinylm.prepare --config=tales --to_tfds=DIR --tfds_name=my_tales
python -m tinylm.prepare --clean
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.distributed import is_main
from tinylm.core.log import say
from tinylm.core.storage import in_bucket
from tinylm.data import stores
from tinylm.data.stores import FoundStore


def prepare(flags: FlagValues) -> None:
    """Prepare as the flags say, and print what there is."""
    from tinylm.data import open_data
    from tinylm.data.summary import batch_hashes, summary
    from tinylm.data.tfds_builder import write_tfds
    from tinylm.train.init_from import take_over

    if flags.clean:
        clean(flags)
        return
    config = cli.config(flags)
    if flags.to_tfds:
        folder = str(write_tfds(config.data, flags.to_tfds, flags.tfds_name))
        print(json.dumps({"folder": folder}) if flags.json else folder)
        return
    _, tokenizer = take_over(config)
    data = open_data(config.data, seed=config.seed, is_writer=is_main(), tokenizer=tokenizer)
    if flags.verify:
        for store in data.every_store:
            store.verify()
    result = summary(data)
    result["batches"] = batch_hashes(data, config.data.batch_size, flags.print_batches)
    if is_main():
        print(json.dumps(result) if flags.json else text_of(result))


def clean(flags: FlagValues) -> None:
    """Remove the token stores that no run refers to, and print which are left."""
    from tinylm.config import Config
    from tinylm.run.store_users import is_run_here, refers_to

    config = flags.config or Config()
    folder = stores.store_folder(config.data)
    if in_bucket(config.data.store_dir):
        say(
            f"stores in {config.data.store_dir} stay, since runs on other machines may read them; "
            "remove there by hand what no run needs"
        )
    cleaned = stores.clean(folder, refers_to, is_run_here)
    if flags.json:
        result = {
            "removed": [row_of(store) for store in cleaned.removed],
            "kept": [row_of(store) for store in cleaned.kept],
            "freed_bytes": cleaned.freed_bytes,
        }
        print(json.dumps(result))
        return
    for store in cleaned.kept:
        users = ", ".join(store.runs) or "a process that makes it"
        print(line_of("kept", store, f"used by {users}"))
    for store in cleaned.removed:
        print(line_of("removed", store, "no run refers to it"))
    print(f"{cleaned.freed_bytes / 1e6:,.1f} MB freed in {folder}")


def row_of(store: FoundStore) -> dict[str, Any]:
    """Return a store as --json has it."""
    return {
        "store": store.folder.name,
        "source": store.source,
        "bytes": store.num_bytes,
        "runs": store.runs,
    }


def line_of(fate: str, store: FoundStore, why: str) -> str:
    """Return the line on a store for people."""
    megabytes = store.num_bytes / 1e6
    return f"{fate:<7}  {store.folder.name}  {megabytes:10,.1f} MB  {store.source}: {why}"


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
