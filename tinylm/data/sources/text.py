"""The source `text:`: plain text in UTF-8, of which each file is cut into documents at a separator.

It costs one pass over the files; only a document is held in memory, which is a whole file where
there is no separator in it.
"""

import dataclasses
import functools
from collections.abc import Iterator

from tinylm.data.sources import files
from tinylm.data.sources.base import BYTE_ORDER_MARK, Document, FileSource

_ASCII_SPACE = " \t\n\v\f\r"


@dataclasses.dataclass
class TextSource(FileSource):
    """Plain text, cut at `data.separator` where a file has it; what follows the last one may be
    blank.

    Whitespace around the separator belongs to it, unless `data.separator_space=keep`: TinyStories
    has a line break on either side. So does that at the ends of a file that is cut; and where the
    separator is itself whitespace (a blank line between paragraphs), any number of them is one.
    """

    endings = (".txt", ".text")
    _is_ever_cut: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _separator(self) -> str:
        return self.config.separator_text

    def identity(self) -> list:
        return [self._separator, self.config.separator_space, super().identity()]

    def read(self, path: str) -> Iterator[Document]:
        any_line_end = self.config.line_ends == "unix"
        blocks = files.split_stream(path, self._separator.encode(), any_line_end=any_line_end)
        # One block is held back, for the last one is read in another way: it may be blank.
        offset, block = next(blocks)
        for next_offset, next_block in blocks:
            self._is_ever_cut = True
            yield from self._documents_of(block, path, offset, is_cut=True)
            offset = next_offset
            block = next_block
        if offset == 0 or block.strip():
            yield from self._documents_of(block, path, offset, is_cut=offset > 0)

    def _documents_of(
        self, block: bytes, path: str, offset: int, is_cut: bool
    ) -> Iterator[Document]:
        """Yield the document of a stretch of a file; none for a stretch between two separators of
        whitespace.
        """
        strips = is_cut and self.config.separator_space == "drop"
        if strips and not self._separator.strip() and not block.strip():
            return
        yield decode(block, f"{path} at byte {offset}", offset, strips)

    def remarks(self) -> list[str]:
        remarks = super().remarks()
        if not self._separator or self._is_ever_cut:
            return remarks
        whole = "its file is one document"
        if len(self.files) > 1:
            whole = f"each of its {len(self.files):,} files is one document"
        hint = ""
        if "\n" in self._separator and self._has_windows_line_ends:
            hint = (
                r" (a separator with \n matches Windows' line ends only with data.line_ends=unix)"
            )
        return [f"data.separator={self._separator!r} does not occur in it: {whole}{hint}", *remarks]


def decode(block: bytes, where: str, offset: int = 0, strips: bool = False) -> Document:
    """Return the document that some bytes are, or what is wrong with them.

    Args:
      block: the bytes; a byte order mark at their start doesn't belong to the text.
      where: their file and place, for messages.
      offset: their place in the file, in bytes.
      strips: whether whitespace at the ends is left out. Only ASCII's whitespace is: a Chinese
        paragraph begins with wide spaces that are its own.
    """
    try:
        text = block.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        return Document("", problem=f"{where} is not UTF-8 (byte {offset + error.start})")
    if "\0" in text:
        place = offset + block.index(0)
        return Document("", problem=f"{where} holds a zero byte (byte {place}), so it is not text")
    if strips:
        text = text.strip(_ASCII_SPACE)
    if not text.strip():
        return Document("", problem=f"{where} is an empty document")
    return Document(text)
