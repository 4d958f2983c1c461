"""`open_data`: from the `data` section of a config to rows that can be read, with token stores
prepared where they aren't yet.

    data.source, data.tokenizer -> stores, one a source -> plan of rows -> rows -> mixture

Each source has a store of its own, so a mixture reuses what other runs prepared
(`tinylm.data.store_finder`). The plan of a split depends on packing and context length, and is made
once for these.
"""

import bisect
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import alive
from tinylm.data import atomic, packing
from tinylm.data.config import MADE_HERE, WITHOUT_PROMPTS, DataConfig, parse_mixture, split_spec
from tinylm.data.manifest import MANIFEST, read_manifest
from tinylm.data.rows import JoinedRows, MixedRows, Rows, SplitRows
from tinylm.data.run_data import Data, Validation
from tinylm.data.store import Store
from tinylm.data.store_finder import WAIT_SECS, StoreFinder
from tinylm.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer


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

    Args:
      config: the `data` section of the run's config.
      seed: decides the order of the training rows.
      is_writer: whether this process prepares; of a job, one process does.
      wait_secs: how long the others wait for it.
      progress: whether to show how far preparing is.
      tokenizer: takes the place of the config's, as the one of an imported model does.

    Raises:
      UserError: something is wrong in the data.
      StorageError: the data can't be written.
    """
    config.check()
    finder = StoreFinder(
        config,
        tokenizer=tokenizer,
        is_writer=is_writer,
        wait_secs=wait_secs,
        is_shown=progress,
    )
    wanted = [(source, finder.train_splits) for source in finder.sources]
    wanted += [(source, ("valid",)) for source in finder.valid_sources]
    opened = finder.open_stores(wanted)
    stores = opened[: len(finder.sources)]
    valid_stores = opened[len(finder.sources) :] or stores

    # Read from a store, for none is made here where all stores are there already.
    stored_tokenizer = load_tokenizer(stores[0].folder / "tokenizer")
    for store in stores + valid_stores:
        if store.manifest.tokenizer.fingerprint != stored_tokenizer.fingerprint:
            raise UserError(
                f"{store.folder} was made with another tokenizer; delete it to prepare it again."
            )

    train: list[SplitRows] = []
    for number, store in enumerate(stores):
        _check_training_split(config, store)
        train.append(_rows(config, store, "train", (seed, number)))
    valid_stores = [store for store in valid_stores if "valid" in store.manifest.splits]
    valid = [_rows(config, store, "valid", None) for store in valid_stores]
    split_documents = sum(rows.split_documents for rows in train + valid)

    data = Data(
        tokenizer=stored_tokenizer,
        valid=_joined(valid),
        valid_stores=valid_stores,
        valid_rows=[len(rows) for rows in valid],
        loss_on=config.loss_on,
        train=train[0] if len(train) == 1 else MixedRows(train, finder.weights),
        stores=stores,
        split_documents=split_documents,
    )
    if len(data.train) < config.batch_size:
        raise UserError(
            f"data.batch_size={config.batch_size} must be at most the {len(data.train)} rows of an "
            f"epoch (data.seq_len={config.seq_len}); lower one of them, or add text."
        )
    return data


def store_names(config: DataConfig, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """Return the name of each store of a run, by its source; nothing is prepared.

    A name says what text, tokenizer and settings a store is of, so hosts that have the same names
    have the same data, or will have.

    Args:
      config: the `data` section of the run's config.
      tokenizer: takes the place of the config's.

    Raises:
      UserError: a source or the tokenizer can't be read.
    """
    config.check()
    finder = StoreFinder(config, tokenizer=tokenizer)
    names: dict[str, str] = {}
    for source in finder.sources:
        names[source.setting] = finder.folder_of(source, finder.train_splits).name
    for source in finder.valid_sources:
        names[source.setting] = finder.folder_of(source, ("valid",)).name
    return names


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

    Of a source with a validation split of its own that split is read, of others all there is.

    Args:
      config: has the other settings of the text. Loss is on all tokens where there can be no
        prompts, whatever it says.
      source: the spec of the source, or of a mixture.
      tokenizer: the model's.
      is_writer: whether this process prepares; of a job, one process does.
      key: what messages call the source.

    Raises:
      UserError: something is wrong in the source.
    """
    config = dataclasses.replace(config, source=source, valid_source="")
    try:
        kinds = {split_spec(spec)[0] for _, spec in parse_mixture(source)}
        if kinds & set(WITHOUT_PROMPTS):
            config = dataclasses.replace(config, loss_on="all")
        config.check()
    except UserError as error:
        raise UserError(str(error).replace("data.source", key)) from error

    finder = StoreFinder(config, tokenizer=tokenizer, is_writer=is_writer, key=key)
    stores = finder.open_stores([(one, ("valid",)) for one in finder.sources])
    for store in stores:
        if "valid" not in store.manifest.splits:
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
    in a store, or made for a corpus that tinylm carries with it.

    Raises:
      UserError: the store or the corpus doesn't exist, or a file can't be read.
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
        finder = StoreFinder(config, is_writer=False, wait_secs=0, is_shown=False)
        folder = finder.folder_of(finder.sources[0], finder.train_splits)
        if (folder / MANIFEST).exists():
            return read_manifest(folder).tokenizer.vocab_size - 1
        every_source = [*finder.sources, *finder.valid_sources]
        if all(split_spec(source.spec)[0] in MADE_HERE for source in every_source):
            return finder.tokenizer.vocab_size - 1
    raise UserError(
        "data.tokenizer=char has an id for each character of the text, which isn't read here: run "
        "python -m tinylm.prepare with the same settings first, or set --config.model.vocab_size "
        "(typically 66 for tinyshakespeare, 100 to 200 for English text with its signs)."
    )


def _joined(parts: Sequence[SplitRows]) -> Rows | None:
    """Return the rows of all validation splits, one after the other."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _check_training_split(config: DataConfig, store: Store) -> None:
    """Raise UserError where a store has too little text to train on."""
    if "train" not in store.manifest.splits:
        raise UserError(
            f"data.source={store.spec} has no text to train on; check data.valid_fraction."
        )
    num_tokens = store.manifest.splits["train"].num_tokens
    if num_tokens < config.seq_len:
        raise UserError(
            f"data.seq_len={config.seq_len} must be at most the {num_tokens} training tokens of "
            f"data.source={store.spec}."
        )


def _rows(config: DataConfig, store: Store, split: str, seed: object) -> SplitRows:
    """Return the rows of one split of one store; in order where there is no seed."""
    if config.loss_on == "answer" and store.mask is None:
        raise UserError(
            f"data.loss_on=answer needs prompts, and data.source={store.spec} has none; check "
            "data.prompt_field and data.completion_field."
        )
    return SplitRows(
        store,
        split,
        _plan(config, store, split),
        config.seq_len,
        seed=seed,
        use_mask=config.loss_on == "answer",
        packed=config.packing == "packed",
    )


def _plan(
    config: DataConfig, store: Store, split: str
) -> packing.StreamPlan | packing.DocumentPlan:
    """Return the plan of a split, made once for a packing and a context length."""
    begin, end = store.manifest.splits[split].tokens
    if config.packing == "stream":
        return packing.StreamPlan(end - begin, config.seq_len)
    folder = store.folder / f"plan-{split}-{config.packing}-{config.seq_len}"
    if plan := packing.load_plan(folder):
        return plan

    ends = _ends_within(store.document_ends()[:, 0], begin, end)

    def is_whole(folder: pathlib.Path) -> bool:
        return packing.load_plan(folder) is not None

    def write(folder: pathlib.Path) -> None:
        with alive(lambda: f"planning rows of {config.seq_len} tokens of {store.spec}"):
            packing.write_plan(folder, ends, config.seq_len, packed=config.packing == "packed")

    try:
        atomic.make(folder, is_whole, write)
        plan = packing.load_plan(folder)
    except StorageError:
        # A shared store may be one that only its owner can write to. Then the plan is this
        # process's own: what is mapped stays readable after its folder is gone.
        with tempfile.TemporaryDirectory() as private:
            write(pathlib.Path(private))
            plan = packing.load_plan(pathlib.Path(private))
    assert plan is not None, "a plan that was just written can be read"
    return plan


def _ends_within(ends: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return where documents end in the tokens from `begin` to `end`, counted from `begin`.

    A cut may fall inside a document, as where ready ids have no end of text at all: each side is
    then a document of its own, which ends with its split.
    """
    # By bisection in place: NumPy's search would copy the ends of all documents.
    first = bisect.bisect_right(ends, begin)
    last = bisect.bisect_right(ends, end)
    within = ends[first:last] - begin
    if len(within) and within[-1] == end - begin:
        return within
    return np.append(within, end - begin)
