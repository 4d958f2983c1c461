"""Sources of records with fields: jsonl, parquet, TFDS data sets, the Hugging Face hub, and the sums made here.

A record is a text, or a pair of prompt and completion, by the field names in the config. TFDS, pyarrow and
huggingface_hub are imported when such a source is read. Nothing goes to the network but `tfds:` for a data set that
isn't prepared yet, and `hf:`.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.optional import optional_module
from tinylm.data.config import split_spec
from tinylm.data.sources import Document, FileSource, Source, file_identity, hash_bytes, split_stream

DEFAULT_BELOW = 100
_HELD_OUT = 10  # one sum in so many is for validation
_VALID_NAMES = ("validation", "valid", "val", "dev", "test")


class RecordSource(Source):
    """What all of them share: a record becomes a document."""

    def identity(self) -> Any:
        c = self.config
        return [c.text_field, c.prompt_field, c.completion_field]

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """Return the text or pair of a record; raise UserError where the fields aren't there."""
        c = self.config
        names = [c.prompt_field, c.completion_field]
        if not all(name in record for name in names):
            names = [c.text_field]
        if not all(name in record for name in names):
            raise UserError(
                f"{where} has the fields {', '.join(record)}; set data.text_field, or data.prompt_field and "
                "data.completion_field, to what they are called."
            )
        values = [self._text(record[name], f"{where}, field {name},") for name in names]
        problem = next((value.problem for value in values if value.problem), "")
        if not problem and not values[-1].text.strip():
            problem = f"{where} is an empty document"
        if problem:
            return Document("", problem=problem)
        return Document(values[-1].text, prompt=values[0].text if len(values) == 2 else "")

    def _text(self, value: Any, where: str) -> Document:
        if isinstance(value, bytes):
            try:
                return Document(value.decode())
            except UnicodeDecodeError as error:
                return Document("", problem=f"{where} is not UTF-8 (byte {error.start} of it)")
        if value is None:
            return Document("", problem=f"{where} is an empty document (null)")
        if not isinstance(value, str):
            raise UserError(f"{where} holds {type(value).__name__} instead of text; set data.text_field to another.")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return Document("", problem=f"{where} holds half of a surrogate pair, which is no Unicode")
        return Document(value)


class JsonlSource(RecordSource, FileSource):
    """One JSON object a line; blank lines are nothing."""

    def identity(self) -> Any:
        return [RecordSource.identity(self), FileSource.identity(self)]

    def read(self, path: str) -> Iterator[Document]:
        for number, (offset, line) in enumerate(split_stream(path, b"\n"), 1):
            if line.strip():
                yield self._line(line, f"{path}, line {number},", offset)

    def _line(self, line: bytes, where: str, offset: int) -> Document:
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            return Document("", problem=f"{where} is not UTF-8 (byte {offset + error.start})")
        except (ValueError, RecursionError) as error:
            return Document("", problem=f"{where} at byte {offset}, is not JSON ({error})")
        if not isinstance(record, dict):
            return Document("", problem=f"{where} at byte {offset}, is not a JSON object")
        return self.document(record, where)


class ParquetSource(RecordSource, FileSource):
    """Rows of parquet files, some thousands at a time."""

    def identity(self) -> Any:
        return [RecordSource.identity(self), FileSource.identity(self)]

    def read(self, path: str) -> Iterator[Document]:
        pa, parquet = (optional_module(name, "files") for name in ("pyarrow", "pyarrow.parquet"))

        c = self.config
        row = 0
        try:
            file = parquet.ParquetFile(path)
            wanted = {c.text_field, c.prompt_field, c.completion_field}
            columns = [name for name in file.schema_arrow.names if name in wanted] or file.schema_arrow.names
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    yield self.document(record, f"{path}, row {row},")
                    row += 1
        except (pa.ArrowException, OSError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path} can't be read as parquet after row {row}: {why}.") from error


class HubSource(RecordSource):
    """The parquet files of a data set on the Hugging Face hub: ORG/NAME, or ORG/NAME/FOLDER for a part of it."""

    def __init__(self, spec: str, config: Any):
        super().__init__(spec, config)
        self._files: list[pathlib.Path] = []

    def _fetch(self) -> list[pathlib.Path]:
        if not self._files:
            self._files = _download(self.spec)
        return self._files

    @property
    def own_splits(self) -> bool:
        return any(_names_valid(path) for path in self._fetch())

    def identity(self) -> Any:
        # The cache's folder of a revision is named by its commit, and never changes.
        return [super().identity(), sorted([str(path), path.stat().st_size] for path in self._fetch())]

    def documents(self, split: str) -> Iterator[Document]:
        chosen = [p for p in self._fetch() if split == "all" or _names_valid(p) == (split == "valid")]
        for path in chosen:
            yield from ParquetSource(f"parquet:{path}", self.config).read(str(path))


def _names_valid(path: pathlib.Path) -> bool:
    return path.name.startswith(_VALID_NAMES) or path.parent.name in _VALID_NAMES


def _download(spec: str) -> list[pathlib.Path]:
    """Return the parquet files of a hub data set, from the local cache where they are there."""
    org, name, *folder = split_spec(spec)[1].split("/", 2) + [""] * 2
    local = "download its parquet files where there is a network and set data.source=parquet:DIR/*.parquet"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"data.source={spec} needs huggingface_hub: pip install 'tinylm[hf]'; or {local}.") from error
    pattern = f"{folder[0]}/*.parquet" if folder[0] else "*.parquet"
    try:
        place = huggingface_hub.snapshot_download(f"{org}/{name}", repo_type="dataset", allow_patterns=pattern)
    except Exception as error:  # the hub raises many kinds, and httpx's and requests' own
        raise UserError(f"data.source={spec} could not be fetched ({type(error).__name__}); {local}.") from error
    files = sorted((pathlib.Path(place) / folder[0]).rglob("*.parquet"))
    if not files:
        raise UserError(f"data.source={spec} has no parquet files; {local}.")
    return files


class TfdsSource(RecordSource):
    """A TFDS data set by name, or by the folder of a prepared version; array_record is read without TensorFlow."""

    def __init__(self, spec: str, config: Any):
        super().__init__(spec, config)
        self._opened: Any = None

    @property
    def _builder(self) -> Any:
        if self._opened is None:
            self._opened = _tfds_builder(self.spec, self.config.tfds_data_dir, self.config.tfds_manual_dir)
        return self._opened

    @property
    def own_splits(self) -> bool:
        return self._valid_split() is not None

    def _valid_split(self) -> str | None:
        return next((name for name in _VALID_NAMES if name in self._builder.info.splits), None)

    def identity(self) -> Any:
        folder = pathlib.Path(self._builder.data_dir)
        return [super().identity(), [file_identity(str(path)) for path in sorted(folder.iterdir())]]

    def documents(self, split: str) -> Iterator[Document]:
        name = self._valid_split() if split == "valid" else "train"
        known = list(self._builder.info.splits)
        if name not in known:
            raise UserError(f"data.source={self.spec} has no split train, only {', '.join(known)}.")
        for i, record in enumerate(self._builder.as_data_source(split=name)):
            yield self.document(record, f"{self.spec}, split {name}, record {i},")


def _tfds_builder(spec: str, data_dir: str, manual_dir: str) -> Any:
    """Return a builder whose data is prepared as array_record, preparing it where TensorFlow is there to do so."""
    name = split_spec(spec)[1]
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source={spec} needs TFDS: pip install 'tinylm[tfds]'.") from error
    folder = pathlib.Path(name).expanduser()
    if (folder / "dataset_info.json").exists():
        return tfds.builder_from_directory(folder)
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record", try_gcs=False)
        config = tfds.download.DownloadConfig(manual_dir=manual_dir or None, try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"data.source={spec} is no data set of TFDS, nor a folder with a prepared one.") from error
    except ImportError as error:
        raise UserError(
            f"data.source={spec} needs TensorFlow to be prepared (pip install 'tinylm[tfds]'); a data set already "
            "prepared as array_record needs none: set data.tfds_data_dir."
        ) from error
    except Exception as error:  # builders raise whatever their own downloads raise
        raise UserError(
            f"data.source={spec} could not be prepared by TFDS ({str(error).strip().splitlines()[0]}); "
            "without a network put its files in a folder and set data.tfds_manual_dir."
        ) from error
    return builder


class AdditionSource(Source):
    """All sums a+b of two numbers below N: prompt `a+b=`, completion `c`; one sum in ten is held out."""

    @property
    def own_splits(self) -> bool:
        return True

    def _below(self) -> int:
        return int(split_spec(self.spec)[1] or DEFAULT_BELOW)

    def identity(self) -> Any:
        return [self._below(), _HELD_OUT]

    def documents(self, split: str) -> Iterator[Document]:
        for a in range(self._below()):
            for b in range(self._below()):
                prompt = f"{a}+{b}="
                held_out = int(hash_bytes(prompt.encode()), 16) % _HELD_OUT == 0
                if held_out == (split == "valid"):
                    yield Document(str(a + b), prompt=prompt)
