"""Tokenizers that others made: GPT-2's, SentencePiece models, llama2.c's files.

Each gives the ids of the library or program it stands for, and a test compares them. Their files
travel with store and run, so the place they were read from may go.
"""

import base64
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.optional import optional_module
from tinylm.data.tokenizers.base import END, TableTokenizer, Tokenizer, utf8
from tinylm.data.tokenizers.portions import encode_in_pieces
from tinylm.data.tokenizers.tokenizer_json import byte_chars, encode_by_library

if TYPE_CHECKING:
    import tokenizers

# As many threads as the `tokenizers` library takes, whose variable this is.
THREADS = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)


class Gpt2Tokenizer(TableTokenizer):
    """GPT-2's 50,257 ids, encoded by tiktoken (Radford et al. 2019, section 2.2).

    Attributes:
      inner: tiktoken's encoding.
    """

    name = "gpt2"
    eot_name = END
    _PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, id_of_bytes: dict[bytes, int]):
        """Take the id of each token's bytes, which is also its rank: lower ones merge first.

        Raises:
          ValueError: the ids aren't those from 0 on, or some byte has none.
        """
        tiktoken = optional_module("tiktoken", "tokens")

        num_tokens = len(id_of_bytes)
        are_ranks = sorted(id_of_bytes.values()) == list(range(num_tokens))
        has_all_bytes = all(bytes([byte]) in id_of_bytes for byte in range(256))
        if not are_ranks or not has_all_bytes:
            raise ValueError("its ranks must be those from 0 on, and have each byte")
        self.eot_id = num_tokens
        self.vocab_size = num_tokens + 1
        self.inner = tiktoken.Encoding(
            "gpt2",
            pat_str=self._PATTERN,
            mergeable_ranks=id_of_bytes,
            special_tokens={END: self.eot_id},
        )
        self.bytes_of_id = sorted(id_of_bytes, key=id_of_bytes.__getitem__)
        lines: list[bytes] = []
        for i, token in enumerate(self.bytes_of_id):
            lines.append(base64.b64encode(token) + b" %d" % i)
        self.files = {"gpt2.tiktoken": b"\n".join(lines)}

    @classmethod
    def of_folder(cls, folder: str) -> "Gpt2Tokenizer":
        """Read OpenAI's two files.

        Args:
          folder: has `encoder.json` (ids) and `vocab.bpe` (merges, whose order the ids must
            follow).

        Raises:
          UserError: they can't be read, or don't belong together.
        """
        place = pathlib.Path(folder)
        encoder = read_user_file(place / "encoder.json")
        merges = read_user_file(place / "vocab.bpe")
        byte_of_char = {char: byte for byte, char in byte_chars().items()}
        try:
            tokens = list(byte_chars().values())
            # The first line is the version; "Ġ t" merges a space with a t.
            for line in merges.decode().splitlines()[1:]:
                if line:
                    tokens.append(line.replace(" ", ""))

            ids = dict(json.loads(encoder))
            ids.pop(END, None)
            if ids != {token: i for i, token in enumerate(tokens)}:
                raise ValueError("their tokens differ")

            id_of_bytes: dict[bytes, int] = {}
            for i, token in enumerate(tokens):
                content = bytes(byte_of_char[char] for char in token)
                id_of_bytes[content] = i
            return cls(id_of_bytes)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{place} has no encoder.json and vocab.bpe that belong together ({why})."
            ) from error

    @classmethod
    def of_tiktoken(cls) -> "Gpt2Tokenizer":
        """Read the vocabulary through tiktoken, which fetches it once."""
        tiktoken = optional_module("tiktoken", "tokens")

        try:
            encoding = tiktoken.get_encoding("gpt2")
            # The end of text is the last id, and not one of the merges.
            tokens = range(encoding.eot_token)
            return cls({encoding.decode_single_token_bytes(i): i for i in tokens})
        except (OSError, ValueError) as error:
            raise UserError(
                "data.tokenizer=gpt2 could not be fetched by tiktoken; without a network set "
                "data.tokenizer=gpt2:DIR to a folder with encoder.json and vocab.bpe."
            ) from error

    @classmethod
    def restore(cls, content: bytes) -> "Gpt2Tokenizer":
        """Return the tokenizer of its own file; raise ValueError where that is damaged."""
        pairs = [line.split() for line in content.splitlines()]
        return cls({base64.b64decode(token): int(i) for token, i in pairs})

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_in_pieces([utf8(text).decode() for text in texts], self._encode_pieces)

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        ids_of_pieces = self.inner.encode_ordinary_batch(pieces, num_threads=THREADS)
        return [np.array(ids, np.int32) for ids in ids_of_pieces]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226)."""

    name = "sentencepiece"

    def __init__(self, model: bytes, eot: int | str | None = None):
        """Read a model.

        Args:
          model: the content of its file.
          eot: the id or the piece that ends a text. None for the model's own, or a new id.

        Raises:
          UserError: this isn't a model, or has no such piece.
        """
        sentencepiece = optional_module("sentencepiece", "tokens")

        self.files = {"tokenizer.model": model}
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model)
            if not model:  # which the library takes for none given
                raise RuntimeError
        except RuntimeError as error:
            raise UserError(
                "the file of data.tokenizer=sentencepiece: is not a SentencePiece model."
            ) from error

        num_pieces = self._inner.get_piece_size()
        usual_end = self._inner.eos_id() if self._inner.eos_id() >= 0 else num_pieces
        if eot is None:
            self.eot_id = usual_end
        elif isinstance(eot, str):
            self.eot_id = self._id_of_piece(eot)
        else:
            self.eot_id = eot
        if self.eot_id != usual_end:
            self.header = {"eot_id": self.eot_id}
        self.vocab_size = max(num_pieces, self.eot_id + 1)
        if self.eot_id < num_pieces:
            self.eot_name = self._inner.id_to_piece(self.eot_id)
        self.unknown_ids = (self._inner.unk_id(),)
        if self.eot_id in self.unknown_ids:
            raise UserError(
                f"the file of data.tokenizer=sentencepiece: has {self.eot_name!r} for what it "
                "can't spell, so it can't be the end of text; set data.eot_token to another of "
                "its pieces."
            )

    def _id_of_piece(self, piece: str) -> int:
        """Return the id of the piece that `data.eot_token` names."""
        found = self._inner.piece_to_id(piece)
        if self._inner.id_to_piece(found) != piece:
            raise UserError(f"data.eot_token={piece} isn't a piece of the tokenizer's file.")
        return found

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._inner.encode([utf8(text).decode() for text in texts], num_threads=THREADS)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._inner.decode([i for i in ids if i != self.eot_id]).encode()


class Llama2cTokenizer(TableTokenizer):
    """A tokenizer.bin of karpathy/llama2.c: pieces with scores, merged best pair first.

    One space is added before a text. Ids 0 to 2 are unknown, begin and end, and 3 to 258 the bytes;
    llama2.c's models end a story with the begin (1). run.c's `encode` is byte-pair encoding whose
    merges come in the order of the scores of what they make.

    Attributes:
      inner: a tokenizer of the `tokenizers` library that gives the same ids.
    """

    name = "llama2c"
    eot_id = 1
    eot_name = "<s>"
    _SPECIAL = ("<unk>", "<s>", "</s>")

    def __init__(self, content: bytes):
        """Take the content of the file; raise UserError where it is damaged."""
        self.files = {"tokenizer.bin": content}
        pieces, scores = read_llama2c(content)
        self.vocab_size = len(pieces)

        first_byte = len(self._SPECIAL)
        first_merged = first_byte + 256
        # The file writes a byte as "<0x41>", and the special ids as their names.
        self.bytes_of_id = [b""] * first_byte
        self.bytes_of_id += [bytes([byte]) for byte in range(256)]
        self.bytes_of_id += pieces[first_merged:]

        names = list(self._SPECIAL)
        for piece in pieces[first_byte:]:
            names.append(piece.decode("utf-8", errors="replace"))
        merged_ids = range(first_merged, len(pieces))
        best_first = sorted(merged_ids, key=lambda i: -scores[i])
        merged_names = [names[i] for i in best_first]
        self.inner = self._byte_fallback_bpe(names, merged_names)

    @classmethod
    def _byte_fallback_bpe(cls, names: list[str], best_first: list[str]) -> "tokenizers.Tokenizer":
        """Return the library's tokenizer for names of ids.

        Its merges make the names `best_first`, in that order, of any two other names.
        """
        import tokenizers
        from tokenizers import decoders, models, normalizers

        vocab: dict[str, int] = {}
        for i, name in enumerate(names):
            vocab.setdefault(name, i)

        merges: list[tuple[str, str]] = []
        for name in best_first:
            for cut in range(1, len(name)):
                left = name[:cut]
                right = name[cut:]
                if left in vocab and right in vocab:
                    merges.append((left, right))

        inner = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
        )
        inner.normalizer = normalizers.Prepend(" ")
        inner.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        inner.add_special_tokens(list(cls._SPECIAL))
        inner.encode_special_tokens = True
        return inner

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_by_library(self.inner, texts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return super().decode_bytes(ids).removeprefix(b" ")

    def count_bytes(self, ids: np.ndarray) -> int:
        # The first piece of a document may begin with the space that was added.
        space_of_id = np.array([content.startswith(b" ") for content in self.bytes_of_id])
        begins_document = np.concatenate([[True], ids[:-1] == self.eot_id])
        num_added = int((space_of_id[ids] & begins_document).sum())
        return super().count_bytes(ids) - num_added


def read_llama2c(content: bytes) -> tuple[list[bytes], list[float]]:
    """Return the pieces and scores of a tokenizer.bin of llama2.c.

    After four bytes for the longest piece, each piece has its score (float32), its length in bytes
    (int32), and those bytes.

    Raises:
      UserError: the file is damaged.
    """
    pieces: list[bytes] = []
    scores: list[float] = []
    position = 4
    try:
        while position < len(content):
            score, length = struct.unpack_from("<fi", content, position)
            position += 8
            if not 0 <= length <= len(content) - position:
                raise struct.error("length out of range")
            pieces.append(content[position : position + length])
            scores.append(score)
            position += length
    except struct.error as error:
        raise UserError(
            f"the file of data.tokenizer=llama2c: is not a tokenizer.bin of llama2.c ({error})."
        ) from error
    if len(pieces) < 259:
        raise UserError("the file of data.tokenizer=llama2c: has fewer pieces than the 256 bytes.")
    return pieces, scores


def read_user_file(path: pathlib.Path) -> bytes:
    """Return the content of a file that `data.tokenizer` names; UserError if it can't be read."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path} of data.tokenizer can't be read: {error.strerror}.") from error
