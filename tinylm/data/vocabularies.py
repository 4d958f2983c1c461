"""Tokenizers that others made: GPT-2's, a tokenizer.json, SentencePiece models, llama2.c files.

Each gives the ids of the library it stands for. Their files travel with store and run, so the place
they were read from may go.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.core.optional import optional_module
from tinylm.data.bpe import BpeTokenizer, byte_chars, ids_by
from tinylm.data.config import split_spec
from tinylm.data.pieces import in_pieces
from tinylm.data.tokenizers import END, HEADER_FILE, TableTokenizer, Tokenizer, utf8

# As many threads as the tokenizers library takes, whose variable this is; a process of `encoding`
# has one.
THREADS = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)

_BYTES = {bytes([byte]) for byte in range(256)}


class Gpt2Tokenizer(TableTokenizer):
    """GPT-2's 50,257 ids, encoded by tiktoken (Radford et al. 2019, section 2.2)."""

    name, eot_name = "gpt2", END
    _PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, id_of_bytes: dict[bytes, int]):
        tiktoken = optional_module("tiktoken", "tokens")

        self.eot_id = len(id_of_bytes)
        if (
            sorted(id_of_bytes.values()) != list(range(self.eot_id))
            or len(set(id_of_bytes) & _BYTES) < 256
        ):
            raise ValueError("its ranks must be those from 0 on, and have each byte")
        self.vocab_size = self.eot_id + 1
        self._inner = tiktoken.Encoding(
            "gpt2",
            pat_str=self._PATTERN,
            mergeable_ranks=id_of_bytes,
            special_tokens={END: self.eot_id},
        )
        self._bytes_of_id = sorted(id_of_bytes, key=id_of_bytes.__getitem__)
        lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(self._bytes_of_id)]
        self.files = {"gpt2.tiktoken": b"\n".join(lines)}

    @classmethod
    def of_folder(cls, folder: str) -> "Gpt2Tokenizer":
        """Read OpenAI's `encoder.json` (ids) and `vocab.bpe` (merges, whose order the ids must
        follow).
        """
        byte_of_char = {char: byte for byte, char in byte_chars().items()}
        place = pathlib.Path(folder)
        encoder, merges = (read_user_file(place / name) for name in ("encoder.json", "vocab.bpe"))
        try:
            ids = dict(json.loads(encoder))
            lines = [line.replace(" ", "") for line in merges.decode().splitlines()[1:] if line]
            tokens = [*byte_chars().values(), *lines]
            ids.pop(END, None)
            if ids != {token: i for i, token in enumerate(tokens)}:
                raise ValueError("their tokens differ")
            return cls(
                {bytes(byte_of_char[char] for char in token): i for i, token in enumerate(tokens)}
            )
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
            return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except (OSError, ValueError) as error:
            raise UserError(
                "data.tokenizer=gpt2 could not be fetched by tiktoken; without a network set "
                "data.tokenizer=gpt2:DIR to a folder with encoder.json and vocab.bpe."
            ) from error

    @classmethod
    def restore(cls, content: bytes) -> "Gpt2Tokenizer":
        """Return the tokenizer of `files`."""
        pairs = [line.split() for line in content.splitlines()]
        return cls({base64.b64decode(token): int(i) for token, i in pairs})

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return in_pieces([utf8(text).decode() for text in texts], self._encode_pieces)

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.array(ids, np.int32)
            for ids in self._inner.encode_ordinary_batch(texts, num_threads=THREADS)
        ]


class HfTokenizer(BpeTokenizer):
    """Any tokenizer.json, as Hugging Face's `tokenizers` reads it."""

    def __init__(self, tokenizer_json: bytes, eot: int | str | None = None, eot_hint: str = ""):
        super().__init__("hf", tokenizer_json, eot, eot_hint)
        self._inner.no_truncation()
        self._inner.no_padding()

    @functools.cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self.files["tokenizer.json"]).get("decoder") or {}
        return '"ByteLevel"' in json.dumps(decoder)

    @functools.cached_property
    def byte_ids(self) -> np.ndarray | None:
        return super().byte_ids if self._byte_level else None

    def altered_words(self) -> list[tuple[str, str]]:
        """Return the added words that don't come back as they were, each with what comes back."""
        texts = [text for word in self._added for text in (word, f"a {word} b")]
        found = [self.decode(ids.tolist()) for ids in self.encode_batch(texts)]
        return [(text, back) for text, back in zip(texts, found, strict=True) if text != back]

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._encode_pieces(list(texts))

    def count_bytes(self, ids: np.ndarray) -> int:
        return super().count_bytes(ids) if self._byte_level else Tokenizer.count_bytes(self, ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._byte_level:
            return super().decode_bytes(ids)
        return self._inner.decode(
            [i for i in ids if i != self.eot_id], skip_special_tokens=False
        ).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226)."""

    name = "sentencepiece"

    def __init__(self, model: bytes, eot: int | str | None = None):
        sentencepiece = optional_module("sentencepiece", "tokens")

        self.files = {"tokenizer.model": model}
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model)
            if not model:  # which the library takes for none given
                raise RuntimeError
        except RuntimeError as error:
            raise UserError(
                "the file of data.tokenizer=sentencepiece: is no SentencePiece model."
            ) from error
        pieces = self._inner.get_piece_size()
        usual = self._inner.eos_id() if self._inner.eos_id() >= 0 else pieces
        if isinstance(eot, str):
            eot = self._id_of_piece(eot)
        self.eot_id = usual if eot is None else eot
        if self.eot_id != usual:
            self.header = {"eot_id": self.eot_id}
        self.vocab_size = max(pieces, self.eot_id + 1)
        self.eot_name = self._inner.id_to_piece(self.eot_id) if self.eot_id < pieces else ""
        self.unknown_ids = (self._inner.unk_id(),)
        if self.eot_id in self.unknown_ids:
            raise UserError(
                f"the file of data.tokenizer=sentencepiece: has {self.eot_name!r} for what "
                "it can't spell, so it can't "
                "be the end of text; set data.eot_token to another of its pieces."
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
    """A tokenizer.bin of karpathy/llama2.c: pieces with scores, merged best pair first behind one
    added space.

    Ids 0 to 2 are unknown, begin and end, and 3 to 258 the bytes; llama2.c's models end a story
    with the begin (1). run.c's `encode` is byte-pair encoding whose merges come in the order of the
    scores of what they make.
    """

    name, eot_id, eot_name, _FIRST_BYTE = "llama2c", 1, "<s>", 3

    def __init__(self, content: bytes):
        self.files = {"tokenizer.bin": content}
        pieces, scores = _read_llama2c(content)
        self.vocab_size, first, letters = len(pieces), self._FIRST_BYTE, self._FIRST_BYTE + 256
        self._bytes_of_id = (
            [b""] * first + [bytes([byte]) for byte in range(256)] + pieces[letters:]
        )
        names = [
            "<unk>",
            "<s>",
            "</s>",
            *(piece.decode("utf-8", errors="replace") for piece in pieces[first:]),
        ]
        best_first = sorted(range(letters, len(pieces)), key=lambda i: -scores[i])
        self.inner = _byte_fallback_bpe(names, [names[i] for i in best_first])

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return ids_by(self.inner, texts)

    def count_bytes(self, ids: np.ndarray) -> int:
        spaces = np.array([content.startswith(b" ") for content in self._bytes_of_id])[ids]
        begins = np.concatenate([[True], ids[:-1] == self.eot_id])
        return super().count_bytes(ids) - int((spaces & begins).sum())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return super().decode_bytes(ids).removeprefix(b" ")


def _byte_fallback_bpe(names: list[str], best_first: list[str]) -> Any:
    """Return the library's tokenizer whose merges make `best_first`, in that order, of any two
    other names.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocab = {name: i for i, name in reversed(list(enumerate(names)))}
    merges = [(name[:cut], name[cut:]) for name in best_first for cut in range(1, len(name))]
    merges = [(left, right) for left, right in merges if left in vocab and right in vocab]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(names[:3])
    inner.encode_special_tokens = True
    return inner


def _read_llama2c(content: bytes) -> tuple[list[bytes], list[float]]:
    pieces, scores, at = [], [], 4
    try:
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            if not 0 <= length <= len(content) - at - 8:
                raise struct.error("length out of range")
            pieces.append(content[at + 8 : at + 8 + length])
            scores.append(score)
            at += 8 + length
    except struct.error as error:
        raise UserError(
            f"the file of data.tokenizer=llama2c: is no tokenizer.bin of llama2.c ({error})."
        ) from error
    if len(pieces) < 259:
        raise UserError("the file of data.tokenizer=llama2c: has fewer pieces than the 256 bytes.")
    return pieces, scores


def tokenizer_file_hashes(spec: str) -> list[str]:
    """Return hashes of the files that a tokenizer named by file or folder is made of, so that an
    edit is noticed.
    """
    kind, argument = split_spec(spec)
    if not argument or kind in ("byte", "char", "bpe"):
        return []
    path = pathlib.Path(argument)
    files = [path / name for name in ("encoder.json", "vocab.bpe")] if kind == "gpt2" else [path]
    hashes = [hashlib.sha256(read_user_file(file)).hexdigest() for file in files]
    if kind == "hf":
        beside = [_saved_eot_id(path), _declared_end(path)]
        hashes += [str(value) for value in beside if value not in (None, "")]
    return hashes


def read_user_file(path: pathlib.Path) -> bytes:
    """Return the content of a file that the config names; raise UserError where it can't be
    read.
    """
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path} of data.tokenizer can't be read: {error.strerror}.") from error


_OF_FILE: dict[str, tuple[str, Callable[[bytes], Tokenizer]]] = {
    "gpt2": ("gpt2.tiktoken", Gpt2Tokenizer.restore),
    "hf": ("tokenizer.json", HfTokenizer),
    "sentencepiece": ("tokenizer.model", SentencePieceTokenizer),
    "llama2c": ("tokenizer.bin", Llama2cTokenizer),
}


def read_vocabulary(spec: str, eot: int | str | None = None) -> Tokenizer:
    """Return the tokenizer of the file or folder that a spec names; a file may need to be told its
    end of text.
    """
    kind, argument = split_spec(spec)
    if kind == "gpt2":
        return Gpt2Tokenizer.of_folder(argument) if argument else Gpt2Tokenizer.of_tiktoken()
    path = pathlib.Path(argument)
    content = read_user_file(path)
    if kind == "hf":
        return HfTokenizer(
            content, _saved_eot_id(path) if eot is None else eot, _declared_end(path)
        )
    if kind == "sentencepiece":
        return SentencePieceTokenizer(content, eot)
    return _OF_FILE[kind][1](content)


def tell(spec: str, tokenizer: Tokenizer) -> None:
    """Say which id ends a text, and what a tokenizer made by others can't do exactly."""
    if tokenizer.eot_name:
        say(f"{spec} ends a text with {tokenizer.describe_end()}")
    else:
        say(
            f"warning: {spec} has no token of a usual name that ends a text, so it got one "
            "more, id "
            f"{tokenizer.eot_id}; if another of its tokens ends a text, set data.eot_token to it"
        )
    altered = tokenizer.altered_words() if isinstance(tokenizer, HfTokenizer) else []
    if altered:
        text, back = altered[0]
        more = f" (and {len(altered) - 1} more)" if len(altered) > 1 else ""
        say(
            f"warning: {spec} doesn't write its added words back exactly: {text!r} becomes "
            f"{back!r}{more}"
        )


def _saved_eot_id(path: pathlib.Path) -> Any:
    """Return the end of text that the header beside a tokenizer.json names, if it does: a run's
    folder has one.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(path.expanduser().with_name(HEADER_FILE).read_bytes()).get("eot_id")


def _declared_end(path: pathlib.Path) -> str:
    """Return the end of text that a tokenizer_config.json beside a tokenizer.json declares, or
    nothing.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(path.expanduser().with_name("tokenizer_config.json").read_bytes()).get(
            "eos_token"
        )
        found = found.get("content") if isinstance(found, dict) else found
        return found if isinstance(found, str) else ""
    return ""


def restore(kind: str, folder: Any, eot_id: int | None) -> Tokenizer:
    """Return the tokenizer of `kind` that was saved in `folder`; `eot_id` is that of its header."""
    name, make = _OF_FILE[kind]
    content = (folder / name).read_bytes()
    if kind == "hf":
        return HfTokenizer(content, eot_id)
    return SentencePieceTokenizer(content, eot_id) if kind == "sentencepiece" else make(content)
