"""How far a long work on bytes is: a bar on a terminal, a line now and then elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tinylm.core.log import alive, at_work


class Progress:
    """Counts the bytes that are done, also where no bar shows them."""

    def __init__(self, total_bytes: int | None, is_shown: bool, what: str):
        from tqdm import tqdm

        self.done_bytes = 0
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            desc=what,
            leave=False,
            disable=None if is_shown else True,  # None: where there is no terminal
        )

    @property
    def has_bar(self) -> bool:
        """Whether there is a terminal with a bar."""
        return not self._bar.disable

    def update(self, num_bytes: int) -> None:
        """Count more bytes."""
        self.done_bytes += num_bytes
        self._bar.update(num_bytes)

    def reset(self) -> None:
        """Begin at 0 again."""
        self.done_bytes = 0
        self._bar.reset()

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the bar."""
        self._bar.__exit__(*error)


@contextlib.contextmanager
def progress(
    total_bytes: int | None, is_shown: bool, what: str, subject: str = ""
) -> Iterator[Progress]:
    """Show how far a work is while the block runs.

    Args:
      total_bytes: how many bytes there are, where that is known.
      is_shown: whether to show a bar where there is a terminal.
      what: the work, as the bar names it.
      subject: what is worked on, which a line names too.
    """
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(Progress(total_bytes, is_shown, what))
        named = f"{what} {subject}".rstrip()

        def describe() -> str:
            return f"{named}: {work.done_bytes / 1e6:,.0f} MB"

        stack.enter_context(at_work(describe) if work.has_bar else alive(describe))
        yield work
