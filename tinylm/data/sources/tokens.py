"""The source `tokens:`: files of ids that another program made, which are read where they lie.

They hold no text; `tinylm.data.token_files` makes the store of them.
"""

from tinylm.data.sources.base import FileSource


class TokenSource(FileSource):
    """Files of ids; it has no documents of text."""

    endings = (".bin",)
