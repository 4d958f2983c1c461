"""The manifest of a token store: what its `manifest.json` says.

The fields are the keys of the file. It is written last, so a folder that has one is a whole store:

    {"format": 2, "dtype": "uint16", "tokens": 4096, "documents": 12, ...
     "shards": [{"file": "tokens-00000.bin", "items": 4096, "sha256": "..."}],
     "splits": {"train": {"documents": [0, 11], "tokens": [0, 3700], "bytes": 14512}, ...}}
"""

import dataclasses
import json
import pathlib
from typing import Any

from tinylm.core.errors import StorageError, UserError
from tinylm.data.tokenizers import Tokenizer

FORMAT = 2  # 2: stores are named by the content of their files
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file that holds a stretch of an array.

    Attributes:
      file: its name in the folder of the store. A ready file lies elsewhere and may be moved, so
        the manifest has its last name alone; the reader puts in the whole path.
      items: how many items it has.
      dtype: their type, where the shards of an array may differ in it: ready files do.
      sha256: its checksum; None while nobody knows it.
    """

    file: str
    items: int
    dtype: str | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a store.

    Attributes:
      documents: its first document, and the one after its last.
      tokens: its first token, and the one after its last.
      bytes: how many bytes of text it stands for.
      log_prob: the log probability of that text in nats, where the source knows it.
    """

    documents: tuple[int, int]
    tokens: tuple[int, int]
    bytes: int
    log_prob: float | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        begin, end = self.tokens
        return end - begin


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """What a store says about the tokenizer that made its ids."""

    name: str
    fingerprint: str
    vocab_size: int
    eot_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerFacts":
        """Return the facts about a tokenizer."""
        return cls(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
        )


@dataclasses.dataclass(frozen=True)
class SkippedFacts:
    """How many documents were skipped, and the problems of the first of them."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
      dtype: the type of the ids in its own shards.
      tokens: how many tokens there are, over all splits.
      documents: how many documents the source gave.
      bytes: how many bytes of text they have; 0 for ready ids.
      unknown: how many tokens stand for what the tokenizer can't spell.
      shards: the files of ids.
      mask_shards: the files that say which tokens carry loss, where there are prompts.
      document_shards: the file with the ends of documents.
      source: the spec of the source.
      tokenizer: what made the ids.
      splits: the splits by name, "train" or "valid".
      skipped: what was skipped.
      held_out: which part is held out for validation, in words; empty where the source says it.
    """

    dtype: str
    tokens: int
    documents: int
    bytes: int
    unknown: int
    shards: list[Shard]
    mask_shards: list[Shard]
    document_shards: list[Shard]
    source: str
    tokenizer: TokenizerFacts
    splits: dict[str, Split]
    skipped: SkippedFacts
    held_out: str = ""

    def content(self) -> str:
        """Return the content of the file."""
        return json.dumps({"format": FORMAT, **as_json(self)}, indent=1)

    def write(self, folder: pathlib.Path) -> None:
        """Write the manifest into the folder of its store."""
        (folder / MANIFEST).write_text(self.content(), encoding="utf-8")


def as_json(facts: Any) -> dict[str, Any]:
    """Return one of these dataclasses as the file has it: without what is None."""

    def without_none(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if value is not None}

    return dataclasses.asdict(facts, dict_factory=without_none)


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a finished store.

    Raises:
      StorageError: it can't be read, or lacks something.
      UserError: it is of another version of tinylm.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} can't be read ({error}); delete {folder}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a token store of another version of tinylm; delete it to prepare it "
            "again."
        )
    try:
        return _restore(content)
    except (LookupError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} can't be read ({type(error).__name__}: {error}); delete {folder}."
        ) from error


def _restore(content: dict[str, Any]) -> Manifest:
    """Return the manifest of a file's content; LookupError or TypeError where that lacks a part."""
    splits: dict[str, Split] = {}
    for name, split in content["splits"].items():
        splits[name] = Split(
            documents=tuple(split["documents"]),
            tokens=tuple(split["tokens"]),
            bytes=split["bytes"],
            log_prob=split.get("log_prob"),
        )
    skipped = content["skipped"]
    return Manifest(
        dtype=content["dtype"],
        tokens=content["tokens"],
        documents=content["documents"],
        bytes=content["bytes"],
        unknown=content["unknown"],
        shards=_restore_shards(content["shards"]),
        mask_shards=_restore_shards(content["mask_shards"]),
        document_shards=_restore_shards(content["document_shards"]),
        source=content["source"],
        tokenizer=TokenizerFacts(**content["tokenizer"]),
        splits=splits,
        skipped=SkippedFacts(skipped["count"], tuple(skipped["examples"])),
        held_out=content.get("held_out", ""),
    )


def _restore_shards(content: list[dict[str, Any]]) -> list[Shard]:
    return [Shard(**shard) for shard in content]
