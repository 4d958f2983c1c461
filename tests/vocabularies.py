"""Small vocabularies in the files of other programs, for tests that need no real ones."""

import json
import pathlib
import struct

from tinylm.data.tokenizers import BpeTokenizer
from tinylm.data.tokenizers.tokenizer_json import byte_chars

TEXT = "Once upon a time, there was a cat. The cat ate the hat, and that was that. " * 9


def write_gpt2(folder: pathlib.Path) -> pathlib.Path:
    """Write `encoder.json` and `vocab.bpe` as OpenAI's are, of a few merges; return the folder."""
    trained = json.loads(BpeTokenizer.train([TEXT], 320).files["tokenizer.json"])
    merges = [" ".join(merge) for merge in trained["model"]["merges"]]
    tokens = [*byte_chars().values(), *(merge.replace(" ", "") for merge in merges)]
    assert len(set(tokens)) == len(tokens) > 256, "each merge makes a token of its own"
    ids = {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(ids))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def write_llama2c(path: pathlib.Path, vocab_size: int = 300) -> pathlib.Path:
    """Write llama2.c's special ids and bytes, then pieces that merge by score; return the path."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += [*" abcdet", "at", " a", "the", " the", "cat", " cat", "ed", "th", "he", "h"]
    pieces += [f"unused{i}" for i in range(vocab_size - len(pieces))]
    content = struct.pack("<i", max(len(piece) for piece in pieces))
    for i, piece in enumerate(pieces):
        content += struct.pack("<fi", -float(i), len(piece.encode())) + piece.encode()
    path.write_bytes(content)
    return path
