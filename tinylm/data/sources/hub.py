"""The source `hf:`: the parquet files of a data set on the Hugging Face hub.

It goes to the network, but only where a store is made: other processes and later runs know the
store by the name of the data set. huggingface_hub keeps what it fetched in its own cache.
"""

import functools
import pathlib
import re
from collections.abc import Iterator

from tinylm.core.errors import UserError
from tinylm.core.log import alive
from tinylm.core.optional import optional_module
from tinylm.data.sources.base import Document
from tinylm.data.sources.records import VALID_NAMES, ParquetSource, RecordSource


class HubSource(RecordSource):
    """A data set by ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FOLDER of it."""

    @functools.cached_property
    def _files(self) -> list[pathlib.Path]:
        """The files, from the local cache where they are there."""
        huggingface_hub = optional_module("huggingface_hub", "hf")
        org, _, rest = self.argument.partition("/")
        name, _, folder = rest.partition("/")
        name, _, revision = name.partition("@")
        remedy = (
            "download its parquet files where there is a network and set "
            "data.source=parquet:DIR/*.parquet"
        )
        try:
            with alive(lambda: f"fetching {self.spec}"):
                place = huggingface_hub.snapshot_download(
                    f"{org}/{name}",
                    repo_type="dataset",
                    revision=revision or None,
                    allow_patterns=f"{folder}/*.parquet" if folder else "*.parquet",
                )
        except Exception as error:  # the hub raises many kinds, and httpx's and requests' own
            raise UserError(
                f"{self.setting} could not be fetched ({type(error).__name__}); {remedy}."
            ) from error
        files = sorted((pathlib.Path(place) / folder).rglob("*.parquet"))
        if not files:
            raise UserError(f"{self.setting} has no parquet files; {remedy}.")
        return files

    def identity(self) -> list:
        return [super().identity(), self.argument]

    @functools.cached_property
    def own_splits(self) -> bool:
        return any(held_out_split(path) for path in self._files)

    def read_split(self, split: str) -> Iterator[Document]:
        splits = [held_out_split(path) for path in self._files]
        wanted = ""
        if split == "valid":
            # Of several splits that are held out, the one that comes first in VALID_NAMES.
            wanted = min(filter(None, splits), key=VALID_NAMES.index, default="")
        for path, found in zip(self._files, splits, strict=True):
            if found == wanted:
                yield from ParquetSource(f"parquet:{path}", self.config).read(str(path))


def held_out_split(path: pathlib.Path) -> str:
    """Return which split other than train a file belongs to, by its name or its folder's; "" for
    none.
    """
    in_name = re.match(rf"({'|'.join(VALID_NAMES)})(?![a-z])", path.name)
    if in_name:
        return in_name[1]
    return path.parent.name if path.parent.name in VALID_NAMES else ""
