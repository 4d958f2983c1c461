"""Bring a model in or out: Hugging Face folders both ways, and llama2.c's files.

python -m tinylm.convert --from_hf=DIR --workdir=runs/x
python -m tinylm.convert --workdir=runs/x --to_hf=DIR
python -m tinylm.convert --from_llama2c=stories15M.bin --tokenizer=tokenizer.bin --workdir=runs/s

An imported model is a run: generate and evaluate read it, and --config=finetune
--config.train.init_from=runs/x trains on from it.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.errors import UserError


def convert(flags: FlagValues) -> None:
    """Convert as the flags say."""
    from tinylm.run.folder import RunFolder

    if sum(map(bool, (flags.from_hf, flags.to_hf, flags.from_llama2c))) != 1:
        raise UserError("one of --from_hf=DIR, --to_hf=DIR and --from_llama2c=FILE is required.")
    folder = RunFolder(flags.workdir)
    if flags.to_hf:
        from tinylm.interop.models import export_hf
        from tinylm.run.open_run import open_run

        result = export_hf(open_run(flags.workdir, flags.step), flags.to_hf)
    elif folder.exists():
        raise UserError(f"--workdir={folder.path} holds a run already; name another.")
    else:
        result = bring_in(folder, flags)
    if flags.json:
        print(json.dumps(result))
        return
    left_out = result.pop("left_out", [])
    rows = [*result.items(), *(("left out", line) for line in left_out)]
    for name, value in rows:
        print(text.columns((name, str(value)), (14, 0)))


def bring_in(folder: Any, flags: FlagValues) -> dict[str, Any]:
    """Import the model that the flags name into a run's folder."""
    from tinylm.config import Config, DataConfig
    from tinylm.core.settings import to_dict
    from tinylm.interop.models import import_hf, import_llama2c, write_run
    from tinylm.interop.tokenizer_files import data_tokenizer
    from tinylm.interop.weights import unpadded_shapes
    from tinylm.train.start import versions

    source = flags.from_hf or flags.from_llama2c
    imported = (import_hf if flags.from_hf else import_llama2c)(source, flags.tokenizer)
    model = imported.model
    tokenizer = data_tokenizer(imported.tokenizer, folder.tokenizer)
    config = Config(
        data=DataConfig(tokenizer=tokenizer, seq_len=min(model.context, 512), batch_size=8),
        model=model,
    )
    record = {
        "config": to_dict(config),
        "versions": versions(imported.mesh),
        "imported_from": source,
        "start_id": imported.start_id,
        "end_ids": list(imported.end_ids),
    }
    write_run(folder, record, imported)
    count = sum(map(math.prod, unpadded_shapes(model).values()))
    return {
        "workdir": str(folder.path),
        "parameters": count,
        "vocab_size": model.vocab_size,
        "context": model.context,
        "left_out": list(imported.left_out),
    }


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
