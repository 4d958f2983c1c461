"""A run made of a model that came from elsewhere, without training.

`generate` and `evaluate` read it like any other, and `train.init_from` goes on from it. Its config
is the default one with the model's settings, its tokenizer, and a short text to train on.
"""

import math
from typing import NamedTuple

from tinylm.core.settings import to_dict
from tinylm.data.config import DataConfig
from tinylm.interop.models import Imported, write_run
from tinylm.interop.tokenizer_files import data_tokenizer
from tinylm.interop.weights import unpadded_shapes
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config
from tinylm.train.start import versions

_LONGEST_ROW = 512  # tokens


class ImportedRun(NamedTuple):
    """What was imported; these are the keys of `convert --json`, too.

    Attributes:
      workdir: the run's folder.
      parameters: how many numbers the model holds.
      vocab_size: how many ids its tokenizer has.
      context: how many tokens it sees at most.
      left_out: a line for each kind of what was not read.
    """

    workdir: str
    parameters: int
    vocab_size: int
    context: int
    left_out: list[str]


def make_imported_run(folder: RunFolder, imported: Imported, origin: str) -> ImportedRun:
    """Write an imported model into the folder of a new run.

    Args:
      folder: of the run; it holds none yet.
      imported: the model.
      origin: where it came from, for the record.
    """
    model = imported.model
    tokenizer = data_tokenizer(imported.tokenizer, folder.tokenizer)
    seq_len = min(model.context, _LONGEST_ROW)
    data = DataConfig(tokenizer=tokenizer, seq_len=seq_len, batch_size=8)
    record = {
        "config": to_dict(Config(data=data, model=model)),
        "versions": versions(imported.mesh),
        "imported_from": origin,
        "start_id": imported.start_id,
        "end_ids": list(imported.end_ids),
    }
    write_run(folder, record, imported)
    sizes = [math.prod(shape) for shape in unpadded_shapes(model).values()]
    return ImportedRun(
        workdir=str(folder.path),
        parameters=sum(sizes),
        vocab_size=model.vocab_size,
        context=model.context,
        left_out=list(imported.left_out),
    )
