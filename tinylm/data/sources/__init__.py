"""Where text comes from: one module for each family of sources, and the factory that knows them
all.

`base` has what they share. `text`, `records` and `tokens` read files, which `files` finds, unpacks
and cuts; `hub` and `tfds` fetch data sets, where the user asks for one; `made` and `recall` need
nothing from outside. To add a source, write a class with `read_split` and `identity`, name it here,
and add its kind to `SOURCE_KINDS` of the config.
"""

from tinylm.data.config import DataConfig, split_spec
from tinylm.data.sources.base import Document, Source
from tinylm.data.sources.hub import HubSource
from tinylm.data.sources.made import AdditionSource, TalesSource
from tinylm.data.sources.recall import RecallSource
from tinylm.data.sources.records import JsonlSource, ParquetSource
from tinylm.data.sources.text import TextSource
from tinylm.data.sources.tfds import TfdsSource
from tinylm.data.sources.tokens import TokenSource

__all__ = ["Document", "Source", "make_source"]

_CLASSES: dict[str, type[Source]] = {
    "tales": TalesSource,
    "addition": AdditionSource,
    "recall": RecallSource,
    "text": TextSource,
    "jsonl": JsonlSource,
    "parquet": ParquetSource,
    "tfds": TfdsSource,
    "hf": HubSource,
    "tokens": TokenSource,
}


def make_source(spec: str, config: DataConfig, key: str = "data.source") -> Source:
    """Return the source of documents that a spec of `key` names."""
    kind, _ = split_spec(spec)
    return _CLASSES[kind](spec, config, key)
