"""Documents to ids on all cores: batches of text go to a process each, their ids come back in
order.

A source that is read within a second is encoded right here, so a small one pays for no start of
processes; so are bytes and characters, which numpy encodes faster than a pipe takes them. Beyond
that, this process reads ahead and writes while as many others as there are cores encode; what comes
out is the same however many there are. They are plain programs at the end of a pipe, which end when
it closes: also by kill -9.
"""

import collections
import contextlib
import io
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from tinylm.data.sources.base import Document
from tinylm.data.tokenizers import Tokenizer, load_tokenizer
from tinylm.data.tokenizers.portions import batch_by_chars

ALONE_SECS = 1.0
_WORKER = "import sys; from tinylm.data.encoding import work; work(sys.argv[1], int(sys.argv[2]))"

Encoded = tuple[np.ndarray, np.ndarray]


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: pathlib.Path
) -> Iterator[tuple[list[Document], Encoded]]:
    """Yield batches with `encode_texts` of the prompt and text of each; the tokenizer is saved in
    `folder`.
    """
    begun = time.monotonic()
    waiting: collections.deque = collections.deque()
    with contextlib.ExitStack() as stack:
        pool = None
        for batch in batch_by_chars(documents, _count_chars):
            texts = [text for document in batch for text in (document.prompt, document.text)]
            if tokenizer.is_light or (pool is None and time.monotonic() - begun < ALONE_SECS):
                yield batch, encode_texts(tokenizer, texts)
                continue
            pool = pool or stack.enter_context(_Processes(tokenizer, folder))
            waiting.append((batch, pool.submit(pool.encode, texts)))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def _count_chars(document: Document) -> int:
    return len(document.prompt) + len(document.text)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Return the ids of all texts in a row, and how many each has; an empty text has none."""
    ids = tokenizer.encode_batch([text for text in texts if text])
    counts = np.zeros(len(texts), np.int64)
    counts[[i for i, text in enumerate(texts) if text]] = [len(one) for one in ids]
    return np.concatenate([np.zeros(0, np.int32), *ids]), counts


class _Processes(futures.ThreadPoolExecutor):
    """Threads that each feed a process of their own."""

    def __init__(self, tokenizer: Tokenizer, folder: pathlib.Path):
        super().__init__(os.cpu_count())
        self._tokenizer, self._folder = tokenizer, folder
        self._own, self._closing = threading.local(), contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)
        self._closing.close()

    def encode(self, texts: list[str]) -> Encoded:
        """Encode in the process of this thread; where that fails, here, which says why if it was
        the text.
        """
        try:
            if not hasattr(self._own, "pipe"):
                self._own.pipe = self._start()
            return _ask(self._own.pipe, texts)
        except (OSError, EOFError):
            return encode_texts(self._tokenizer, texts)

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            # One thread a process, also in the libraries; and the modules that this process has.
            environment = os.environ | {
                "RAYON_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(self._folder), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._closing.callback(process.wait)
        self._closing.callback(ours.close)
        return ours


def _ask(pipe: Connection, texts: list[str]) -> Encoded:
    pipe.send_bytes(np.fromiter(map(len, texts), np.int64).tobytes())
    pipe.send_bytes("".join(texts).encode("utf-8", "surrogatepass"))
    return np.frombuffer(pipe.recv_bytes(), np.int32), np.frombuffer(pipe.recv_bytes(), np.int64)


def work(folder: str, descriptor: int) -> None:
    """Encode what comes through a pipe until that is closed: the whole life of such a process."""
    pipe = Connection(descriptor)
    tokenizer = load_tokenizer(folder)
    with contextlib.suppress(EOFError):
        while True:
            lengths = np.frombuffer(pipe.recv_bytes(), np.int64).tolist()
            text = io.StringIO(pipe.recv_bytes().decode("utf-8", "surrogatepass"), newline="")
            for part in encode_texts(tokenizer, [text.read(length) for length in lengths]):
                pipe.send_bytes(part.tobytes())
