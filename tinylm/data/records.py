"""Sources of records with fields: jsonl, parquet, TFDS data sets, the Hugging Face hub, and the
sums made here.

A record is a text, or a pair of prompt and completion, by the field names in the config. TFDS,
pyarrow and huggingface_hub are imported when such a source is read. Nothing goes to the network but
`tfds:` for a data set that isn't prepared yet, and `hf:`.
"""

import contextlib
import functools
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.optional import optional_module
from tinylm.data.files import split_stream
from tinylm.data.sources import BYTE_ORDER_MARK, Document, FileSource, Source, hash_bytes

DEFAULT_BELOW = 100
_HELD_OUT = 10  # one sum in so many is for validation
_VALID_NAMES = ("validation", "valid", "val", "dev", "test")


class RecordSource(Source):
    """What all of them share: a record becomes a document."""

    def identity(self) -> Any:
        c = self.config
        return [c.text_field, c.prompt_field, c.completion_field, super().identity()]

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """Return the text or pair of a record, or what is wrong with it."""
        c = self.config
        names = [c.prompt_field, c.completion_field]
        if not all(name in record for name in names):
            names = [c.text_field]
        if not all(name in record for name in names):
            fields = ", ".join(map(str, record))
            keys = (
                "set data.text_field, or data.prompt_field and data.completion_field, to what "
                "they are called"
            )
            problem = f"{where} has no field {c.text_field}, only {fields or 'none'}"
            return Document("", problem=problem, remedy=keys)
        values = [self._text(record[name], f"{where} field {name},") for name in names]
        for value in values:
            if value.problem:
                return value
        if not values[-1].text.strip():
            return Document("", problem=f"{where} is an empty document")
        return Document(values[-1].text, prompt=values[0].text if len(values) == 2 else "")

    def _text(self, value: Any, where: str) -> Document:
        if isinstance(value, bytes):
            try:
                return Document(value.decode().removeprefix(BYTE_ORDER_MARK))
            except UnicodeDecodeError as error:
                return Document("", problem=f"{where} is not UTF-8 (byte {error.start} of it)")
        if value is None:
            return Document("", problem=f"{where} is an empty document (null)")
        if not isinstance(value, str):
            kind = type(value).__name__
            problem = f"{where} holds {kind} instead of text"
            return Document("", problem=problem, remedy="set data.text_field to another")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return Document(
                "", problem=f"{where} holds half of a surrogate pair, which is no Unicode"
            )
        return Document(value.removeprefix(BYTE_ORDER_MARK))


class JsonlSource(RecordSource, FileSource):
    """One JSON object a line; blank lines are nothing."""

    endings = (".jsonl", ".ndjson", ".json")

    def read(self, path: str) -> Iterator[Document]:
        is_first = True
        for number, (offset, line) in enumerate(split_stream(path, b"\n"), 1):
            if line.strip():
                if is_first:
                    _refuse_one_value(path, line)
                    is_first = False
                yield self._line(line, f"{path}, line {number},", offset)

    def _line(self, line: bytes, where: str, offset: int) -> Document:
        try:
            record = parsed(line)
        except UnicodeDecodeError as error:
            return Document("", problem=f"{where} is not UTF-8 (byte {offset + error.start})")
        except (ValueError, RecursionError) as error:
            return Document("", problem=f"{where} at byte {offset}, is not JSON ({error})")
        if not isinstance(record, dict):
            return Document("", problem=f"{where} at byte {offset}, is not a JSON object")
        return self.document(record, where)


def parsed(line: bytes) -> Any:
    """Return the value of a line of JSON; an integer beyond Python's limit of 4,300 digits becomes
    a float.
    """
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return json.loads(line, parse_int=float)


def _refuse_one_value(path: str, first_line: bytes) -> None:
    """Raise UserError where the first line of a file shows that it is one JSON value, not one
    object a line.
    """
    line = first_line.removeprefix(BYTE_ORDER_MARK.encode()).strip()
    needed = (
        f"is not one JSON object a line, which jsonl: reads; convert it: jq -c {{}} {path} > "
        "lines.jsonl"
    )
    if line == b"{":
        raise UserError(f"{path} holds JSON over several lines and {needed.format('.')}.")
    if line.startswith(b"["):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # the array goes on in the next lines
            value = [{}]
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            raise UserError(f"{path} holds a JSON array and {needed.format(repr('.[]'))}.")


class ParquetSource(RecordSource, FileSource):
    """Rows of parquet files, some thousands at a time."""

    endings = (".parquet", ".parq", ".pq")

    def read(self, path: str) -> Iterator[Document]:
        pa, parquet = (optional_module(name, "files") for name in ("pyarrow", "pyarrow.parquet"))

        def is_text(field: Any) -> bool:
            return str(field.type).startswith(
                ("string", "large_string", "dictionary<values=string")
            )

        c = self.config
        row = 0
        try:
            file = parquet.ParquetFile(path)
            wanted = {c.text_field, c.prompt_field, c.completion_field}
            columns = [
                name for name in file.schema_arrow.names if name in wanted
            ] or file.schema_arrow.names
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                # As bytes: pyarrow raises for a string that is no UTF-8.
                fields = [
                    field.with_type(pa.large_binary()) if is_text(field) else field
                    for field in batch.schema
                ]
                for record in batch.cast(pa.schema(fields)).to_pylist():
                    yield self.document(record, f"{path}, row {row},")
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path} can't be read as parquet after row {row}: {why}.") from error


class HubSource(RecordSource):
    """The parquet files of a data set on the Hugging Face hub: ORG/NAME, ORG/NAME@REVISION,
    ORG/NAME/FOLDER of it.

    It is fetched where a store is made, and only then: other processes and later runs know the
    store by this name.
    """

    @functools.cached_property
    def _files(self) -> list[pathlib.Path]:
        """The files, from the local cache where they are there."""
        org, name, *rest = self.argument.split("/", 2) + [""] * 2
        name, _, revision = name.partition("@")
        local = (
            "download its parquet files where there is a network and set "
            "data.source=parquet:DIR/*.parquet"
        )
        huggingface_hub = optional_module("huggingface_hub", "hf")
        pattern = f"{rest[0]}/*.parquet" if rest[0] else "*.parquet"
        try:
            place = huggingface_hub.snapshot_download(
                f"{org}/{name}",
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=pattern,
            )
        except Exception as error:  # the hub raises many kinds, and httpx's and requests' own
            raise UserError(
                f"{self.setting} could not be fetched ({type(error).__name__}); {local}."
            ) from error
        files = sorted((pathlib.Path(place) / rest[0]).rglob("*.parquet"))
        if not files:
            raise UserError(f"{self.setting} has no parquet files; {local}.")
        return files

    def identity(self) -> Any:
        return [super().identity(), self.argument]

    @functools.cached_property
    def own_splits(self) -> bool:
        return any(held_out_split(path) for path in self._files)

    def read_split(self, split: str) -> Iterator[Document]:
        names = [held_out_split(path) for path in self._files]
        valid = next((name for name in _VALID_NAMES if name in names), "")
        wanted = valid if split == "valid" else ""
        for path in [path for path, name in zip(self._files, names, strict=True) if name == wanted]:
            yield from ParquetSource(f"parquet:{path}", self.config).read(str(path))


def held_out_split(path: pathlib.Path) -> str:
    """Return which split other than train a file belongs to, by its name or its folder's; "" for
    none.
    """
    name = re.match(rf"({'|'.join(_VALID_NAMES)})(?![a-z])", path.name)
    return name[1] if name else path.parent.name if path.parent.name in _VALID_NAMES else ""


class TfdsSource(RecordSource):
    """A TFDS data set by name, or by the folder of a prepared version; array_record is read without
    TensorFlow.

    One by name is prepared where a store is made, and only then, as `hf:` is fetched.
    """

    def _folder(self) -> pathlib.Path | None:
        folder = pathlib.Path(self.argument).expanduser()
        return folder if (folder / "dataset_info.json").exists() else None

    @functools.cached_property
    def _builder(self) -> Any:
        """A builder whose data is prepared as array_record, prepared here where TensorFlow is there
        to do so.
        """
        tfds = optional_module("tensorflow_datasets", "tfds")
        c = self.config
        try:
            if folder := self._folder():
                return tfds.builder_from_directory(folder)
            builder = tfds.builder(
                self.argument,
                data_dir=c.tfds_data_dir or None,
                file_format="array_record",
                try_gcs=False,
            )
            config = tfds.download.DownloadConfig(
                manual_dir=c.tfds_manual_dir or None, try_download_gcs=False
            )
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=config)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"{self.setting} is no data set of TFDS, nor a folder with a prepared one."
            ) from error
        except ImportError as error:
            raise UserError(
                f"{self.setting} needs TensorFlow to be prepared (pip install "
                "'tinylm[tfds]'); a data set already "
                "prepared as array_record needs none: set data.tfds_data_dir."
            ) from error
        except Exception as error:  # builders raise whatever their own downloads raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.setting} could not be prepared by TFDS ({why}); "
                "without a network put its files in a folder and set data.tfds_manual_dir."
            ) from error
        return builder

    @functools.cached_property
    def own_splits(self) -> bool:
        return self._valid_split() is not None

    def _valid_split(self) -> str | None:
        return next((name for name in _VALID_NAMES if name in self._builder.info.splits), None)

    def identity(self) -> Any:
        c = self.config
        by_name = [] if self._folder() else [self.argument, c.tfds_data_dir, c.tfds_manual_dir]
        return [super().identity(), by_name]

    @property
    def content_files(self) -> list[str]:
        folder = self._folder()
        return [str(path) for path in sorted(folder.iterdir())] if folder else []

    def read_split(self, split: str) -> Iterator[Document]:
        name = self._valid_split() if split == "valid" else "train"
        known = list(self._builder.info.splits)
        if name not in known:
            raise UserError(f"{self.setting} has no split train, only {', '.join(known)}.")
        for i, record in enumerate(self._builder.as_data_source(split=name)):
            yield self.document(record, f"{self.spec}, split {name}, record {i},")


class AdditionSource(Source):
    """All sums a+b of two numbers below N: prompt `a+b=`, completion `c`; one sum in ten is held
    out.
    """

    own_splits = True

    def _below(self) -> int:
        return int(self.argument or DEFAULT_BELOW)

    def identity(self) -> Any:
        return [super().identity(), self._below(), _HELD_OUT]

    def read_split(self, split: str) -> Iterator[Document]:
        for a in range(self._below()):
            for b in range(self._below()):
                prompt = f"{a}+{b}="
                held_out = int(hash_bytes(prompt.encode()), 16) % _HELD_OUT == 0
                if held_out == (split == "valid"):
                    yield Document(str(a + b), prompt=prompt)
