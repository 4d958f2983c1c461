"""Tokenizers: text to ids and back, by bytes, characters, merges learned here, or files of others.

This module has the factories: by what the config says (`build_tokenizer`), by a file that it names
(`read_vocabulary`), or by the folder where a tokenizer was saved (`load_tokenizer`). The libraries
that encode are imported when a tokenizer of their kind is made, so that a run on bytes starts
without them.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import say
from tinylm.core.storage import explaining, waited_for
from tinylm.data.config import split_spec
from tinylm.data.tokenizers.base import END, HEADER_FILE, TableTokenizer, Tokenizer, folder_path
from tinylm.data.tokenizers.bpe import BpeTokenizer
from tinylm.data.tokenizers.byte import ByteTokenizer
from tinylm.data.tokenizers.char import CharTokenizer
from tinylm.data.tokenizers.imported import (
    Gpt2Tokenizer,
    Llama2cTokenizer,
    SentencePieceTokenizer,
    read_user_file,
)
from tinylm.data.tokenizers.pruned import PrunedTokenizer
from tinylm.data.tokenizers.tokenizer_json import (
    JsonTokenizer,
    byte_chars,
    declared_end,
    saved_end_id,
)

__all__ = [
    "END",
    "HEADER_FILE",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Gpt2Tokenizer",
    "JsonTokenizer",
    "Llama2cTokenizer",
    "PrunedTokenizer",
    "SentencePieceTokenizer",
    "TableTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "byte_chars",
    "load_tokenizer",
    "read_vocabulary",
    "tokenizer_file_hashes",
]


def build_tokenizer(
    spec: str,
    vocab_top_k: int,
    texts: Callable[[], Iterable[str]],
    eot_token: str = "",
    all_texts: Callable[[], Iterable[str]] | None = None,
) -> Tokenizer:
    """Return the tokenizer of a config.

    Args:
      spec: `data.tokenizer`.
      vocab_top_k: how many of its ids to keep (0: all).
      texts: gives the texts of the training split, which bpe and pruning learn from.
      eot_token: the token that ends a text, where a file has it under an unusual name.
      all_texts: gives the texts of all splits, where these are more; `char` has their characters.
    """
    kind, argument = split_spec(spec)
    tokenizer: Tokenizer
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "char":
        tokenizer = CharTokenizer.of((all_texts or texts)())
    elif kind == "bpe":
        tokenizer = BpeTokenizer.train(texts(), int(argument))
    else:
        tokenizer = read_vocabulary(spec, eot_token or None)
    if kind in ("hf", "sentencepiece"):
        _say_what_it_does(spec, tokenizer)

    if 0 < vocab_top_k < tokenizer.vocab_size:
        pruned = PrunedTokenizer.of(tokenizer, texts(), vocab_top_k)
        say(pruned.describe())
        return pruned
    return tokenizer


def read_vocabulary(spec: str, eot: int | str | None = None) -> Tokenizer:
    """Return the tokenizer of the file or folder that a spec names.

    Args:
      spec: `gpt2`, `gpt2:DIR`, `hf:FILE`, `sentencepiece:FILE` or `llama2c:FILE`.
      eot: the id or token that ends a text, for the kinds whose files may not say.

    Raises:
      UserError: the file can't be read.
    """
    kind, argument = split_spec(spec)
    if kind == "gpt2":
        return Gpt2Tokenizer.of_folder(argument) if argument else Gpt2Tokenizer.of_tiktoken()
    path = pathlib.Path(argument)
    content = read_user_file(path)
    if kind == "hf":
        if eot is None:
            eot = saved_end_id(path)
        return JsonTokenizer(content, eot, declared_end(path))
    if kind == "sentencepiece":
        return SentencePieceTokenizer(content, eot)
    assert kind == "llama2c", f"a tokenizer of kind {kind} is not read from a file"
    return Llama2cTokenizer(content)


def tokenizer_file_hashes(spec: str) -> list[str]:
    """Return hashes of the files that a tokenizer is made of, by which an edit is noticed."""
    kind, argument = split_spec(spec)
    if not argument or kind in ("byte", "char", "bpe"):
        return []
    path = pathlib.Path(argument)
    files = [path]
    if kind == "gpt2":
        files = [path / "encoder.json", path / "vocab.bpe"]
    hashes = [hashlib.sha256(read_user_file(file)).hexdigest() for file in files]
    if kind == "hf":
        ends = [saved_end_id(path), declared_end(path)]
        hashes += [str(end) for end in ends if end not in (None, "")]
    return hashes


def load_tokenizer(folder: Any) -> Tokenizer:
    """Return the tokenizer saved in a folder.

    Args:
      folder: a path, or the address of a folder in a bucket.

    Raises:
      UserError: there is none, or it was altered.
      StorageError: its bucket can't be reached.
    """
    folder = folder_path(folder)
    try:
        with waited_for(folder), explaining(folder, "--workdir"):
            header = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
            tokenizer = _restore(header, folder)
    except StorageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder} holds no whole tokenizer of tinylm ({type(error).__name__}: {error})."
        ) from error
    if tokenizer.fingerprint != header.get("fingerprint"):
        raise UserError(
            f"the tokenizer in {folder} was altered: its fingerprint is not "
            f"{header.get('fingerprint')}."
        )
    return tokenizer


def _restore(header: dict[str, Any], folder: Any) -> Tokenizer:
    """Return the tokenizer that has this header and whose files are in `folder`."""
    kind, _ = split_spec(header["name"])
    tokenizer: Tokenizer
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "char":
        tokenizer = CharTokenizer(header["chars"])
    elif kind == "bpe":
        tokenizer = BpeTokenizer(header["name"], (folder / "tokenizer.json").read_bytes())
    elif kind == "hf":
        tokenizer = JsonTokenizer((folder / "tokenizer.json").read_bytes(), header.get("eot_id"))
    elif kind == "gpt2":
        tokenizer = Gpt2Tokenizer.restore((folder / "gpt2.tiktoken").read_bytes())
    elif kind == "sentencepiece":
        model = (folder / "tokenizer.model").read_bytes()
        tokenizer = SentencePieceTokenizer(model, header.get("eot_id"))
    elif kind == "llama2c":
        tokenizer = Llama2cTokenizer((folder / "tokenizer.bin").read_bytes())
    else:
        raise ValueError(f"a tokenizer of kind {kind} is not known")

    if "cut" in header:
        counts = dict(header["cut"])
        kept = counts.pop("kept")
        return PrunedTokenizer(tokenizer, kept, counts)
    return tokenizer


def _say_what_it_does(spec: str, tokenizer: Tokenizer) -> None:
    """Say which id ends a text, and what a tokenizer of others can't do exactly."""
    if tokenizer.eot_name:
        say(f"{spec} ends a text with {tokenizer.describe_end()}")
    else:
        say(
            f"warning: {spec} has no token of a usual name that ends a text, so it got one more, "
            f"id {tokenizer.eot_id}; if another of its tokens ends a text, set data.eot_token to it"
        )
    altered = tokenizer.altered_words() if isinstance(tokenizer, JsonTokenizer) else []
    if altered:
        text, back = altered[0]
        more = f" (and {len(altered) - 1} more)" if len(altered) > 1 else ""
        say(
            f"warning: {spec} doesn't write its added words back exactly: {text!r} becomes "
            f"{back!r}{more}"
        )
