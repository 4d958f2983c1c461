"""Files of ids that another program made: `tokens:` reads .bin files of uint16 or uint32, as
nanoGPT and llama2.c write them, where they lie.

They are scanned once, for ids that the tokenizer doesn't have and for the ends of documents; the
store then holds a manifest and those ends, and the files' checksums. Which of the two types a file
has shows in it: in uint32, the upper half of each id is as small as the vocabulary says.
"""

import dataclasses
import pathlib

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.data.id_files import open_ids, range_hint
from tinylm.data.manifest import Shard, SkippedFacts, Split
from tinylm.data.progress import Progress, progress
from tinylm.data.sources.tokens import TokenSource
from tinylm.data.splits import Cut, choose_cut
from tinylm.data.store import StoreWriter, TokenArray
from tinylm.data.tokenizers import Tokenizer

_CHUNK_TOKENS = 1 << 22


def prepare_token_files(
    source: TokenSource,
    checksums: list[str],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    splits: tuple[str, ...],
    *,
    is_shown: bool,
) -> None:
    """Write the store of files of ids, which stay where they are.

    Args:
      source: the files.
      checksums: of the files, in their order.
      tokenizer: the one that made the ids.
      folder: where the store is written.
      splits: the splits that the store is to have, such as ("train", "valid").
      is_shown: whether to show a bar, and to say what is held out.

    Raises:
      UserError: there is an id that the tokenizer doesn't have.
    """
    writer = StoreWriter(folder, np.dtype(np.uint16), tokenizer.unknown_ids)
    scanned_bytes = 2 * (source.total_bytes() or 0)
    with progress(scanned_bytes, is_shown, "preparing", source.spec) as work:
        scan = _Scan(tokenizer, writer, work)
        shards = [
            scan.file(path, sha256)
            for path, sha256 in zip(source.local_files, checksums, strict=True)
        ]
        array = TokenArray(folder, shards, np.uint16)
        scan.close_last_document()
        parts: dict[str, Split] = {}
        for name, part in _split(writer.document_ends()[:, 0], splits, source).items():
            num_bytes = scan.count_text_bytes(array, *part.tokens)
            parts[name] = dataclasses.replace(part, bytes=num_bytes)

    held_out = ""
    if {"train", "valid"} <= parts.keys():
        count = parts["valid"].num_tokens
        held_out = f"the last {count:,} of {len(array):,} ids, {count / len(array):.1%} of them"
        if is_shown:
            say(f"held out for validation: {held_out}")
    # The manifest doesn't say where the files are, for they may be moved.
    named_shards = [
        dataclasses.replace(shard, file=pathlib.Path(shard.file).name) for shard in shards
    ]
    writer.finish(
        source.spec,
        tokenizer,
        parts,
        skipped=SkippedFacts(),
        held_out=held_out,
        ready_shards=named_shards,
    )


class _Scan:
    """Reads files of ids one after the other, and hands the ends of documents to a writer."""

    def __init__(self, tokenizer: Tokenizer, writer: StoreWriter, work: Progress):
        self._tokenizer = tokenizer
        self._writer = writer
        self._work = work
        self._num_tokens = 0

    def file(self, path: str, sha256: str) -> Shard:
        """Check the ids of a file, note where documents end in it, and return it as a shard."""
        ids = open_ids(path, self._tokenizer.vocab_size)
        eot_id = self._tokenizer.eot_id
        for begin in range(0, len(ids), _CHUNK_TOKENS):
            chunk = ids[begin : begin + _CHUNK_TOKENS]
            self._check(chunk, begin, ids)
            # A document ends behind its end of text.
            ends_in_chunk = np.flatnonzero(chunk == eot_id) + 1
            self._note_ends(self._num_tokens + begin + ends_in_chunk)
            self._writer.count_unknown(chunk)
            self._work.update(chunk.nbytes)
        self._num_tokens += len(ids)
        return Shard(path, len(ids), ids.dtype.name, sha256)

    def _check(self, chunk: np.ndarray, begin: int, ids: np.memmap) -> None:
        """Raise UserError for an id out of range in the chunk that begins at `begin` of a file."""
        vocab_size = self._tokenizer.vocab_size
        if int(chunk.max()) < vocab_size:
            return
        place = int((chunk >= vocab_size).argmax())
        offset_bytes = (begin + place) * ids.itemsize
        raise UserError(
            f"{ids.filename} has id {chunk[place]} at byte {offset_bytes}"
            f"{range_hint(ids, vocab_size)}, but data.tokenizer={self._tokenizer.name} has "
            f"{vocab_size:,} ids; set the tokenizer that made the file."
        )

    def _note_ends(self, ends: np.ndarray) -> None:
        """Note documents that end at `ends`; how many bytes of text they have isn't known."""
        self._writer.ends.append(np.stack([ends, np.zeros_like(ends)], axis=1).ravel())

    def close_last_document(self) -> None:
        """End the last document with the last file, where no end of text does."""
        ends = self._writer.document_ends()[:, 0]
        if not len(ends) or ends[-1] < self._num_tokens:
            self._note_ends(np.array([self._num_tokens]))

    def count_text_bytes(self, array: TokenArray, begin: int, end: int) -> int:
        """Return how many bytes of text the tokens from `begin` to `end` stand for."""
        total = 0
        for place in range(begin, end, _CHUNK_TOKENS):
            ids = array.between(place, min(place + _CHUNK_TOKENS, end))
            total += self._tokenizer.count_bytes(ids)
            self._work.update(2 * len(ids))
        return total


def _split(ends: np.ndarray, splits: tuple[str, ...], source: TokenSource) -> dict[str, Split]:
    """Return the splits of documents that end at `ends`: one split, or the tail held out.

    The tail is cut between two documents, or inside one where these are too large. How many bytes
    of text each split has is left open, as 0.
    """
    num_documents = len(ends)
    num_tokens = int(ends[-1])
    fraction = source.config.valid_fraction
    if len(splits) == 1 or not fraction:
        return {splits[0]: Split((0, num_documents), (0, num_tokens), bytes=0)}

    if num_documents == 1:
        cut = Cut(0, 1 - fraction)
    else:
        cut = choose_cut(ends, source, can_cut_inside=True)
    document = cut.document
    place = int(ends[document - 1]) if document else 0
    if cut.inside:
        # The document that is cut counts as one of the training split.
        place += int((int(ends[document]) - place) * cut.inside)
        document += 1
    return {
        "train": Split((0, document), (0, place), bytes=0),
        "valid": Split((document, num_documents), (place, num_tokens), bytes=0),
    }
