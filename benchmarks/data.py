"""Measure data: encoding compared with tiktoken, preparing, batches warm and cold, a store of 10^12
tokens.

python benchmarks/data.py --vocabulary=DIR --text='tinystories/*.txt'

`DIR` holds GPT-2's encoder.json and vocab.bpe. The big store is made of sparse files, which take no
room. Times depend on what else the machine does; each is the best of several.
"""

import contextlib
import functools
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.data.manifest import Shard, SkippedFacts, Split, read_manifest
from tinylm.data.packing import StreamPlan
from tinylm.data.pipeline import train_batches
from tinylm.data.prepare import prepare
from tinylm.data.rows import Rows, SplitRows
from tinylm.data.sources import make_source
from tinylm.data.store import Store, StoreWriter
from tinylm.data.tokenizers import ByteTokenizer

ROWS, SEQ_LEN, STEP_SECS = 12, 64, 0.015  # what configs/shakespeare_char_cpu.py asks for
TRILLION = 10**12


def best_secs(work: Callable[[], Any], tries: int = 5) -> float:
    """Return the shortest of several times that `work` took."""
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def bench_encoding(vocabulary: str, text: str) -> None:
    """Compare GPT-2 encoding with `tiktoken.encode_batch`, in time and in ids."""
    from tinylm.data.tokenizers import Gpt2Tokenizer

    tokenizer = Gpt2Tokenizer.of_folder(vocabulary)
    texts = [
        document.text for document in make_source(f"text:{text}", DataConfig()).documents("all")
    ]
    ours, theirs = tokenizer.encode_batch(texts), tokenizer.inner.encode_batch(texts)
    equal = all(a.tolist() == b for a, b in zip(ours, theirs, strict=True))
    size = sum(len(text.encode()) for text in texts) / 1e6
    mine = best_secs(lambda: tokenizer.encode_batch(texts))
    plain = best_secs(lambda: tokenizer.inner.encode_batch(texts))
    print(
        f"encoding  {sum(map(len, ours)) + len(ours):,} ids, "
        f"{'equal to' if equal else 'DIFFERENT FROM'} tiktoken's"
    )
    print(f"          tinylm {size / mine:.1f} MB/s, tiktoken.encode_batch {size / plain:.1f} MB/s")


def bench_preparing(spec: str, text: str, folder: str) -> None:
    """Time what makes a store of a text, with the tokenizer `spec`."""
    from tinylm.data.tokenizers import build_tokenizer

    config = DataConfig(f"text:{text}", tokenizer=spec)
    source = make_source(config.source, config)
    first_documents = itertools.islice(source.documents("all"), 2000)
    texts = [document.text for document in first_documents]
    tokenizer = build_tokenizer(spec, 0, lambda: texts)
    place = pathlib.Path(folder, tokenizer.fingerprint)
    place.mkdir()
    begun = time.perf_counter()
    prepare(source, tokenizer, place, ("train", "valid"), is_shown=False)
    secs = time.perf_counter() - begun
    num_bytes = read_manifest(place).bytes
    print(f"preparing {tokenizer.name:<9} {num_bytes / 1e6 / secs:.1f} MB/s")


def drop_cache(store: Store) -> None:
    """Ask the system to forget the pages of a store."""
    for path in store.folder.rglob("*.bin"):
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def secs_per_batch(rows: Rows, batches: int = 200) -> float:
    """Return the time for a batch through the pipeline."""
    stream = train_batches(rows, batch_shape=(1, ROWS), owned_rows=np.arange(ROWS))
    next(stream)
    begun = time.perf_counter()
    for _ in range(batches):
        next(stream)
    secs = (time.perf_counter() - begun) / batches
    stream.close()
    return secs


def bench_assembling(folder: str) -> None:
    """Time batches of the small CPU setting, of each packing, from a warm and from a cold page
    cache.
    """
    for packing in ("stream", "packed", "single"):
        config = DataConfig(
            "tales", seq_len=SEQ_LEN, batch_size=ROWS, packing=packing, store_dir=folder
        )
        warm = min(
            secs_per_batch(open_data(config, seed=0, progress=False).train) for _ in range(3)
        )
        data = open_data(config, seed=1, progress=False)
        drop_cache(data.stores[0])
        cold = secs_per_batch(data.train)
        print(
            f"batches   {packing:<7} warm {warm * 1e3:.2f} ms ({STEP_SECS / warm:.0f} times what "
            f"training takes), cold {cold * 1e3:.2f} ms ({STEP_SECS / cold:.0f} times)"
        )


def sparse_store(folder: pathlib.Path, num_tokens: int) -> None:
    """Make a store of `num_tokens` zeros in sparse files."""
    folder.mkdir()
    shard = 1 << 34
    shards = []
    for number, begin in enumerate(range(0, num_tokens, shard)):
        size = min(shard, num_tokens - begin)
        name = f"tokens-{number:05d}.bin"
        with (folder / name).open("wb") as file:
            file.truncate(2 * size)
        shards.append(Shard(name, size))
    writer = StoreWriter(folder, np.dtype(np.uint16))
    writer.ends.append(np.array([num_tokens, num_tokens]))
    writer.finish(
        "zeros",
        ByteTokenizer(),
        {"train": Split((0, 1), (0, num_tokens), bytes=num_tokens)},
        skipped=SkippedFacts(),
        ready_shards=shards,
    )


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(
        pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    ) * os.sysconf("SC_PAGE_SIZE")


def bench_large(folder: str) -> None:
    """Open stores of 10^7 and 10^12 tokens and read shuffled windows from each, then the same
    windows again.

    A small store is read ahead when it is opened. In a large one the system fetches, at the first
    touch of a window, a page of the file (for these sparse ones: clears it), so the first reading
    says what that costs, and the second what finding a window costs, which doesn't depend on the
    size.
    """
    for name, num_tokens in (("small", 10**7), ("large", TRILLION)):
        place = pathlib.Path(folder) / name
        sparse_store(place, num_tokens)
        begun = time.perf_counter()
        store = Store(place)
        rows = SplitRows(store, "train", StreamPlan(num_tokens, 1024), 1024, seed=0)
        opened = time.perf_counter() - begun
        rows.read(np.arange(8))
        first, again = [], []
        for batch in np.arange(64 * 40).reshape(-1, 64):
            first.append(best_secs(functools.partial(rows.read, batch), 1))
            again.append(best_secs(functools.partial(rows.read, batch)))
        print(
            f"store     10^{len(str(num_tokens)) - 1} tokens opens in {opened * 1e3:.1f} ms, "
            f"{resident_bytes() / 1e6:.0f} MB resident, 64 random windows of 1,024 in "
            f"{min(first) * 1e3:.2f} ms, again in {min(again) * 1e3:.2f} ms"
        )


@contextlib.contextmanager
def working_folder() -> Iterator[str]:
    """Give a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def main(_: list[str]) -> None:
    """Print all figures."""
    with working_folder() as folder:
        bench_large(folder)
        bench_assembling(folder)
    if flags.FLAGS.vocabulary and flags.FLAGS.text:
        bench_encoding(flags.FLAGS.vocabulary, flags.FLAGS.text)
        with working_folder() as folder:
            bench_preparing(f"gpt2:{flags.FLAGS.vocabulary}", flags.FLAGS.text, folder)
            bench_preparing("bpe:4096", flags.FLAGS.text, folder)


if __name__ == "__main__":
    flags.DEFINE_string("vocabulary", "", "folder with GPT-2's encoder.json and vocab.bpe")
    flags.DEFINE_string("text", "", "glob of the text to encode")
    app.run(main)
