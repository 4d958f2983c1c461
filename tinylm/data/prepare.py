"""Preparing: the documents of a source are encoded once, into a token store.

    documents -> encode (threads of the tokenizer's library) -> write (a thread)
                                                                     |
                                                       tokens, mask, ends of documents
                                                                     |
    split by the source, by a hash of each document, or cut at the tail, once all ends are known

A source is read once, and a second time where it is split by a hash, or where a document has to be
cut inside; so no more than a batch of documents is in memory.
"""

import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator
from concurrent import futures

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.data import splits as splits_of
from tinylm.data.encoding import Encoded, encode
from tinylm.data.manifest import SkippedFacts, Split, read_manifest
from tinylm.data.progress import Progress, progress
from tinylm.data.sources.base import Document, Source, good_documents
from tinylm.data.store import StoreWriter, smallest_dtype
from tinylm.data.tokenizers import Tokenizer

SKIPPED = "skipped.txt"
_TOLD_PROBLEMS = 10


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    splits: tuple[str, ...],
    is_shown: bool,
) -> None:
    """Write the store of a source.

    Args:
      source: where the documents come from.
      tokenizer: what encodes them.
      folder: where the store is written; it already holds the tokenizer.
      splits: the splits that the store is to have, such as ("train", "valid").
      is_shown: whether to show a bar, and to say what was prepared.

    Raises:
      UserError: the text is bad, or there is none.
    """
    started = time.monotonic()
    with progress(source.total_bytes(), is_shown, "preparing", source.spec) as work:
        preparer = Preparer(source, tokenizer, folder, work)
        preparer.run(splits)
    if is_shown:
        preparer.tell(time.monotonic() - started)


class Skipped:
    """What was skipped: counted, the first of it kept, and all of it written to a file, a line
    each.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.count = 0
        self.first: list[str] = []

    def note(self, document: Document) -> None:
        """Take in a document that is skipped."""
        line = "; ".join(filter(None, (document.problem, document.remedy)))
        self.count += 1
        if len(self.first) < _TOLD_PROBLEMS:
            self.first.append(line)
        # Opened each time, for what is skipped is rare; a name of a file may be no text.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def forget(self) -> None:
        """Begin again, before the source is read again."""
        self.path.unlink(missing_ok=True)
        self.count = 0
        self.first = []


def tell_skipped(folder: pathlib.Path) -> None:
    """Say what was skipped for the store in `folder`: the first, with file and place, and where the
    rest stands.
    """
    skipped = read_manifest(folder).skipped
    if not skipped.count:
        return
    say(f"skipped {skipped.count:,} documents (data.on_bad_text=skip):")
    for problem in skipped.examples:
        say(f"  {problem}")
    if skipped.count > len(skipped.examples):
        say(f"  all of them are in {folder / SKIPPED}")


class Preparer:
    """Fills one store from one source; `folder` already holds the tokenizer."""

    def __init__(self, source: Source, tokenizer: Tokenizer, folder: pathlib.Path, work: Progress):
        self.source = source
        self.tokenizer = tokenizer
        self.folder = folder
        self.writer = self._new_writer()
        self.skipped = Skipped(folder / SKIPPED)
        self.splits: dict[str, Split] = {}
        self.num_documents = 0  # good ones of the source, whereas the writer counts parts of them
        self._work = work
        self._is_cut_inside = False

    def _new_writer(self) -> StoreWriter:
        dtype = smallest_dtype(self.tokenizer.vocab_size)
        return StoreWriter(self.folder, dtype, self.tokenizer.unknown_ids)

    def run(self, splits: tuple[str, ...]) -> None:
        """Write the store of `splits`, the manifest last."""
        self._add_all(splits)
        if not self.num_documents:
            skips = ""
            if self.skipped.count:
                skips = f" (skipped {self.skipped.count:,}, first: {self.skipped.first[0]})"
            raise UserError(f"{self.source.setting} holds no text{skips}.")
        self.writer.finish(
            self.source.spec,
            self.tokenizer,
            self.splits,
            skipped=SkippedFacts(self.skipped.count, tuple(self.skipped.first)),
            documents=self.num_documents,
            held_out=self._held_out(),
        )

    def tell(self, secs: float) -> None:
        """Say what was prepared in `secs`, what is held out, and what is noteworthy about the
        source.
        """
        megabytes_per_sec = self.writer.num_bytes / 1e6 / max(secs, 1e-9)
        say(
            f"prepared {self.source.spec}: {self.writer.tokens.total:,} tokens of "
            f"{self.num_documents:,} documents in {secs:.1f} s ({megabytes_per_sec:.1f} MB/s)"
        )
        held_out = self._held_out()
        if held_out:
            say(f"held out for validation: {held_out}")
        for remark in self.source.remarks():
            say(f"{self.source.spec}: {remark}.")

    def _held_out(self) -> str:
        """Return which part of a source without splits is held out, in words."""
        if self.source.own_splits or not {"train", "valid"} <= self.splits.keys():
            return ""
        held_out = self.splits["valid"]
        first, end = held_out.documents
        count = end - first
        if self.source.config.valid_split == "random":
            which = f"{count:,} random documents"
        elif self._is_cut_inside and count == 1:
            which = "the end of the last document"
        elif self._is_cut_inside:
            which = f"the last {count:,} documents, cut inside one"
        elif count == 1:
            which = "the last document"
        else:
            which = f"the last {count:,} documents"
        share = held_out.bytes / self.writer.num_bytes
        return f"{which}, {share:.1%} of the text"

    def _add_all(self, splits: tuple[str, ...]) -> None:
        """Write the documents of all splits, one split after the other."""
        c = self.source.config
        if self.source.own_splits:
            for name in splits:
                self._add_split(name, self._good(name))
        elif len(splits) == 1 or not c.valid_fraction:
            self._add_split(splits[0], self._good("all"))
        elif c.valid_split == "random":
            self._add_random()
        else:
            self._add_and_cut()

    def _good(self, split: str) -> Iterator[Document]:
        """Yield the good documents of a split, and count them."""
        documents = self.source.documents(split)
        policy = self.source.config.on_bad_text
        for document in good_documents(documents, policy, self.skipped.note):
            self.num_documents += 1
            yield document

    def _start_over(self) -> None:
        """Forget what was read and written, before the source is read again."""
        self.writer.close()
        self.writer = self._new_writer()
        self.skipped.forget()
        self.num_documents = 0
        self._work.reset()

    def _add(self, documents: Iterable[Document], *, closed: bool = True) -> float | None:
        """Write documents on a thread of its own.

        Args:
          documents: what to write.
          closed: whether an end of text follows each.

        Returns:
          The sum of their log probabilities; None where one has none.
        """
        log_prob: float | None = 0.0
        # A library's threads encode a batch while this one writes the batch before.
        with futures.ThreadPoolExecutor(1) as thread:
            writing: futures.Future | None = None
            for batch, encoded in encode(documents, self.tokenizer):
                for document in batch:
                    if document.log_prob is None:
                        log_prob = None
                    elif log_prob is not None:
                        log_prob += document.log_prob
                if writing:
                    writing.result()
                writing = thread.submit(self._write, batch, encoded, closed)
            if writing:
                writing.result()
        return log_prob

    def _write(self, batch: list[Document], encoded: Encoded, closed: bool) -> None:
        """Write a batch; `encoded` counts the ids of prompt and text of each document in turn."""
        ids, counts = encoded
        prompt_lengths = counts[0::2]
        text_lengths = counts[1::2]
        lengths = prompt_lengths + text_lengths
        if closed:
            document_ends = np.cumsum(lengths)
            ids = np.insert(ids, document_ends, self.tokenizer.eot_id)
            lengths = lengths + 1
        sizes = np.array([splits_of.num_bytes(document) for document in batch])
        self.writer.add(ids, lengths, sizes, prompt_lengths)
        self._work.update(int(sizes.sum()))

    def _add_split(self, name: str, documents: Iterable[Document]) -> None:
        """Write the documents of one split."""
        first = self.writer.num_documents
        log_prob = self._add(documents)
        self._note_split(name, first, self.writer.num_documents, log_prob)

    def _note_split(self, name: str, first: int, end: int, log_prob: float | None = None) -> None:
        """Note that a split has the documents from `first` to before `end`, where it has any."""
        if first == end:
            return
        first_token, first_byte = self._written_before(first)
        end_token, end_byte = self._written_before(end)
        self.splits[name] = Split(
            documents=(first, end),
            tokens=(first_token, end_token),
            bytes=end_byte - first_byte,
            log_prob=log_prob,
        )

    def _written_before(self, document: int) -> tuple[int, int]:
        """Return how many tokens and bytes come before a document."""
        if document == 0:
            return 0, 0
        num_tokens, num_bytes = self.writer.document_ends()[document - 1].tolist()
        return num_tokens, num_bytes

    def _add_random(self) -> None:
        """Read the source twice, once for each side, so that neither is held in memory."""
        fraction = self.source.config.valid_fraction
        for name in ("train", "valid"):
            # What is skipped, and how many documents there are, counts once.
            self.skipped.forget()
            self.num_documents = 0
            documents = splits_of.side_of(self._good("all"), name, fraction)
            self._add_split(name, documents)
        if self.num_documents and self.splits.keys() != {"train", "valid"}:
            raise UserError(
                f"data.valid_split=random put all {self.num_documents:,} documents of "
                f"{self.source.setting} on one side; set data.valid_split=tail, or another "
                "data.valid_fraction."
            )

    def _add_and_cut(self) -> None:
        """Write all documents, and cut between two; where that would stray far, start over and cut
        inside one.
        """
        documents = self._good("all")
        first_two = list(itertools.islice(documents, 2))
        if not first_two:
            return
        if len(first_two) == 1 and not first_two[0].prompt:
            share = 1 - self.source.config.valid_fraction
            self._add_parts(splits_of.Cut(0, share), iter(first_two))
            return
        self._add(itertools.chain(first_two, documents))
        ends = self.writer.document_ends()[:, 1]
        has_prompts = self.writer.masks.total > 0
        cut = splits_of.choose_cut(ends, self.source, can_cut_inside=not has_prompts)
        if cut.inside:
            self._start_over()
            self._add_parts(cut, self._good("all"))
            return
        self._note_split("train", 0, cut.document)
        self._note_split("valid", cut.document, self.writer.num_documents)

    def _add_parts(self, cut: splits_of.Cut, documents: Iterator[Document]) -> None:
        """Write documents of which one is cut inside: no end of text follows its first part.

        A text that is alone has no end of text at all, as in nanoGPT: there would be none to learn
        from.
        """
        self._is_cut_inside = True
        self._add(itertools.islice(documents, cut.document))
        first_part, second_part = splits_of.parts(next(documents), cut)
        if first_part.text:
            self._add([first_part], closed=False)
        middle = self.writer.num_documents

        following = list(itertools.islice(documents, 1))
        is_alone = cut.document == 0 and not following
        if second_part.text:
            self._add([second_part], closed=not is_alone)
        self._add(itertools.chain(following, documents))
        end = self.writer.num_documents

        self._note_split("train", 0, middle)
        self._note_split("valid", middle, end)
