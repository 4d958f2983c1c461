"""Tokenizers as the files that `transformers` reads, and the tokenizer that lies in a model's
folder.

Out: our own files, so that we read back exactly what was written, and a tokenizer.json that gives
the same ids. In: our own files, a tokenizer.json, GPT-2's vocab.json with merges.txt, or a
SentencePiece model, whichever is there first.
"""

import itertools
import json
import pathlib
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.data.tokenizers import (
    END,
    HEADER_FILE,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    JsonTokenizer,
    Llama2cTokenizer,
    PrunedTokenizer,
    Tokenizer,
    byte_chars,
    load_tokenizer,
    read_vocabulary,
)

_KIND_OF_SUFFIX = {".json": "hf", ".model": "sentencepiece", ".bin": "llama2c"}
_KIND_OF_FILE = {
    "tokenizer.json": "hf",
    "tokenizer.model": "sentencepiece",
    "tokenizer.bin": "llama2c",
}


def find_tokenizer(folder: pathlib.Path, given: str, eot_id: int | None = None) -> Tokenizer:
    """Return the tokenizer of the file `given`, or else the one in a model's folder, whose texts
    end with `eot_id`.
    """
    if given:
        kind = _KIND_OF_SUFFIX.get(pathlib.Path(given).suffix)
        if kind is None:
            raise UserError(
                f"--tokenizer={given} must be a .json (Hugging Face), .model (SentencePiece) or "
                ".bin (llama2.c)."
            )
        return read_vocabulary(f"{kind}:{given}", eot_id)
    if (folder / HEADER_FILE).exists():
        return load_tokenizer(folder)
    if (folder / "tokenizer.json").exists():
        return read_vocabulary(f"hf:{folder / 'tokenizer.json'}", eot_id)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _of_merges(folder, eot_id)
    if (folder / "tokenizer.model").exists():
        return read_vocabulary(f"sentencepiece:{folder / 'tokenizer.model'}")
    raise UserError(
        f"{folder} holds no tokenizer.json, vocab.json with merges.txt, or tokenizer.model; set "
        "--tokenizer=FILE."
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary "
            f"{vocab_size}; set --tokenizer to the one that the model was trained with."
        )


def data_tokenizer(tokenizer: Tokenizer, folder: Any) -> str:
    """Return the `data.tokenizer` that reads the tokenizer saved in `folder` again."""
    for name, kind in _KIND_OF_FILE.items():
        if name in tokenizer.files:
            return f"{kind}:{folder / name}"
    return tokenizer.name


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, context: int) -> None:
    """Write a tokenizer for us and, where one can say the same, for `transformers`."""
    tokenizer.save(folder)
    content = tokenizer_json(tokenizer)
    if content is None:
        say(
            f"no tokenizer.json gives the ids of tokenizer {tokenizer.name}; {folder.name} has it "
            "for tinylm alone"
        )
        return
    (folder / "tokenizer.json").write_bytes(content)
    import tokenizers

    end = tokenizers.Tokenizer.from_str(content.decode()).id_to_token(tokenizer.eot_id)
    special = {"bos_token": end, "eos_token": end} if end else {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        **special,
    }
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def tokenizer_json(tokenizer: Tokenizer) -> bytes | None:
    """Return a tokenizer.json with the same ids, or None where there is no such thing."""
    if isinstance(tokenizer, PrunedTokenizer):
        return None
    if isinstance(tokenizer, Gpt2Tokenizer):
        return _of_ranks(tokenizer)
    if isinstance(tokenizer, Llama2cTokenizer):
        return tokenizer.inner.to_str().encode()
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_level(
            {char: byte for byte, char in byte_chars().items()} | {END: tokenizer.eot_id}, []
        )
    if isinstance(tokenizer, CharTokenizer):
        return _of_chars(tokenizer)
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.eot_name:
        return _with_end(tokenizer)
    return tokenizer.files.get("tokenizer.json")


def _with_end(tokenizer: JsonTokenizer) -> bytes | None:
    """Add the end of text, which the file had no token for, under the id that the run gave it."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    inner.add_special_tokens([END])
    # The library gives it the next id after its own count, which is another one where the file's
    # ids have gaps.
    return inner.to_str().encode() if inner.token_to_id(END) == tokenizer.eot_id else None


def _of_merges(folder: pathlib.Path, eot_id: int | None) -> JsonTokenizer:
    """Read the two files of GPT-2's kind."""
    from tokenizers import models

    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"{folder} has vocab.json and merges.txt that can't be read: {error}."
        ) from error
    return JsonTokenizer(_byte_level(vocab, merges), eot_id)


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bytes:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if END in vocab:
        inner.add_special_tokens([END])
    return inner.to_str().encode()


def _of_ranks(tokenizer: Gpt2Tokenizer) -> bytes:
    """Find the merges again: a token's parts are what the merges before it make of its bytes."""
    rank = {token: i for i, token in enumerate(tokenizer.bytes_of_id)}
    chars = byte_chars()

    def written(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    def parts(token: bytes) -> list[bytes]:
        pieces = [bytes([byte]) for byte in token]
        while len(pieces) > 2:
            pairs = [rank.get(a + b, len(rank)) for a, b in itertools.pairwise(pieces)]
            at = pairs.index(min(pairs))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces

    longer = [parts(token) for token in tokenizer.bytes_of_id if len(token) > 1]
    merges = [(written(first), written(second)) for first, second in longer]
    vocab = {written(token): i for token, i in rank.items()} | {END: tokenizer.eot_id}
    return _byte_level(vocab, merges)


def _of_chars(tokenizer: CharTokenizer) -> bytes:
    """A vocabulary of characters that nothing merges."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {char: i for i, char in enumerate(tokenizer.chars)} | {END: tokenizer.eot_id}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END])
    return inner.to_str().encode()
