"""Documents to ids on all cores: batches of text go to a process each, ids come back in order.

    this process     reads batch 5 ...   | writes the ids of batch 1, then 2 ...
    process 1        encodes batch 1, then 4 ...
    process 2        encodes batch 2, then 3 ...

A source that is read within a second is encoded right here, so a small one pays for no start of
processes; so are bytes and characters, which numpy encodes faster than a pipe takes them. What
comes out is the same however many processes there are.

They are plain programs at the end of a pipe. So they end when it closes, also when this process is
killed by kill -9, and a user's script needs no `if __name__ == "__main__"`; the process pool of
`concurrent.futures` has neither property.
"""

import collections
import contextlib
import io
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from tinylm.data.sources.base import Document
from tinylm.data.tokenizers import Tokenizer, load_tokenizer
from tinylm.data.tokenizers.portions import batch_by_chars

ALONE_SECS = 1.0
WORKER_PROGRAM = (
    "import sys; from tinylm.data.encoding import work; work(sys.argv[1], int(sys.argv[2]))"
)


class Encoded(NamedTuple):
    """The ids of all texts of a batch in a row, and how many each text has."""

    ids: np.ndarray
    counts: np.ndarray


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: pathlib.Path
) -> Iterator[tuple[list[Document], Encoded]]:
    """Yield documents in batches, each with its ids.

    Args:
        documents: The documents.
        tokenizer: Encodes them.
        folder: Where the tokenizer is saved, from which other processes load it.

    Yields:
        A batch, and the ids of the prompt and then of the text of each of its documents.
    """
    begun = time.monotonic()
    num_workers = os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        pool: _WorkerPool | None = None
        waiting: collections.deque[tuple[list[Document], futures.Future[Encoded]]]
        waiting = collections.deque()
        for batch in batch_by_chars(documents, _count_chars):
            texts: list[str] = []
            for document in batch:
                texts += (document.prompt, document.text)

            if pool is None:
                if tokenizer.is_light or time.monotonic() - begun < ALONE_SECS:
                    yield batch, encode_texts(tokenizer, texts)
                    continue
                pool = stack.enter_context(_WorkerPool(num_workers, tokenizer, folder))

            # Two batches a worker are read ahead, which bounds memory and keeps all of them busy.
            waiting.append((batch, pool.submit(texts)))
            if len(waiting) > 2 * num_workers:
                oldest, encoded = waiting.popleft()
                yield oldest, encoded.result()
        for batch, encoded in waiting:
            yield batch, encoded.result()


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Return the ids of texts; an empty text has none."""
    ids_of_texts = tokenizer.encode_batch([text for text in texts if text])
    places = [i for i, text in enumerate(texts) if text]
    counts = np.zeros(len(texts), np.int64)
    counts[places] = [len(ids) for ids in ids_of_texts]
    return Encoded(np.concatenate([np.zeros(0, np.int32), *ids_of_texts]), counts)


class _WorkerPool(contextlib.AbstractContextManager):
    """Workers, and as many threads, each of which waits for a worker to encode a batch."""

    def __init__(self, num_workers: int, tokenizer: Tokenizer, folder: pathlib.Path):
        self._tokenizer = tokenizer
        self._threads = futures.ThreadPoolExecutor(num_workers)
        self._workers = [_Worker(folder) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, texts: list[str]) -> "futures.Future[Encoded]":
        """Have a worker encode texts as soon as one is idle."""
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: list[str]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        except (OSError, EOFError):
            # The worker can't be started, or has ended. Where the reason is the text, this says so.
            return encode_texts(self._tokenizer, texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that encodes; it starts with its first batch."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._pipe: Connection | None = None
        self._process: subprocess.Popen | None = None

    def encode(self, texts: list[str]) -> Encoded:
        """Return the ids of texts; raise OSError or EOFError where there is no such process."""
        if self._pipe is None:
            self._pipe = self._start()
        return ask(self._pipe, texts)

    def close(self) -> None:
        """Close the pipe, by which the process ends, and wait for that."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.wait()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        # The process runs one thread, also in the libraries, and finds the modules of this one.
        environment = os.environ | {
            "RAYON_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER_PROGRAM, str(self._folder), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return ours


def ask(pipe: Connection, texts: list[str]) -> Encoded:
    """Have the process at the other end of a pipe encode texts.

    There: the length of each text in characters, then all texts in a row.
    Back: all ids in a row, then how many each text has.
    """
    pipe.send_bytes(np.array([len(text) for text in texts], np.int64).tobytes())
    pipe.send_bytes("".join(texts).encode("utf-8", "surrogatepass"))
    ids = np.frombuffer(pipe.recv_bytes(), np.int32)
    counts = np.frombuffer(pipe.recv_bytes(), np.int64)
    return Encoded(ids, counts)


def work(folder: str, descriptor: int) -> None:
    """Answer `ask` until the pipe is closed: the whole life of a process that encodes.

    Args:
        folder: Where the tokenizer is saved.
        descriptor: The file descriptor of this end of the pipe.
    """
    pipe = Connection(descriptor)
    tokenizer = load_tokenizer(folder)
    with contextlib.suppress(EOFError):
        while True:
            lengths = np.frombuffer(pipe.recv_bytes(), np.int64).tolist()
            joined = pipe.recv_bytes().decode("utf-8", "surrogatepass")
            # Python's files read so many characters; without `newline` they would change "\r\n".
            reader = io.StringIO(joined, newline="")
            encoded = encode_texts(tokenizer, [reader.read(length) for length in lengths])
            pipe.send_bytes(encoded.ids.tobytes())
            pipe.send_bytes(encoded.counts.tobytes())


def _count_chars(document: Document) -> int:
    return len(document.prompt) + len(document.text)
