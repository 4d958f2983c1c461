"""Tokenizers as files that `transformers` reads, and the tokenizer in the folder of a model.

Out: our own files, so that we read back exactly what was written, and a tokenizer.json that gives
the same ids. In: the first that is there of our own files, a tokenizer.json, GPT-2's vocab.json
with merges.txt, and a SentencePiece model.
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
    """Return a model's tokenizer.

    Args:
      folder: of the model.
      given: a file with the tokenizer; "" for the one in the folder.
      eot_id: the id that ends a text, where the model's config names one.

    Raises:
      UserError: where there is no tokenizer, or it can't be read.
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
    """Write a tokenizer for us and, where a tokenizer.json gives the same ids, for `transformers`.

    Args:
      tokenizer: of the model.
      folder: of the model.
      context: the most tokens that the model reads.
    """
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

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
    }
    end = tokenizers.Tokenizer.from_str(content.decode()).id_to_token(tokenizer.eot_id)
    if end:
        settings["bos_token"] = end
        settings["eos_token"] = end
    # Otherwise some versions of transformers take the space before a full stop out of texts.
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def tokenizer_json(tokenizer: Tokenizer) -> bytes | None:
    """Return the content of a tokenizer.json that gives the same ids, or None if none does."""
    if isinstance(tokenizer, PrunedTokenizer):
        return None
    if isinstance(tokenizer, Gpt2Tokenizer):
        return _of_ranks(tokenizer)
    if isinstance(tokenizer, Llama2cTokenizer):
        return tokenizer.inner.to_str().encode()
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {char: byte for byte, char in byte_chars().items()}
        return _byte_level({**vocab, END: tokenizer.eot_id}, merges=[])
    if isinstance(tokenizer, CharTokenizer):
        return _of_chars(tokenizer)
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.eot_name:
        return _with_end(tokenizer)
    return tokenizer.files.get("tokenizer.json")


def _with_end(tokenizer: JsonTokenizer) -> bytes | None:
    """Return a tokenizer.json with the end of text under the id that the run gave it.

    The file had no token for it. None where it can't have that id.
    """
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    inner.add_special_tokens([END])
    # The library gives it the next id after its own count, which is another one where the file's
    # ids have gaps.
    if inner.token_to_id(END) != tokenizer.eot_id:
        return None
    return inner.to_str().encode()


def _of_merges(folder: pathlib.Path, eot_id: int | None) -> JsonTokenizer:
    """Return the tokenizer of the two files that GPT-2 was published with."""
    from tokenizers import models

    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        # The library raises a bare Exception.
        raise UserError(
            f"{folder} has vocab.json and merges.txt that can't be read: {error}."
        ) from error
    return JsonTokenizer(_byte_level(vocab, merges), eot_id)


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bytes:
    """Return the tokenizer.json of byte-level BPE, as GPT-2's.

    Args:
      vocab: id by token; a byte is written as one character, as `byte_chars` has it.
      merges: pairs of tokens that are joined, the first ones first.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if END in vocab:
        inner.add_special_tokens([END])
    return inner.to_str().encode()


def _of_ranks(tokenizer: Gpt2Tokenizer) -> bytes:
    """Return the tokenizer.json of a vocabulary that has ranks, as tiktoken's, but no merges.

    The merge that made a token joined its last two parts, and these are what the merges of lower
    rank make of its bytes.
    """
    rank = {token: i for i, token in enumerate(tokenizer.bytes_of_id)}
    chars = byte_chars()

    def written(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    vocab = {written(token): i for token, i in rank.items()}
    vocab[END] = tokenizer.eot_id
    merges = []
    for token in tokenizer.bytes_of_id:
        if len(token) > 1:
            first, second = _last_two_parts(token, rank)
            merges.append((written(first), written(second)))
    return _byte_level(vocab, merges)


def _last_two_parts(token: bytes, rank: dict[bytes, int]) -> list[bytes]:
    """Return the parts of a token before the merge that made it.

    Joining bytes by rank, the lowest first, arrives at the token in the end; this stops before.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranks = []
        for left, right in itertools.pairwise(parts):
            ranks.append(rank.get(left + right, len(rank)))
        lowest = ranks.index(min(ranks))
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts


def _of_chars(tokenizer: CharTokenizer) -> bytes:
    """Return the tokenizer.json of a vocabulary of characters, which nothing merges."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {char: i for i, char in enumerate(tokenizer.chars)}
    vocab[END] = tokenizer.eot_id
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END])
    return inner.to_str().encode()
