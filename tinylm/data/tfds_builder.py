"""tinylm's own TFDS builder: any source of documents becomes a versioned data set in array_record
files.

Such a data set keeps the order of its source, is read without TensorFlow by this and by other
programs, and gives the same tokens as the source itself (`data.source=tfds:DIR/NAME/VERSION`).
"""

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from tinylm.core.errors import StorageError, UserError
from tinylm.core.optional import optional_module
from tinylm.core.storage import check_on_disk
from tinylm.data.config import DataConfig, parse_mixture
from tinylm.data.sources import make_source
from tinylm.data.sources.base import Document, Source, good_documents


def write_tfds(
    config: DataConfig, data_dir: str, name: str, version: str = "1.0.0"
) -> pathlib.Path:
    """Write the source of `config` as a TFDS data set below `data_dir`; return the folder of the
    version.
    """
    if len(parse_mixture(config.source)) > 1 or config.source.startswith("tokens:"):
        raise UserError(
            f"data.source={config.source} must be one source of text to become a TFDS data set."
        )
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(
            f"--tfds_name={name} must be small letters, digits and _, as names of TFDS are."
        )
    check_on_disk("--to_tfds", data_dir)
    source = make_source(config.source, config)
    folder = pathlib.Path(data_dir).expanduser() / name / version
    if folder.exists():  # TFDS would leave it as it is
        raise UserError(
            f"{folder} is there already; remove it, or set --to_tfds or --tfds_name to another."
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _builder_class(source, name, version)(
                data_dir=data_dir, file_format="array_record"
            ).download_and_prepare()
    except (OSError, RuntimeError) as error:  # the writer of array_record raises the second
        why = str(error).partition("\n")[0]
        raise StorageError(f"{folder} can't be written: {why}.") from error
    return folder


def _documents(source: Source, split: str) -> Iterator[Document]:
    return good_documents(source.documents(split), source.config.on_bad_text)


def _builder_class(source: Source, name: str, version: str) -> Any:
    """Return a builder class for one source; TFDS wants name and version as attributes of a
    class.
    """
    tfds = optional_module("tensorflow_datasets", "tfds")
    splits = {"train": "train", "validation": "valid"} if source.own_splits else {"train": "all"}
    has_prompts = False
    is_empty = True
    for split in splits.values():
        for document in _documents(source, split):
            is_empty = False
            has_prompts = has_prompts or bool(document.prompt)
    if is_empty:
        raise UserError(f"{source.setting} holds no text.")
    c = source.config
    fields = (c.prompt_field, c.completion_field) if has_prompts else (c.text_field,)

    def examples(split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for number, document in enumerate(_documents(source, split)):
            record = {fields[-1]: document.text}
            if has_prompts:
                record[fields[0]] = document.prompt
            yield number, record

    def info(builder: Any) -> Any:
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
        return tfds.core.DatasetInfo(
            builder=builder,
            description=f"{source.spec}, written by tinylm",
            features=features,
            disable_shuffling=True,
        )

    members = {
        "name": name,
        "VERSION": tfds.core.Version(version),
        "_info": info,
        "_split_generators": lambda builder, manager: {
            name: examples(split) for name, split in splits.items()
        },
        "_generate_examples": lambda builder, split: examples(split),
    }
    base = tfds.core.GeneratorBasedBuilder
    members |= {"__module__": __name__, "__doc__": __doc__}
    return type(base)(name, (base,), members, skip_registration=True)
