"""The source `tfds:`: a TFDS data set by its name, or by the folder of a prepared version.

What is prepared as array_record is read without TensorFlow. A data set by name is prepared where a
store is made, and only then, which may go to the network and needs TensorFlow.
"""

import contextlib
import functools
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.log import alive
from tinylm.core.optional import optional_module
from tinylm.data.sources.base import Document
from tinylm.data.sources.records import VALID_NAMES, RecordSource


class TfdsSource(RecordSource):
    """A TFDS data set by name or folder."""

    def _folder(self) -> pathlib.Path | None:
        """Return the folder that the spec names, where a prepared version is in it."""
        folder = pathlib.Path(self.argument).expanduser()
        return folder if (folder / "dataset_info.json").exists() else None

    @functools.cached_property
    def _builder(self) -> Any:
        """A builder whose data is prepared as array_record, prepared here where TensorFlow is there
        to do so.
        """
        tfds = optional_module("tensorflow_datasets", "tfds")
        folder = self._folder()
        try:
            if folder:
                return tfds.builder_from_directory(folder)
            return self._prepared(tfds)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"{self.setting} is neither a data set of TFDS nor a folder with a prepared one."
            ) from error
        except ImportError as error:
            raise UserError(
                f"{self.setting} needs TensorFlow to be prepared (pip install 'tinylm[tfds]'); a "
                "data set already prepared as array_record needs none: set data.tfds_data_dir."
            ) from error
        except Exception as error:  # builders raise whatever their own downloads raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.setting} could not be prepared by TFDS ({why}); without a network put its "
                "files in a folder and set data.tfds_manual_dir."
            ) from error

    def _prepared(self, tfds: Any) -> Any:
        """Return the builder of a data set by name, after it downloaded and prepared the data."""
        builder = tfds.builder(
            self.argument,
            data_dir=self.config.tfds_data_dir or None,
            file_format="array_record",
            try_gcs=False,
        )
        download_config = tfds.download.DownloadConfig(
            manual_dir=self.config.tfds_manual_dir or None, try_download_gcs=False
        )
        with (
            alive(lambda: f"preparing {self.spec} by TFDS"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.download_and_prepare(download_config=download_config)
        return builder

    @functools.cached_property
    def own_splits(self) -> bool:
        return self._valid_split() is not None

    def _valid_split(self) -> str | None:
        """Return the name of the split that is held out, where there is one."""
        for name in VALID_NAMES:
            if name in self._builder.info.splits:
                return name
        return None

    def identity(self) -> list:
        c = self.config
        by_name = [] if self._folder() else [self.argument, c.tfds_data_dir, c.tfds_manual_dir]
        return [super().identity(), by_name]

    @property
    def content_files(self) -> list[str]:
        folder = self._folder()
        return [str(path) for path in sorted(folder.iterdir())] if folder else []

    def read_split(self, split: str) -> Iterator[Document]:
        name = self._valid_split() if split == "valid" else "train"
        known = list(self._builder.info.splits)
        if name not in known:
            raise UserError(f"{self.setting} has no split train, only {', '.join(known)}.")
        for number, record in enumerate(self._builder.as_data_source(split=name)):
            yield self.document(record, f"{self.spec}, split {name}, record {number},")
