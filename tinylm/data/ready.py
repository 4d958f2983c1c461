"""Ready ids: `tokens:` reads .bin files of uint16 or uint32, as nanoGPT and llama2.c write them, where they lie.

They are scanned once, for ids that the tokenizer doesn't have and for the ends of documents; the store then holds a
manifest and those ends, and points at the files. Which of the two types a file has shows in it: in uint32, the upper
half of each id is as small as the vocabulary says.
"""

import pathlib
from typing import Any

import numpy as np

from tinylm.core.errors import UserError
from tinylm.data.config import split_spec
from tinylm.data.preparing import cut_documents, describe_tokenizer
from tinylm.data.sources import Source, file_identity, find_files
from tinylm.data.store import StoreWriter
from tinylm.data.tokenizers import Tokenizer

_CHUNK_TOKENS = 1 << 24
_LOOK_TOKENS = 1 << 20


class TokenSource(Source):
    """Files of ids; it has no documents of text."""

    def files(self) -> list[str]:
        """Return the files of the glob."""
        return find_files(self.spec, split_spec(self.spec)[1])

    def identity(self) -> Any:
        return [file_identity(path) for path in self.files()]


def prepare_ready(source: TokenSource, tokenizer: Tokenizer, folder: pathlib.Path, splits: tuple[str, ...]) -> None:
    """Write a store that points at ready files; raise UserError for ids that the tokenizer doesn't have."""
    arrays = [open_ids(path, tokenizer.vocab_size) for path in source.files()]
    writer = StoreWriter(folder, arrays[0].dtype)
    total = 0
    for array in arrays:
        for begin in range(0, len(array), _CHUNK_TOKENS):
            chunk = array[begin : begin + _CHUNK_TOKENS]
            _check_ids(chunk, begin, array, tokenizer)
            ends = np.flatnonzero(chunk == tokenizer.eot_id) + begin + total + 1
            writer.ends.append(np.stack([ends, np.zeros_like(ends)], axis=1).ravel())
        total += len(array)
    if not writer.ends.total or int(writer.document_ends()[-1, 0]) < total:
        writer.ends.append(np.array([total, 0]))
    ends = np.array(writer.document_ends()[:, 0])
    shards = [{"file": str(a.filename), "items": len(a), "dtype": a.dtype.name} for a in arrays]
    parts = _cut(ends, splits, source.config.valid_fraction)
    for part in parts.values():
        part["bytes"] = sum(tokenizer.count_bytes(ids) for ids in _parts(arrays, *part["tokens"]))
    manifest = {
        "source": source.spec,
        "tokens": total,
        "documents": len(ends),
        "shards": shards,
        "tokenizer": describe_tokenizer(tokenizer),
        "splits": parts,
        "skipped": {"count": 0, "examples": []},
    }
    writer.finish(manifest)


def open_ids(path: str, vocab_size: int) -> np.memmap:
    """Map a file of ids in the type that it has."""
    size = pathlib.Path(path).stat().st_size
    if not size or size % 2:
        raise UserError(f"{path} has {size} bytes, which are no ids of 2 or 4 bytes; tokens: reads uint16 or uint32.")
    halves = np.memmap(path, np.uint16, mode="r")
    upper = halves[1 : 2 * _LOOK_TOKENS : 2]
    # Of uint32 ids nearly every upper half is small, though an id out of range may be among them.
    is_uint32 = size % 4 == 0 and len(upper) > 1 and np.mean(upper <= (vocab_size - 1) >> 16) > 0.5
    return np.memmap(path, np.uint32, mode="r") if is_uint32 else halves


def _check_ids(chunk: np.ndarray, begin: int, array: np.memmap, tokenizer: Tokenizer) -> None:
    if int(chunk.max()) >= tokenizer.vocab_size:
        place = int((chunk >= tokenizer.vocab_size).argmax())
        raise UserError(
            f"{array.filename} has id {chunk[place]} at byte {(begin + place) * array.itemsize}, but "
            f"data.tokenizer={tokenizer.name} has {tokenizer.vocab_size:,} ids; set the tokenizer that made the file."
        )


def _cut(ends: np.ndarray, splits: tuple[str, ...], fraction: float) -> dict[str, Any]:
    """Return the splits: one, or a tail cut between documents, or inside where there is only one."""
    total = int(ends[-1])
    if len(splits) == 1 or not fraction:
        return {splits[0]: {"documents": [0, len(ends)], "tokens": [0, total]}}
    documents = cut_documents(ends, fraction) if len(ends) > 1 else 1
    cut = int(ends[documents - 1]) if len(ends) > 1 else int(total * (1 - fraction))
    first = {"documents": [0, documents], "tokens": [0, cut]}
    return {"train": first, "valid": {"documents": [documents, len(ends)], "tokens": [cut, total]}}


def _parts(arrays: list[np.memmap], begin: int, end: int) -> Any:
    """Yield the ids from `begin` to `end` over all files, some millions at a time."""
    start = 0
    for array in arrays:
        low, high = max(begin - start, 0), min(end - start, len(array))
        for at in range(low, high, _CHUNK_TOKENS):
            yield array[at : min(at + _CHUNK_TOKENS, high)]
        start += len(array)
