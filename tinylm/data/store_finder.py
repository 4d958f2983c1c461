"""Finds the token stores of a config, and makes those that aren't there yet.

    source, splits --text_key--> what decides the text     \\
                                                             store_name -> folder: there, or made
    tokenizer ----tokenizer_key--> what decides the ids     /

A store is named by what decides its content (the files' checksums, the settings, the tokenizer), so
text that was moved or touched finds its store again, and no tokenizer is made where all stores are
there. One process of a job makes them, while the others wait.

A tokenizer that learns from the text (bpe, or a cut to the most common ids) learns from the
training split alone, before the first store is made; only the alphabet of `char` is that of all
text, since it has no id for any other character.
"""

import functools
import itertools
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.log import alive, say
from tinylm.core.storage import in_bucket
from tinylm.data import atomic, content, prepare, stores
from tinylm.data.bucket_files import BlockCache, Remote
from tinylm.data.bucket_stores import StoreBucket, cache_bytes, choose_whole
from tinylm.data.config import DataConfig, parse_mixture, split_spec
from tinylm.data.manifest import MANIFEST, read_manifest
from tinylm.data.progress import progress as progress_of
from tinylm.data.sources import make_source
from tinylm.data.sources.base import Document, Source, good_documents
from tinylm.data.sources.tokens import TokenSource
from tinylm.data.splits import training_documents
from tinylm.data.store import Store
from tinylm.data.token_files import prepare_token_files
from tinylm.data.tokenizers import Tokenizer, build_tokenizer, tokenizer_file_hashes

WAIT_SECS = 1800.0
# How long process 0 may prepare for a bucket; that it lives, JAX watches.
_LONGEST_SECS = 7 * 24 * 3600.0
_LOOKED_AT_DOCUMENTS = 1000
_NUM_EXAMPLES = 3

# A store: of a source, and of which of its splits.
Wanted = tuple[Source, tuple[str, ...]]


class StoreFinder:
    """Finds or makes the stores of one config, and at most once the tokenizer that they share.

    Attributes:
      weights: the share of each source in the mixture.
      sources: the sources to train on.
      valid_sources: what data.valid_source names: one source, or none.
      train_splits: the splits that the stores of `sources` have.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer | None = None,
        is_writer: bool = True,
        wait_secs: float = WAIT_SECS,
        is_shown: bool = True,
        key: str = "data.source",
    ):
        """Read what a config names.

        Args:
          config: the config.
          tokenizer: takes the place of the one that the config names.
          is_writer: whether this process makes stores, rather than wait for another that does.
          wait_secs: how long it waits.
          is_shown: whether to show how far a long work is.
          key: what messages call the source.

        Raises:
          UserError: a source can't be read.
        """
        mixture = parse_mixture(config.source)
        self.weights = [weight for weight, _ in mixture]
        self.sources = [make_source(spec, config, key) for _, spec in mixture]
        self.valid_sources: list[Source] = []
        if config.valid_source:
            source = make_source(config.valid_source, config, "data.valid_source")
            self.valid_sources.append(source)
        self.train_splits = ("train",) if self.valid_sources else ("train", "valid")
        self._config = config
        self._given_tokenizer = tokenizer
        self._is_writer = is_writer
        self._wait_secs = wait_secs
        self._is_shown = is_shown
        self._folder = stores.store_folder(config)
        self._bucket: StoreBucket | None = None
        if in_bucket(config.store_dir):
            self._bucket = StoreBucket(config.store_dir, config.outage_secs)
        self._checksums_of: dict[str, list[str]] = {}

    def open_stores(self, wanted: Sequence[Wanted]) -> list[Store]:
        """Return stores, made by this process, by another, or long ago.

        They are all that a run reads, since those in a bucket share the room on this disk.
        """
        if self._bucket is not None:
            return self._open_in_bucket(self._bucket, wanted)
        return [self._open_here(source, splits) for source, splits in wanted]

    def _open_here(self, source: Source, splits: tuple[str, ...]) -> Store:
        """Return a store on this disk."""
        folder = self.folder_of(source, splits)
        if not self._is_writer:
            stores.wait_for([folder], self._wait_secs)
        elif not _is_whole(folder):
            self._make(source, splits, folder)
        ready_files = source.local_files if isinstance(source, TokenSource) else ()
        return Store(folder, source.spec, ready_files)

    def _make(self, source: Source, splits: tuple[str, ...], folder: pathlib.Path) -> None:
        """Prepare the store of some splits of a source, and say what is noteworthy about it."""
        atomic.make(folder, _is_whole, functools.partial(self._fill, source, splits))
        self._tell_unknown(source, folder)
        if self._is_shown:
            prepare.tell_skipped(folder)

    def _open_in_bucket(self, bucket: StoreBucket, wanted: Sequence[Wanted]) -> list[Store]:
        """Return stores that are in a bucket, prepared there first by process 0 where they aren't.

        Only process 0 needs the text and the tokenizer: the others are told the stores' names.
        """
        # It brings JAX, which is not needed to prepare data alone.
        from tinylm.core.agreement import from_main

        with alive(lambda: f"preparing data for {bucket.url}"):
            names = from_main(lambda: self._prepare_in_bucket(bucket, wanted), _LONGEST_SECS)
        if self._is_writer:
            self._fetch(bucket, names)
        folders: list[pathlib.Path] = []
        for name in names:
            whole = self._folder / name
            part = self._part(name)
            if not self._is_writer:
                stores.wait_for([whole, part], self._wait_secs)
            folders.append(whole if _is_whole(whole) else part)

        cache: BlockCache | None = None
        opened: list[Store] = []
        for name, folder, (source, _) in zip(names, folders, wanted, strict=True):
            remote = None
            if folder == self._part(name):
                if cache is None:
                    cache = self._block_cache(folders)
                remote = Remote(bucket.url_of(name), cache, self._config.outage_secs)
            opened.append(Store(folder, source.spec, remote=remote))
        return opened

    def _block_cache(self, folders: Sequence[pathlib.Path]) -> BlockCache:
        """Return the cache of blocks, which has the room that copies of stores in `folders` leave.

        Those of earlier runs may leave little, and stay.
        """
        kept_bytes = sum(stores.num_bytes(folder) for folder in set(folders))
        limit = cache_bytes(self._config.cache_bytes, self._folder, kept_bytes)
        return BlockCache(self._folder, max(limit - kept_bytes, limit // 4))

    def _part(self, name: str) -> pathlib.Path:
        """Return the folder on this disk of a store whose tokens stay in a bucket."""
        return self._folder / f"{name}.part"

    def _prepare_in_bucket(self, bucket: StoreBucket, wanted: Sequence[Wanted]) -> list[str]:
        """Return the names of stores, after preparing in the bucket those that aren't there."""
        names: list[str] = []
        made: set[str] = set()
        for source, splits in wanted:
            folder = self.folder_of(source, splits)
            names.append(folder.name)
            if not bucket.has(folder.name):
                if not _is_whole(folder):
                    made.add(folder.name)
                self._upload(bucket, source, splits)
        # What a host may not keep goes before others look for it here.
        for name in made - self._choose_whole(bucket, names, made):
            if _is_whole(self._folder / name):
                stores.remove(self._folder / name)
        return names

    def _upload(self, bucket: StoreBucket, source: Source, splits: tuple[str, ...]) -> None:
        """Prepare a store here, unless it is, and copy it to the bucket."""
        folder = self.folder_of(source, splits)
        if not _is_whole(folder):
            with alive(lambda: f"preparing {source.spec} for {bucket.url}"):
                self._make(source, splits, folder)
        if isinstance(source, TokenSource):
            bucket.upload(folder, source.local_files)
            # In the bucket ready files have other names.
            stores.remove(folder)
        else:
            bucket.upload(folder)

    def _choose_whole(
        self, bucket: StoreBucket, names: Sequence[str], made: Collection[str]
    ) -> set[str]:
        """Return the names of the stores to have whole on this disk.

        Args:
          bucket: where they are.
          names: of all stores.
          made: those that were made here only to be copied to the bucket, and may go.
        """
        sizes: dict[str, int] = {}
        here: set[str] = set()
        kept_bytes = 0
        for name in dict.fromkeys(names):
            folder = self._folder / name
            if _is_whole(folder) and name not in made:
                here.add(name)
                sizes[name] = stores.num_bytes(folder)
            else:
                sizes[name] = bucket.num_bytes(name)
            for place in folder, self._part(name):
                kept_bytes += stores.num_bytes(place)
        limit = cache_bytes(self._config.cache_bytes, self._folder, kept_bytes)
        return choose_whole(sizes, here, limit)

    def _fetch(self, bucket: StoreBucket, names: Sequence[str]) -> None:
        """Copy stores to this disk, each whole or all but what is read block by block.

        One process decides for all of its host, since the room changes meanwhile.
        """
        for name in names:
            if _names_files_elsewhere(self._folder / name):
                stores.remove(self._folder / name)
        whole = self._choose_whole(bucket, names, ())
        for name in names:
            folder = self._folder / name if name in whole else self._part(name)
            if not _is_whole(folder):
                fill = functools.partial(bucket.fetch, name=name, is_whole=name in whole)
                atomic.make(folder, _is_whole, fill)

    def folder_of(self, source: Source, splits: tuple[str, ...]) -> pathlib.Path:
        """Return the folder that the store of some splits of a source has, or will have."""
        return self._folder / stores.store_name(self._text_key(source, splits), self._tokenizer_key)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was given, or that the config names, or that its text teaches."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        config = self._config
        with alive(lambda: f"making data.tokenizer={config.tokenizer}"):
            return build_tokenizer(
                config.tokenizer,
                config.vocab_top_k,
                self._training_texts,
                config.eot_token,
                self._all_texts,
            )

    @functools.cached_property
    def _tokenizer_key(self) -> Any:
        """What decides the tokenizer: its name, its files, and the text where it learns from
        that.
        """
        if self._given_tokenizer is not None:
            return self._given_tokenizer.fingerprint
        config = self._config
        kind, argument = split_spec(config.tokenizer)
        hashes = tokenizer_file_hashes(config.tokenizer)
        # A file counts by its content, so that its place doesn't count.
        key: list[Any] = [kind, hashes or argument, config.vocab_top_k, config.eot_token]
        if kind in ("char", "bpe") or config.vocab_top_k:
            key.append("train")
            key += [self._text_key(source, self.train_splits) for source in self.sources]
        if kind == "char":
            key.append("valid")
            key += [self._text_key(source, ("valid",)) for source in self.valid_sources]
        return key

    def _text_key(self, source: Source, splits: tuple[str, ...]) -> list[Any]:
        """Return what decides the text of some splits of a source."""
        return stores.text_key(source, splits, self._checksums(source))

    def _checksums(self, source: Source) -> list[str]:
        """Return the checksums of the files of a source, each file read at most once."""
        if source.setting not in self._checksums_of:
            self._checksums_of[source.setting] = self._read_checksums(source)
        return self._checksums_of[source.setting]

    def _read_checksums(self, source: Source) -> list[str]:
        files = source.content_files
        if not files:
            return []
        notes = stores.checksum_notes(self._folder, source)
        outage_secs = self._config.outage_secs
        total_bytes = sum(content.file_state(path, outage_secs)[0] for path in files)
        # Another host may have read them, and noted it where the stores are.
        bucket = self._bucket if in_bucket(files[0]) else None
        if bucket is not None and not notes.exists():
            noted = bucket.read_note(f"{stores.CHECKSUMS}/{notes.name}")
            if noted is not None:
                notes.parent.mkdir(exist_ok=True, mode=0o700)
                notes.write_text(noted, encoding="utf-8")
        with progress_of(total_bytes, self._is_shown, "reading checksums of", source.spec) as work:
            found = content.checksums(files, notes, work, outage_secs)
        if bucket is not None and work.done_bytes and notes.exists():
            bucket.write_note(f"{stores.CHECKSUMS}/{notes.name}", notes.read_text(encoding="utf-8"))
        return found

    def _training_texts(self) -> Iterator[str]:
        """Yield the texts of the training split, which alone a tokenizer may learn its statistics
        from.
        """
        holds_out = "valid" in self.train_splits
        for source in self.sources:
            for document in training_documents(source, holds_out):
                yield from _texts_of(document)

    def _all_texts(self) -> Iterator[str]:
        """Yield the texts of all splits, which an alphabet has to cover."""
        for source in [*self.sources, *self.valid_sources]:
            for split in ("train", "valid") if source.own_splits else ("all",):
                for document in good_documents(source.documents(split), self._config.on_bad_text):
                    yield from _texts_of(document)

    def _fill(self, source: Source, splits: tuple[str, ...], folder: pathlib.Path) -> None:
        """Write the store of some splits of a source into `folder`."""
        outage_secs = self._config.outage_secs
        files = source.content_files
        states_before = [content.file_state(path, outage_secs) for path in files]
        self.tokenizer.save(folder / "tokenizer")
        if isinstance(source, TokenSource):
            checksums = self._checksums(source)
            prepare_token_files(
                source, checksums, self.tokenizer, folder, splits, is_shown=self._is_shown
            )
        else:
            prepare.prepare(source, self.tokenizer, folder, splits, self._is_shown)
        # The store's name says what the files held before, so it must not hold what came in
        # meanwhile. The third part of a state changes also where a file is only renamed or linked.
        for path, before in zip(files, states_before, strict=True):
            if content.file_state(path, outage_secs)[:2] != before[:2]:
                raise UserError(
                    f"{path} was written to while it was prepared; prepare it when it is complete."
                )

    def _tell_unknown(self, source: Source, folder: pathlib.Path) -> None:
        """Say how much of a text its tokenizer could not spell, with examples."""
        manifest = read_manifest(folder)
        if not manifest.unknown:
            return
        words = self._unspelled_words(source)
        examples = f", such as {', '.join(map(repr, words))}" if words else ""
        say(
            f"warning: {manifest.unknown:,} of {manifest.tokens:,} tokens of {source.spec} "
            f"({manifest.unknown / manifest.tokens:.2%}) stand for what "
            f"data.tokenizer={self.tokenizer.name} can't spell{examples}"
        )

    def _unspelled_words(self, source: Source) -> list[str]:
        """Return a few words that the tokenizer can't spell, where the first documents have
        some.
        """
        if isinstance(source, TokenSource):
            return []
        split = "train" if source.own_splits else "all"
        documents = good_documents(source.documents(split), "skip")
        for document in itertools.islice(documents, _LOOKED_AT_DOCUMENTS):
            unspelled: list[str] = []
            words = list(dict.fromkeys(document.text.split()))
            for word, ids in zip(words, self.tokenizer.encode_batch(words), strict=True):
                if self.tokenizer.count_unknown(ids):
                    unspelled.append(word)
            if unspelled:
                return unspelled[:_NUM_EXAMPLES]
        return []


def _is_whole(folder: pathlib.Path) -> bool:
    """Return whether there is a store in `folder`, whose manifest is written last."""
    return (folder / MANIFEST).exists()


def _names_files_elsewhere(folder: pathlib.Path) -> bool:
    """Return whether a store is one of ready files on this disk; in a bucket they lie inside."""
    if not _is_whole(folder):
        return False
    shards = read_manifest(folder).shards
    return not all((folder / shard.file).exists() for shard in shards)


def _texts_of(document: Document) -> list[str]:
    return [text for text in (document.prompt, document.text) if text]
