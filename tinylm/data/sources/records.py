"""Sources of records with fields, `jsonl:` and `parquet:`, and what they share with `hf:` and
`tfds:`.

A record is a text, or a pair of prompt and completion, by the field names in the config: a pair
where it has both fields. pyarrow is imported when such a file is read.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.optional import optional_module
from tinylm.data.sources.base import BYTE_ORDER_MARK, Document, FileSource, Source
from tinylm.data.sources.files import split_stream

# Names of splits that are held out, the best first.
VALID_NAMES = ("validation", "valid", "val", "dev", "test")
_BATCH_ROWS = 4096


class RecordSource(Source):
    """What all of them share: a record becomes a document."""

    def identity(self) -> list:
        c = self.config
        return [c.text_field, c.prompt_field, c.completion_field, super().identity()]

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """Return the text or pair of a record, or what is wrong with it.

        Args:
          record: its fields.
          where: its file and place, for messages.
        """
        config = self.config
        is_pair = config.prompt_field in record and config.completion_field in record
        if not is_pair and config.text_field not in record:
            return self._without_fields(record, where)

        prompt = Document("")
        text_field = config.text_field
        if is_pair:
            text_field = config.completion_field
            prompt_field = config.prompt_field
            prompt = _text_of(record[prompt_field], f"{where} field {prompt_field},")
        text = _text_of(record[text_field], f"{where} field {text_field},")
        for value in (prompt, text):
            if value.problem:
                return value
        if not text.text.strip():
            return Document("", problem=f"{where} is an empty document")
        return Document(text.text, prompt=prompt.text)

    def _without_fields(self, record: Mapping[str, Any], where: str) -> Document:
        """Return the problem of a record that has none of the fields of the config."""
        fields = ", ".join(map(str, record)) or "none"
        return Document(
            "",
            problem=f"{where} has no field {self.config.text_field}, only {fields}",
            remedy=(
                "set data.text_field, or data.prompt_field and data.completion_field, to what "
                "they are called"
            ),
        )


def _text_of(value: Any, where: str) -> Document:
    """Return the text of one field, or what is wrong with it."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Document("", problem=f"{where} is not UTF-8 (byte {error.start} of it)")
    elif value is None:
        return Document("", problem=f"{where} is an empty document (null)")
    elif not isinstance(value, str):
        problem = f"{where} holds {type(value).__name__} instead of text"
        return Document("", problem=problem, remedy="set data.text_field to another")
    elif has_lone_surrogate(value):
        problem = f"{where} holds half of a surrogate pair, which is not valid Unicode"
        return Document("", problem=problem)
    return Document(value.removeprefix(BYTE_ORDER_MARK))


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text can't be written in UTF-8."""
    if text.isascii():
        return False
    return any("\ud800" <= char <= "\udfff" for char in text)


class JsonlSource(RecordSource, FileSource):
    """One JSON object a line; blank lines are nothing."""

    endings = (".jsonl", ".ndjson", ".json")

    def read(self, path: str) -> Iterator[Document]:
        is_first = True
        for number, (offset, line) in enumerate(split_stream(path, b"\n"), 1):
            if not line.strip():
                continue
            if is_first:
                _refuse_one_value(path, line)
                is_first = False
            yield self._line(line, f"{path}, line {number},", offset)

    def _line(self, line: bytes, where: str, offset: int) -> Document:
        """Return the document of a line that begins at byte `offset` of its file."""
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
    needed = "is not one JSON object a line, which jsonl: reads; convert it: jq -c"
    if line == b"{":
        raise UserError(f"{path} holds JSON over several lines and {needed} . {path} > lines.jsonl")
    if not line.startswith(b"["):
        return
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # the array goes on in the next lines
        value = [{}]
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        raise UserError(f"{path} holds a JSON array and {needed} '.[]' {path} > lines.jsonl")


class ParquetSource(RecordSource, FileSource):
    """Rows of parquet files, some thousands at a time."""

    endings = (".parquet", ".parq", ".pq")

    def read(self, path: str) -> Iterator[Document]:
        pa = optional_module("pyarrow", "files")
        parquet = optional_module("pyarrow.parquet", "files")
        row = 0
        try:
            file = parquet.ParquetFile(path)
            columns = self._columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                # As bytes: pyarrow raises for a string that isn't UTF-8, without its place.
                fields = [
                    field.with_type(pa.large_binary()) if _is_text(field) else field
                    for field in batch.schema
                ]
                for record in batch.cast(pa.schema(fields)).to_pylist():
                    yield self.document(record, f"{path}, row {row},")
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path} can't be read as parquet after row {row}: {why}.") from error

    def _columns(self, names: list[str]) -> list[str]:
        """Return the columns to read: those that the config names, or all, which a message then
        lists.
        """
        wanted = {self.config.text_field, self.config.prompt_field, self.config.completion_field}
        return [name for name in names if name in wanted] or names


def _is_text(field: Any) -> bool:
    """Return whether a column of parquet holds strings."""
    return str(field.type).startswith(("string", "large_string", "dictionary<values=string"))
