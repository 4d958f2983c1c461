"""Bring a model in or out: Hugging Face folders both ways, and llama2.c's files.

python -m tinylm.convert --from_hf=DIR --workdir=runs/x
python -m tinylm.convert --workdir=runs/x --to_hf=DIR
python -m tinylm.convert --from_llama2c=stories15M.bin --tokenizer=tokenizer.bin --workdir=runs/s

An imported model is a run: generate and evaluate read it, and --config=finetune
--config.train.init_from=runs/x trains on from it.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.errors import UserError
from tinylm.core.storage import check_on_disk


def convert(flags: FlagValues) -> None:
    """Convert as the flags say, and print what came of it."""
    from tinylm.interop.models import check_new_folder, export_hf, import_hf, import_llama2c
    from tinylm.run.folder import RunFolder
    from tinylm.run.open_run import open_run
    from tinylm.train.imported_run import make_imported_run

    directions = [flags.from_hf, flags.to_hf, flags.from_llama2c]
    if sum(map(bool, directions)) != 1:
        raise UserError("one of --from_hf=DIR, --to_hf=DIR and --from_llama2c=FILE is required.")
    for name in "from_hf", "from_llama2c", "to_hf", "tokenizer":
        check_on_disk(f"--{name}", getattr(flags, name))
    folder = RunFolder(flags.workdir)
    if flags.to_hf:
        # Before the run's model is read, which may take long.
        check_new_folder(flags.to_hf)
        result = export_hf(open_run(flags.workdir, flags.step), flags.to_hf)
    elif folder.exists():
        raise UserError(f"--workdir={folder.path} holds a run already; name another.")
    elif flags.from_hf:
        imported = import_hf(flags.from_hf, flags.tokenizer)
        result = make_imported_run(folder, imported, flags.from_hf)._asdict()
    else:
        imported = import_llama2c(flags.from_llama2c, flags.tokenizer)
        result = make_imported_run(folder, imported, flags.from_llama2c)._asdict()
    if flags.json:
        print(json.dumps(result))
        return
    rows = []
    for name, value in result.items():
        if name == "left_out":
            rows += [("left out", line) for line in value]
        else:
            rows.append((name, str(value)))
    for row in rows:
        print(text.columns(row, (14, 0)))


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_string(
        "from_hf",
        "",
        "local folder of a Hugging Face model (config.json, safetensors, tokenizer)",
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "to_hf",
        "",
        "new folder to write the run's model into, for Hugging Face's transformers",
        flag_values=flags,
    )
    absl_flags.DEFINE_string("from_llama2c", "", "a legacy .bin of llama2.c", flag_values=flags)
    absl_flags.DEFINE_string(
        "tokenizer",
        "",
        "tokenizer file of the imported model: .json, .model or .bin",
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "step", "best", "checkpoint to export: best, latest or a step", flag_values=flags
    )
    cli.define_workdir(flags)
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, convert, define_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
