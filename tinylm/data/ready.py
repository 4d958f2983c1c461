"""Ready ids: `tokens:` reads .bin files of uint16 or uint32, as nanoGPT and llama2.c write them,
where they lie.

They are scanned once, for ids that the tokenizer doesn't have and for the ends of documents; the
store then holds a manifest and those ends, and the files' checksums. Which of the two types a file
has shows in it: in uint32, the upper half of each id is as small as the vocabulary says.
"""

import pathlib
from typing import Any

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.data.id_files import open_ids, range_hint
from tinylm.data.preparing import describe_tokenizer, progress_bar
from tinylm.data.sources import FileSource
from tinylm.data.splits import Cut, choose_cut
from tinylm.data.store import StoreWriter, TokenArray
from tinylm.data.tokenizers import Tokenizer

_CHUNK_TOKENS = 1 << 22


class TokenSource(FileSource):
    """Files of ids; it has no documents of text."""

    endings = (".bin",)


def prepare_ready(
    source: TokenSource,
    checksums: list[str],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    splits: tuple[str, ...],
    progress: bool,
) -> None:
    """Write a store of ready files with their `checksums`; raise UserError for ids that the
    tokenizer doesn't have.
    """
    writer = StoreWriter(folder, np.dtype(np.uint16), tokenizer.unknown_ids)
    with progress_bar(2 * (source.total_bytes() or 0), progress) as bar:
        shards = _scan(source.files, checksums, tokenizer, writer, bar)
        array = TokenArray(folder, shards, np.uint16)
        if int(writer.document_ends()[-1:, 0].sum()) < len(array):
            writer.ends.append(np.array([len(array), 0]))
        ends = writer.document_ends()[:, 0]
        splits_of = _cut(ends, splits, source)
        for part in splits_of.values():
            part["bytes"] = _count_bytes(tokenizer, bar, array, *part["tokens"])
    # The manifest doesn't say where the files are, for they may be moved.
    named = [{**shard, "file": pathlib.Path(shard["file"]).name} for shard in shards]
    manifest = {
        "source": source.spec,
        "tokens": len(array),
        "documents": len(ends),
        "shards": named,
    }
    manifest |= {"tokenizer": describe_tokenizer(tokenizer), "splits": splits_of}
    held_out = ""
    if {"train", "valid"} <= splits_of.keys():
        begin, end = splits_of["valid"]["tokens"]
        held_out = f"the last {end - begin:,} of {end:,} ids, {(end - begin) / end:.1%} of them"
        if progress:
            say(f"held out for validation: {held_out}")
    writer.finish(manifest | {"skipped": {"count": 0, "examples": []}, "held_out": held_out})


def _scan(
    paths: list[str], checksums: list[str], tokenizer: Tokenizer, writer: StoreWriter, bar: Any
) -> list[dict[str, Any]]:
    """Check the ids of files, hand the ends of documents to `writer`, and return the files as
    shards.
    """
    shards: list[dict[str, Any]] = []
    total = 0
    for path, sha256 in zip(paths, checksums, strict=True):
        ids = open_ids(path, tokenizer.vocab_size)
        for begin in range(0, len(ids), _CHUNK_TOKENS):
            chunk = ids[begin : begin + _CHUNK_TOKENS]
            _check_ids(chunk, begin, ids, tokenizer)
            ends = np.flatnonzero(chunk == tokenizer.eot_id) + begin + total + 1
            writer.ends.append(np.stack([ends, np.zeros_like(ends)], axis=1).ravel())
            writer.count_unknown(chunk)
            bar.update(chunk.nbytes)
        shards.append({"file": path, "items": len(ids), "dtype": ids.dtype.name, "sha256": sha256})
        total += len(ids)
    return shards


def _check_ids(chunk: np.ndarray, begin: int, array: np.memmap, tokenizer: Tokenizer) -> None:
    if int(chunk.max()) >= tokenizer.vocab_size:
        place = int((chunk >= tokenizer.vocab_size).argmax())
        raise UserError(
            f"{array.filename} has id {chunk[place]} at byte {(begin + place) * array.itemsize}"
            f"{range_hint(array, tokenizer.vocab_size)}, but "
            f"data.tokenizer={tokenizer.name} has {tokenizer.vocab_size:,} ids; set the "
            "tokenizer that made the file."
        )


def _cut(ends: np.ndarray, splits: tuple[str, ...], source: TokenSource) -> dict[str, Any]:
    """Return the splits: one, or a tail cut between documents, or inside one where these are too
    large.
    """
    total = int(ends[-1])
    if len(splits) == 1 or not source.config.valid_fraction:
        return {splits[0]: {"documents": [0, len(ends)], "tokens": [0, total]}}
    if len(ends) == 1:
        cut = Cut(0, 1 - source.config.valid_fraction)
    else:
        cut = choose_cut(ends, source, can_cut_inside=True)
    place = int(ends[cut.document - 1]) if cut.document else 0
    documents = cut.document
    if cut.inside:
        place += int((int(ends[cut.document]) - place) * cut.inside)
        documents += 1
    first = {"documents": [0, documents], "tokens": [0, place]}
    return {
        "train": first,
        "valid": {"documents": [documents, len(ends)], "tokens": [place, total]},
    }


def _count_bytes(tokenizer: Tokenizer, bar: Any, array: TokenArray, begin: int, end: int) -> int:
    """Return how many bytes of text the tokens from `begin` to `end` stand for."""
    total = 0
    for at in range(begin, end, _CHUNK_TOKENS):
        ids = np.empty(min(_CHUNK_TOKENS, end - at), np.int32)
        array.read(ids, at)
        total += tokenizer.count_bytes(ids)
        bar.update(2 * len(ids))
    return total
