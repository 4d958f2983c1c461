"""`open_data`: from the `data` section of a config to rows that can be read, preparing token stores
where needed.

Each source has its own store, so a mixture reuses what other runs prepared. One process prepares,
the others wait for the store to appear. A store is named by what decides its content (the files'
checksums, the settings, the tokenizer), so text that was moved or touched finds its store again. A
tokenizer that learns from the text (bpe, or a cut to the most common ids) learns from the training
split alone, before the first store is made; only the alphabet of `char` is that of all text, since
there is no id for a character that it lacks.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import alive, say
from tinylm.data import atomic, content, packing, prepare, stores
from tinylm.data.config import MADE_HERE, WITHOUT_PROMPTS, DataConfig, parse_mixture, split_spec
from tinylm.data.progress import progress as progress_of
from tinylm.data.rows import JoinedRows, MixedRows, Rows, SplitRows
from tinylm.data.sources import make_source
from tinylm.data.sources.base import Document, Source, good_documents
from tinylm.data.sources.tokens import TokenSource
from tinylm.data.splits import training_documents
from tinylm.data.store import MANIFEST, Store, read_manifest
from tinylm.data.token_files import prepare_token_files
from tinylm.data.tokenizers import (
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_file_hashes,
)

WAIT_SECS = 1800.0
_LOOKED_AT_DOCUMENTS = 1000


@dataclasses.dataclass
class Validation:
    """What a model is scored on: rows in order, the stores that they come from, and the
    tokenizer.
    """

    tokenizer: Tokenizer
    valid: Rows | None
    valid_stores: list[Store]
    valid_rows: list[int]  # that each of these stores has
    loss_on: str  # as data.loss_on

    @property
    def valid_splits(self) -> list[dict[str, Any]]:
        """Documents, tokens and bytes of the validation splits."""
        return [store.manifest["splits"]["valid"] for store in self.valid_stores]

    def answers(self, limit: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (prompt ids, completion ids) of the validation pairs, the first `limit` of them
        where that is set.
        """
        pairs = (pair for store in self.valid_stores for pair in store.pairs("valid"))
        return list(itertools.islice(pairs, limit or None))

    def valid_texts(self, most: int, most_tokens: int = 4096) -> Iterator[str]:
        """Yield the texts of documents that lie evenly over the validation split, at most `most` of
        each store.

        Of a longer one that is the beginning.
        """
        for store in self.valid_stores:
            split = store.manifest["splits"]["valid"]
            first, last = split["documents"]
            first_token, last_token = split["tokens"]
            ends = store.document_ends()[:, 0]
            evenly = np.linspace(first, last - 1, min(most, last - first))
            for number in np.unique(evenly.astype(np.int64)).tolist():
                # The first document of a split may have begun in the other one.
                begin = max(int(ends[number - 1]), first_token) if number else first_token
                end = min(int(ends[number]), last_token, begin + most_tokens)
                ids = np.empty(max(end - begin, 0), np.int32)
                store.tokens.read(ids, begin)
                yield self.tokenizer.decode(ids.tolist())

    @functools.cached_property
    def _targets(self) -> list[tuple[int, int]]:
        """Target tokens of each validation split, and the bytes of text that they stand for.

        With loss on the answers alone, prompts are neither.
        """
        found = []
        for store in self.valid_stores:
            split = store.manifest["splits"]["valid"]
            begin, end = split["tokens"]
            num_tokens = end - begin
            num_bytes = split["bytes"]
            if self.loss_on == "answer":
                for prompt, _ in store.pairs("valid"):
                    num_tokens -= len(prompt)
                    num_bytes -= self.tokenizer.count_bytes(prompt)
            found.append((num_tokens, num_bytes))
        return found

    @property
    def valid_tokens(self) -> int:
        """Target tokens of the validation split."""
        return sum(tokens for tokens, _ in self._targets)

    def valid_bytes_per_token(self, num_rows: int = 0) -> float:
        """Return the bytes of text a target token, which turns loss into bits per byte.

        Of the first `num_rows` rows (0: all), where a source counts by its part of them: another
        one may have tokens of another length.
        """
        tokens, size = 0.0, 0.0
        left = num_rows or sum(self.valid_rows)
        for (tokens_here, size_here), rows_here in zip(self._targets, self.valid_rows, strict=True):
            share = min(left, rows_here) / rows_here
            tokens += share * tokens_here
            size += share * size_here
            left -= min(left, rows_here)
        return size / max(tokens, 1)

    @property
    def floor_nats_per_token(self) -> float | None:
        """The exact -log p of the validation text over its target tokens; None where it isn't
        known.
        """
        log_probs = [split["log_prob"] for split in self.valid_splits if "log_prob" in split]
        known = log_probs and len(log_probs) == len(self.valid_splits)
        return -sum(log_probs) / self.valid_tokens if known else None


@dataclasses.dataclass
class Data(Validation):
    """What a run reads: rows to train on, those to evaluate, their tokenizer, and the manifests of
    the stores.
    """

    train: Rows
    stores: list[Store]
    split_documents: int

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, end of text among them."""
        return self.tokenizer.vocab_size

    @property
    def every_store(self) -> list[Store]:
        """All stores, each once."""
        return list({store.folder: store for store in self.stores + self.valid_stores}.values())


def open_data(
    config: DataConfig,
    *,
    seed: int,
    is_writer: bool = True,
    wait_secs: float = WAIT_SECS,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
) -> Data:
    """Return the data of a run, prepared first where it isn't yet.

    `is_writer` is for one process of a job; the others wait `wait_secs` at most. `tokenizer` takes
    the place of the config's, as the one of an imported model does. Raises UserError for anything
    wrong in the data, StorageError where it can't be written.
    """
    config.check()
    opener = _Opener(config, is_writer, wait_secs, progress)
    if tokenizer:
        opener.tokenizer, opener.tokenizer_key = tokenizer, tokenizer.fingerprint
    stores = [opener.store(source, opener.train_splits) for source in opener.sources]
    valid_stores = [opener.store(source, ("valid",)) for source in opener.valid_sources] or stores
    tokenizer = load_tokenizer(stores[0].folder / "tokenizer")
    for store in stores + valid_stores:
        if store.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"{store.folder} was made with another tokenizer; delete it to prepare it again."
            )
    validated = [store for store in valid_stores if "valid" in store.manifest["splits"]]
    train = [_rows(config, store, "train", (seed, i)) for i, store in enumerate(stores)]
    valid = [_rows(config, store, "valid", None) for store in validated]
    data = Data(
        tokenizer=tokenizer,
        valid=_joined(valid),
        valid_stores=validated,
        valid_rows=[len(rows) for rows in valid],
        loss_on=config.loss_on,
        train=train[0] if len(train) == 1 else MixedRows(train, opener.weights),
        stores=stores,
        split_documents=sum(rows.split_documents for rows in train + valid),
    )
    if len(data.train) < config.batch_size:
        raise UserError(
            f"data.batch_size={config.batch_size} must be at most the {len(data.train)} rows of an "
            f"epoch (data.seq_len={config.seq_len}); lower one of them, or add text."
        )
    return data


def open_validation(
    config: DataConfig,
    source: str,
    tokenizer: Tokenizer,
    *,
    is_writer: bool = True,
    key: str = "--source",
) -> Validation:
    """Return the text of a source under a tokenizer, to score a model on, prepared first where it
    isn't yet.

    Of a source with a validation split of its own that split is read, of others all there is. The
    other settings of the text are those of `config`; loss is on all tokens where there can be no
    prompts. `key` is what messages call the source. Raises UserError for anything wrong in it.
    """
    config = dataclasses.replace(config, source=source, valid_source="")
    try:
        kinds = {split_spec(spec)[0] for _, spec in parse_mixture(source)}
        if kinds & set(WITHOUT_PROMPTS):
            config = dataclasses.replace(config, loss_on="all")
        config.check()
    except UserError as error:
        raise UserError(str(error).replace("data.source", key)) from error
    opener = _Opener(config, is_writer, WAIT_SECS, progress=True, key=key)
    opener.tokenizer, opener.tokenizer_key = tokenizer, tokenizer.fingerprint
    stores = [opener.store(one, ("valid",)) for one in opener.sources]
    for store in stores:
        if "valid" not in store.manifest["splits"]:
            raise UserError(f"{key}={source} has no text to score.")
    valid = [_rows(config, store, "valid", None) for store in stores]
    return Validation(
        tokenizer=tokenizer,
        valid=_joined(valid),
        valid_stores=stores,
        valid_rows=[len(rows) for rows in valid],
        loss_on=config.loss_on,
    )


def known_vocab_size(config: DataConfig) -> tuple[int, str]:
    """Return how many ids the tokenizer of a config has and how that is known, without reading a
    text from outside.

    One that is learned from the text has as many as it was asked for. Only `char` has to be found
    in a store, or made for a corpus that tinylm carries with it. Raises UserError where neither can
    be, or a file can't be read.
    """
    kind, argument = split_spec(config.tokenizer)
    origin = f"data.tokenizer={config.tokenizer}"
    if config.vocab_top_k:
        return config.vocab_top_k, f"data.vocab_top_k={config.vocab_top_k}"
    if kind == "char":
        return _num_characters(config) + 1, origin
    if kind == "bpe":
        return int(argument), origin
    if kind == "gpt2":
        return 50_257, origin
    return build_tokenizer(config.tokenizer, 0, lambda: ()).vocab_size, origin


def _num_characters(config: DataConfig) -> int:
    """Return how many characters the text of a config has, from its store or from a corpus that is
    made here.
    """
    # Where the text isn't there, or no folder for stores, there is no store either.
    with contextlib.suppress(UserError):
        opener = _Opener(config, is_writer=False, wait_secs=0, progress=False)
        folder = opener.folder_of(opener.sources[0], opener.train_splits)
        if (folder / MANIFEST).exists():
            return read_manifest(folder)["tokenizer"]["vocab_size"] - 1
        every = [*opener.sources, *opener.valid_sources]
        if all(split_spec(source.spec)[0] in MADE_HERE for source in every):
            return opener.tokenizer.vocab_size - 1
    raise UserError(
        "data.tokenizer=char has an id for each character of the text, which isn't read here: run "
        "python -m tinylm.prepare with the same settings first, or set --config.model.vocab_size "
        "(typically 66 for tinyshakespeare, 100 to 200 for English text with its signs)."
    )


def _joined(parts: list[SplitRows]) -> Rows | None:
    """Return the rows of all validation splits, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return JoinedRows(parts) if parts else None


class _Opener:
    """Finds or makes the stores of one config, and at most once the tokenizer that they share."""

    def __init__(
        self,
        config: DataConfig,
        is_writer: bool,
        wait_secs: float,
        progress: bool,
        key: str = "data.source",
    ):
        mixture = parse_mixture(config.source)
        self.config = config
        self.is_writer = is_writer
        self.wait_secs = wait_secs
        self.progress = progress
        self.weights = [weight for weight, _ in mixture]
        self.sources = [make_source(spec, config, key) for _, spec in mixture]
        self.valid_sources: list[Source] = []
        if config.valid_source:
            source = make_source(config.valid_source, config, "data.valid_source")
            self.valid_sources.append(source)
        self.train_splits = ("train",) if self.valid_sources else ("train", "valid")
        self._folder = stores.store_folder(config)
        self._checksums_of: dict[str, list[str]] = {}

    @functools.cached_property
    def tokenizer_key(self) -> Any:
        """What decides the tokenizer: its name, its files, and the text where it learns from
        that.
        """
        c = self.config
        kind, argument = split_spec(c.tokenizer)
        hashes = tokenizer_file_hashes(c.tokenizer)
        # A file counts by its content, so that its place doesn't count.
        key: list[Any] = [kind, hashes or argument, c.vocab_top_k, c.eot_token]
        if kind in ("char", "bpe") or c.vocab_top_k:
            key.append("train")
            key += [self.text_key(source, self.train_splits) for source in self.sources]
        if kind == "char":
            key.append("valid")
            key += [self.text_key(source, ("valid",)) for source in self.valid_sources]
        return key

    def text_key(self, source: Source, splits: tuple[str, ...]) -> list[Any]:
        """Return what decides the text of some splits of a source."""
        return stores.text_key(source, splits, self._checksums(source))

    def _checksums(self, source: Source) -> list[str]:
        """Return the checksums of the files of a source, each file read at most once."""
        files = source.content_files
        if source.setting not in self._checksums_of:
            notes = stores.checksum_notes(self._folder, source)
            total = sum(content.file_state(path)[0] for path in files)
            with progress_of(total, self.progress, "reading checksums of", source.spec) as work:
                self._checksums_of[source.setting] = (
                    content.checksums(files, notes, work) if files else []
                )
        return self._checksums_of[source.setting]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the config names, or learned from its text."""
        c = self.config
        with alive(lambda: f"making data.tokenizer={c.tokenizer}"):
            return build_tokenizer(
                c.tokenizer, c.vocab_top_k, self._training_texts, c.eot_token, self._all_texts
            )

    def _training_texts(self) -> Iterator[str]:
        """Yield the texts of the training split, which alone a tokenizer may learn its statistics
        from.
        """
        for source in self.sources:
            for document in training_documents(source, holds_out=len(self.train_splits) > 1):
                yield from _texts_of(document)

    def _all_texts(self) -> Iterator[str]:
        """Yield the texts of all splits, which an alphabet has to cover."""
        for source in [*self.sources, *self.valid_sources]:
            for split in ("train", "valid") if source.own_splits else ("all",):
                for document in good_documents(source.documents(split), self.config.on_bad_text):
                    yield from _texts_of(document)

    def folder_of(self, source: Source, splits: tuple[str, ...]) -> pathlib.Path:
        """Return the folder that the store of some splits of a source has, or will have."""
        return self._folder / stores.store_name(self.text_key(source, splits), self.tokenizer_key)

    def store(self, source: Source, splits: tuple[str, ...]) -> Store:
        """Return the store of some splits of a source, made by this process, by another, or long
        ago.
        """
        folder = self.folder_of(source, splits)
        if not self.is_writer:
            stores.wait_for(folder, self.wait_secs)
        elif not (folder / MANIFEST).exists():
            atomic.make(
                folder,
                lambda folder: (folder / MANIFEST).exists(),
                functools.partial(self._fill, source, splits),
            )
            self._tell_unknown(source, read_manifest(folder))
            if self.progress:
                prepare.tell_skipped(folder)
        return Store(folder, source.spec, source.files if isinstance(source, TokenSource) else ())

    def _tell_unknown(self, source: Source, manifest: dict[str, Any]) -> None:
        """Say how much of a text its tokenizer could not spell, with an example."""
        if not manifest["unknown"]:
            return
        words = self._unspelled_words(source)
        example = f", such as {', '.join(map(repr, words))}" if words else ""
        say(
            f"warning: {manifest['unknown']:,} of {manifest['tokens']:,} tokens of {source.spec} "
            f"({manifest['unknown'] / manifest['tokens']:.2%}) stand for what "
            f"data.tokenizer={self.tokenizer.name} can't spell{example}"
        )

    def _unspelled_words(self, source: Source) -> list[str]:
        """Return a few words that the tokenizer can't spell, where the first documents have
        some.
        """
        if isinstance(source, TokenSource):
            return []
        documents = good_documents(
            source.documents("train" if source.own_splits else "all"), "skip"
        )
        for document in itertools.islice(documents, _LOOKED_AT_DOCUMENTS):
            words = list(dict.fromkeys(document.text.split()))
            encoded = zip(words, self.tokenizer.encode_batch(words), strict=True)
            if unspelled := [word for word, ids in encoded if self.tokenizer.count_unknown(ids)]:
                return unspelled[:3]
        return []

    def _fill(self, source: Source, splits: tuple[str, ...], folder: pathlib.Path) -> None:
        before = [content.file_state(path) for path in source.content_files]
        self.tokenizer.save(folder / "tokenizer")
        if isinstance(source, TokenSource):
            prepare_token_files(
                source,
                self._checksums(source),
                self.tokenizer,
                folder,
                splits,
                is_shown=self.progress,
            )
        else:
            prepare.prepare(source, self.tokenizer, folder, splits, self.progress)
        # The store's name says what the files held before, so it must not hold what came in
        # meanwhile.
        for path, state in zip(source.content_files, before, strict=True):
            if content.file_state(path)[:2] != state[:2]:
                raise UserError(
                    f"{path} was written to while it was prepared; prepare it when it is complete."
                )


def _texts_of(document: Document) -> list[str]:
    return [text for text in (document.prompt, document.text) if text]


def _rows(config: DataConfig, store: Store, split: str, seed: Any) -> SplitRows:
    """Return the rows of one split of one store."""
    if split not in store.manifest["splits"]:
        raise UserError(
            f"data.source={store.spec} has no text to train on; check data.valid_fraction."
        )
    begin, end = store.manifest["splits"][split]["tokens"]
    if seed is not None and end - begin < config.seq_len:
        raise UserError(
            f"data.seq_len={config.seq_len} must be at most the {end - begin} training tokens of "
            f"data.source={store.spec}."
        )
    if config.loss_on == "answer" and store.mask is None:
        raise UserError(
            f"data.loss_on=answer needs prompts, and data.source={store.spec} has none; check "
            "data.prompt_field and data.completion_field."
        )
    plan = _plan(config, store, split)
    return SplitRows(
        store,
        split,
        plan,
        config.seq_len,
        seed=seed,
        use_mask=config.loss_on == "answer",
        packed=config.packing == "packed",
    )


def _ends_within(ends: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return where documents end in the tokens from `begin` to `end`, counted from `begin`.

    A cut may fall inside a document, as where ready ids have no end of text at all: each side is
    then a document of its own, which ends with its split.
    """
    # By bisection in place: NumPy's search would copy the ends of all documents.
    first, last = (bisect.bisect_right(ends, place) for place in (begin, end))
    within = ends[first:last] - begin
    if len(within) and within[-1] == end - begin:
        return within
    return np.append(within, end - begin)


def _plan(
    config: DataConfig, store: Store, split: str
) -> packing.StreamPlan | packing.DocumentPlan:
    """Return the plan of a split, made once for a packing and a context length."""
    begin, end = store.manifest["splits"][split]["tokens"]
    if config.packing == "stream":
        return packing.StreamPlan(end - begin, config.seq_len)
    folder = store.folder / f"plan-{split}-{config.packing}-{config.seq_len}"
    if plan := packing.load_plan(folder):
        return plan
    ends = _ends_within(store.document_ends()[:, 0], begin, end)

    def write(to: pathlib.Path) -> None:
        with alive(lambda: f"planning rows of {config.seq_len} tokens of {store.spec}"):
            packing.write_plan(to, ends, config.seq_len, packed=config.packing == "packed")

    try:
        atomic.make(folder, lambda folder: packing.load_plan(folder) is not None, write)
        plan = packing.load_plan(folder)
    except (
        StorageError
    ):  # a shared store that only its owner can write: the plan is this process's own
        with tempfile.TemporaryDirectory() as private:
            write(pathlib.Path(private))
            plan = packing.load_plan(pathlib.Path(private))
    assert plan is not None, "a plan that was just written can be read"
    return plan
