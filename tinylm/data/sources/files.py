"""Files of text as users have them: by name, folder or glob, compressed or not, from a pipe, of the
wrong kind.

What a file is shows in its first bytes, not in its name. gzip, bzip2, xz and zstd are read as
streams; what can't be read as text (an archive, UTF-16, Parquet, a PDF) is named, for as text it
would be one document of garbage.
"""

import bz2
import functools
import glob
import gzip
import itertools
import lzma
import os
import pathlib
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.log import alive
from tinylm.core.optional import optional_module

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 512  # a tar archive has its mark at byte 257
_COMPRESSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "gzip": (rb"\x1f\x8b", (".gz", ".gzip")),
    "bzip2": (rb"BZh[1-9]1AY&SY", (".bz2",)),
    "xz": (rb"\xfd7zXZ\0", (".xz",)),
    "zstd": (rb"\x28\xb5\x2f\xfd", (".zst", ".zstd")),
}
_FOREIGN: dict[str, tuple[bytes, str]] = {
    "a zip archive": (rb"PK\x03\x04", "unpack it"),
    "a 7z archive": (rb"7z\xbc\xaf\x27\x1c", "unpack it"),
    "a RAR archive": (rb"Rar!\x1a\x07", "unpack it"),
    "a tar archive": (rb".{257}ustar", "unpack it"),
    "a Parquet file": (rb"PAR1[\0-\x1f]", "read it with parquet:"),
    "an Arrow file": (rb"ARROW1\0|\xff\xff\xff\xff.{3}\0\x10\0\0\0", "save it as Parquet"),
    "a PDF": (rb"%PDF-\d", "take the text out of it"),
    "a SQLite database": (rb"SQLite format 3\0", "export the text"),
    "an HDF5 file": (rb"\x89HDF", "export the text"),
    "a picture": (rb"\x89PNG|\xff\xd8\xff", "leave it out"),
    "UTF-32 text": (rb"\xff\xfe\0\0|\0\0\xfe\xff", "convert it with iconv -f UTF-32 -t UTF-8"),
    "UTF-16 text": (rb"\xff\xfe|\xfe\xff", "convert it with iconv -f UTF-16 -t UTF-8"),
}


def find(pattern: str, endings: tuple[str, ...]) -> list[str]:
    """Return the files that a name, folder or glob stands for, sorted by their paths.

    A folder stands for the files below it: those with one of `endings` where there are any,
    otherwise all. So does a folder that a glob matches, where it matches no file. Names may hold
    the letters of patterns, like [ and ].
    """
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [path for path in found if not os.path.isdir(path)]
    if not paths:
        paths = [path for folder in found for path in _below(folder, endings)]
    return [os.path.abspath(path) for path in sorted(paths)]


def _below(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Return the data files below a folder; names that begin with . or _ are notes of programs, as
    Spark's _SUCCESS.
    """
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [os.path.join(place, name) for name in names if not name.startswith((".", "_"))]
    wanted = [path for path in found if _plain_name(path).endswith(endings)] if endings else []
    return wanted or found


def _plain_name(path: str) -> str:
    """Return a path in small letters, without the ending of a compression."""
    name = path.lower()
    for _, endings in _COMPRESSED.values():
        for ending in endings:
            name = name.removesuffix(ending)
    return name


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
    """The folder of what came through pipes, which goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="tinylm-pipes-")


@functools.cache
def rereadable(path: str) -> str:
    """Return `path`, or that of a copy where it is a pipe: a tokenizer that learns reads a text
    more than once.
    """
    if stat.S_ISREG(os.stat(path).st_mode):
        return path
    # A number comes first, for two pipes in different folders may have one name.
    folder = _copies().name
    number = len(os.listdir(folder))
    copy = pathlib.Path(folder, f"{number}-{pathlib.Path(path).name}")
    with (
        alive(lambda: f"reading {path}"),
        pathlib.Path(path).open("rb") as pipe,
        copy.open("wb") as file,
    ):
        shutil.copyfileobj(pipe, file)
    return str(copy)


def compression(path: str) -> str:
    """Return how a file is compressed, by its first bytes, and otherwise by its name; "" where it
    isn't.
    """
    with pathlib.Path(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for name, (mark, _) in _COMPRESSED.items():
        if re.match(mark, head):
            return name
    for name, (_, endings) in _COMPRESSED.items():
        if path.lower().endswith(endings):
            return name
    return ""


def read_chunks(path: str) -> Iterator[bytes]:
    """Yield the content of a file, unpacked, in chunks.

    Raises UserError where its compression is broken, or where it is of a kind that holds no plain
    text.
    """
    reader = _zstd_chunks if compression(path) == "zstd" else _opened_chunks
    read = 0
    head = b""
    is_known = False
    try:
        for chunk in reader(path):
            read += len(chunk)
            if is_known:
                yield chunk
                continue
            head += chunk
            if len(head) >= _HEAD_BYTES:
                is_known = True
                refuse_foreign(path, head)
                yield head
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path} can't be read after byte {read} of its content: {error}."
        ) from error
    if not is_known:
        refuse_foreign(path, head)
        yield head


def refuse_foreign(path: str, head: bytes) -> None:
    """Raise UserError where the first bytes of a file's content show that it isn't plain text."""
    for kind, (mark, remedy) in _FOREIGN.items():
        if re.match(mark, head, re.DOTALL):
            raise UserError(f"{path} is {kind}, not text in UTF-8; {remedy}.")


def _opened_chunks(path: str) -> Iterator[bytes]:
    """Yield the chunks of a file that is plain, or that the standard library unpacks."""
    openers: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    with openers.get(compression(path), open)(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    """Yield what one or more frames hold; a frame that is cut short is an EOFError, which the
    library's files miss.
    """
    zstandard = optional_module("zstandard", "files")

    decoder: Any = None
    left = b""
    with pathlib.Path(path).open("rb") as file:
        while raw := left or file.read(_CHUNK_BYTES):
            # Windows of up to 2 GiB: `zstd --long=31` makes them, and so are the dumps of Reddit.
            decoder = decoder or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            left = b""
            try:
                yield decoder.decompress(raw)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            if decoder.eof:
                left = decoder.unused_data
                decoder = None
    if decoder is not None:
        raise EOFError("it ends in the middle of a frame")


def split_stream(
    path: str, separator: bytes, *, any_line_end: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, block) of the stretches between separators; always at least one.

    With `any_line_end`, a line feed of the separator also matches Windows' line end, and a carriage
    return alone.
    """
    if any_line_end and b"\n" in separator:
        parts = separator.replace(b"\r\n", b"\n").split(b"\n")
        pattern = rb"(?>\r\n|\r|\n)".join(map(re.escape, parts))
        yield from _split_at_pattern(path, re.compile(pattern), 2 * len(separator))
        return
    if not separator:
        yield 0, b"".join(read_chunks(path))
        return
    held = bytearray()  # what was read and not yielded
    offset = 0  # of what is held
    for chunk in read_chunks(path):
        # A separator may have begun in the chunk before.
        search_from = max(0, len(held) - len(separator) + 1)
        held += chunk
        start = 0
        end = held.find(separator, search_from)
        while end >= 0:
            yield offset + start, bytes(held[start:end])
            start = end + len(separator)
            end = held.find(separator, start)
        del held[:start]
        offset += start
    yield offset, bytes(held)


def _split_at_pattern(
    path: str, pattern: re.Pattern[bytes], longest: int
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, block) between matches of at most `longest` bytes."""
    held = bytearray()  # what was read and not yielded
    offset = 0  # of what is held
    # The last chunk is empty.
    for chunk in itertools.chain(read_chunks(path), [b""]):
        # A match may have begun in the chunk before.
        search_from = max(0, len(held) - longest)
        held += chunk
        start = 0
        while found := pattern.search(held, search_from):
            may_go_on = bool(chunk) and found.end() == len(held)
            if may_go_on:
                break
            yield offset + start, bytes(held[start : found.start()])
            start = found.end()
            search_from = start
        del held[:start]
        offset += start
    yield offset, bytes(held)
