"""The `data` section of a config: which text, which tokenizer, how rows are cut from it.

One default per setting, here. `check` reads no file: what is wrong with the data itself shows while
it is prepared.
"""

import dataclasses
import re
from fractions import Fraction

from tinylm.core.errors import UserError
from tinylm.core.settings import Section, nearest, setting
from tinylm.core.storage import check_address, check_on_disk

MADE_HERE = ("tales", "addition", "recall")  # sources that read no file
SOURCE_KINDS = (*MADE_HERE, "text", "jsonl", "parquet", "tfds", "hf", "tokens")
TOKENIZER_KINDS = ("byte", "char", "bpe", "gpt2", "hf", "sentencepiece", "llama2c")
WITHOUT_PROMPTS = ("tales", "text", "tokens")  # sources without pairs
MAX_MIXTURE_PERIOD = 1_000_000
MAX_IDS = 1 << 24  # of a tokenizer

# Kinds that read files, which may lie anywhere; the rest mean something by what follows the kind.
_SOURCE_FILES = ("text", "jsonl", "parquet", "tfds", "tokens")
_TOKENIZER_FILES = ("gpt2", "hf", "sentencepiece", "llama2c")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
_WITHOUT_ARGUMENT = (*MADE_HERE, "byte", "char", "gpt2")
_WITH_COUNT = (*MADE_HERE, "bpe")
_PARTS = re.compile(r",\s*(?=[\d.]+\s*\*)")
_WEIGHTED = re.compile(r"\s*([\d.]+)\s*\*\s*(.+)", re.DOTALL)


@dataclasses.dataclass
class DataConfig(Section, name="data"):
    """Source, tokenizer, rows and batches."""

    source: str = setting(
        "tales",
        (
            "tales | addition | recall | text:, jsonl:, parquet:, tokens:GLOB | tfds:, hf:NAME; "
            "0.7*A, 0.3*B mixes"
        ),
        aliases=(
            "dataset",
            "dataset_path",
            "dataset_name",
            "dataset_type",
            "hf_path",
            "train_file",
            "data_dir",
        ),
    )
    valid_source: str = setting(
        "",
        "a source of its own for validation (empty: the source's, or its tail)",
        aliases=("validation_file", "eval_dataset_name", "hf_eval_files"),
    )
    valid_fraction: float = setting(
        0.1,
        "share of a source without validation split that is held out",
        least=0,
        below=1,
        aliases=("validation_split_percentage", "val_fraction", "test_size"),
    )
    valid_split: str = setting(
        "tail",
        "what is held out: tail (the source's end), or random (documents, by a hash of each)",
        choices=("tail", "random"),
    )
    separator: str = setting(
        "<|endoftext|>",
        "text between two documents of one text file, with \\n and \\t (empty: a file is one)",
    )
    separator_space: str = setting(
        "drop",
        "whitespace around a separator: drop (it belongs to the separator), or keep",
        choices=("drop", "keep"),
    )
    line_ends: str = setting(
        "keep", "Windows' line ends in texts: keep, or unix (as \\n)", choices=("keep", "unix")
    )
    lowercase: bool = setting(False, "turn texts into lower case", aliases=("do_lower_case",))
    text_field: str = setting(
        "text",
        "field of jsonl, parquet, tfds and hf that holds the text",
        aliases=("text_column", "train_data_columns"),
    )
    prompt_field: str = setting("prompt", "field of the prompt, where records are pairs")
    completion_field: str = setting(
        "completion", "field of the completion, where records are pairs"
    )
    on_bad_text: str = setting(
        "error",
        "bad UTF-8 and empty documents: error, or skip and count",
        choices=("error", "skip"),
    )
    tokenizer: str = setting(
        "byte",
        "byte | char | bpe:N | gpt2[:DIR] | hf:FILE | sentencepiece:FILE | llama2c:FILE",
        aliases=("tokenizer_name", "tokenizer_path"),
    )
    eot_token: str = setting(
        "",
        (
            "token that ends a text, of a tokenizer hf: or sentencepiece: (empty: the one of a "
            "usual name)"
        ),
        aliases=("eos_token",),
    )
    # One id would be the end of text alone.
    vocab_top_k: int = setting(
        0, "keep only this many ids, the most common ones (0: all)", least=2, also=(0,)
    )
    seq_len: int = setting(
        256,
        "target tokens of a row",
        least=1,
        below=2**31,
        aliases=(
            "block_size",
            "max_seq_len",
            "max_seq_length",
            "max_target_length",
            "sequence_length",
            "context_length",
        ),
    )
    batch_size: int = setting(
        32,
        "rows of a step, over all devices",
        least=1,
        aliases=(
            "per_device_batch_size",
            "per_device_train_batch_size",
            "train_batch_size",
            "global_batch_size",
            "device_batch_size",
            "total_batch_size",
        ),
    )
    packing: str = setting(
        "stream",
        "stream: shifting windows; packed: whole documents; single: a document a row",
        choices=("stream", "packed", "single"),
    )
    loss_on: str = setting(
        "all",
        "tokens that carry loss: all, or answer (the completions of pairs)",
        choices=("all", "answer"),
        aliases=("completion_only_loss", "train_on_prompt", "sft_train_on_completion_only"),
    )
    store_dir: str = setting(
        "",
        "folder of prepared tokens, shared between runs: on a disk, or gs://, s3:// (empty: the "
        "user's cache)",
        free=True,
        aliases=("cache_dir",),
    )
    cache_bytes: int = setting(
        0,
        "most bytes that a host keeps of its stores in a bucket, all together (0: half of its free "
        "disk); of stores that don't fit it reads what its batches need",
        least=0,
        free=True,
    )
    outage_secs: float = setting(
        1800.0,
        "how long a bucket with data may fail before the run ends; it waits, and goes on",
        least=0,
        free=True,
    )
    tfds_data_dir: str = setting(
        "", "folder of prepared TFDS data sets (empty: TFDS's own)", free=True
    )
    tfds_manual_dir: str = setting(
        "", "folder with files that a TFDS builder wants placed by hand", free=True
    )

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of a step, over all devices."""
        return self.batch_size * self.seq_len

    @property
    def separator_text(self) -> str:
        """The separator with its escapes read: from a shell, a line break comes as a backslash and
        an n.
        """
        return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[0]), self.separator)

    def check(self) -> None:
        """Raise UserError for a setting that can't work; read no file."""
        super().check()
        if any("\ud800" <= char <= "\udfff" for char in self.separator):
            raise UserError(f"data.separator={self.separator!r} must be text in UTF-8.")
        check_address("data.store_dir", self.store_dir)
        for name in ("tfds_data_dir", "tfds_manual_dir"):
            check_on_disk(f"data.{name}", getattr(self, name))
        _check_spec("data.tokenizer", self.tokenizer, TOKENIZER_KINDS)
        if split_spec(self.tokenizer)[0] in _TOKENIZER_FILES:
            check_on_disk("data.tokenizer", split_spec(self.tokenizer)[1])
        if self.eot_token and split_spec(self.tokenizer)[0] not in ("hf", "sentencepiece"):
            raise UserError(
                f"data.eot_token={self.eot_token} is for data.tokenizer=hf: and sentencepiece:; "
                f"{self.tokenizer} has an end of text of its own."
            )
        keys = [("data.source", spec) for _, spec in parse_mixture(self.source)]
        if self.valid_source:
            keys.append(("data.valid_source", self.valid_source))
        for key, spec in keys:
            _check_spec(key, spec, SOURCE_KINDS)
            kind, place = split_spec(spec)
            if kind == "tfds":
                check_on_disk(key, place)
            elif kind in _SOURCE_FILES:
                check_address(key, place)
            self._check_together(key, spec)

    def _check_together(self, key: str, spec: str) -> None:
        kind = split_spec(spec)[0]
        if kind == "tokens" and self.vocab_top_k:
            raise UserError(
                f"data.vocab_top_k={self.vocab_top_k} can't cut ids that are read in place "
                "(tokens:)."
            )
        if kind == "tokens" and self.valid_split == "random" and not self.valid_source:
            raise UserError(
                "data.valid_split=random can't sort ids that are read in place (tokens:); use tail."
            )
        if kind == "tokens" and split_spec(self.tokenizer)[0] in ("char", "bpe"):
            raise UserError(
                f"data.tokenizer={self.tokenizer} must be the one that made the ids of tokens:."
            )
        if kind in WITHOUT_PROMPTS and self.loss_on == "answer":
            raise UserError(
                f"data.loss_on=answer needs prompt and completion, which {key}={spec} doesn't have."
            )


def parse_mixture(text: str) -> list[tuple[Fraction, str]]:
    """Split "0.7*tales, 0.3*text:PATH" into weights that sum to 1, and sources; a bare source has
    weight 1.
    """
    if not _WEIGHTED.fullmatch(text):
        return [(Fraction(1), text.strip())]
    try:
        parts = [_WEIGHTED.fullmatch(part).groups() for part in _PARTS.split(text)]  # type: ignore[union-attr]
        weights = [Fraction(weight) for weight, _ in parts]
    except (AttributeError, ValueError) as error:
        raise UserError(f"data.source={text} must be WEIGHT*SOURCE, WEIGHT*SOURCE, ....") from error
    if min(weights) <= 0:
        raise UserError(f"data.source={text} must have weights above 0.")
    total = sum(weights)
    mixture: list[tuple[Fraction, str]] = []
    for weight, (_, spec) in zip(weights, parts, strict=True):
        share = weight / total
        if share.denominator > MAX_MIXTURE_PERIOD:
            raise UserError(
                f"data.source={text} has weights too fine to be met exactly; use at most four "
                "decimals."
            )
        mixture.append((share, spec.strip()))
    return mixture


def split_spec(spec: str) -> tuple[str, str]:
    """Split "kind:argument"; the argument may be empty."""
    kind, _, argument = spec.partition(":")
    return kind, argument


def differ_in_place(key: str, spec: str, other: str) -> bool:
    """Say whether two values of a setting name files of the same kind in different places.

    What the files hold decides the numbers of a run, and is compared where they are read.
    """
    if key == "data.tokenizer":
        kind, _ = split_spec(spec)
        other_kind, _ = split_spec(other)
        return kind == other_kind and kind in _TOKENIZER_FILES
    if key == "data.valid_source":
        return _may_move(spec, other)
    if key != "data.source":
        return False
    parts = parse_mixture(spec)
    other_parts = parse_mixture(other)
    if len(parts) != len(other_parts):
        return False
    for (weight, one), (other_weight, another) in zip(parts, other_parts, strict=True):
        if weight != other_weight or not _may_move(one, another):
            return False
    return True


def _may_move(spec: str, other: str) -> bool:
    """Say whether two sources are the same but for the place of their files."""
    return spec == other or (split_spec(spec)[0] == split_spec(other)[0] in _SOURCE_FILES)


def _check_spec(key: str, spec: str, known: tuple[str, ...]) -> None:
    kind, argument = split_spec(spec)
    if kind not in known:
        raise UserError(
            f"{key}={spec} must begin with one of {', '.join(known)}{nearest(kind, known) or '.'}"
        )
    if not argument and kind not in _WITHOUT_ARGUMENT:
        raise UserError(
            f"{key}={spec} must say more after the kind, like "
            f"{kind}:{'512' if kind == 'bpe' else 'PATH'}."
        )
    if argument and kind in ("byte", "char"):
        raise UserError(f"{key}={spec} must be {kind} alone.")
    if (
        argument
        and kind in _WITH_COUNT
        and not (re.fullmatch("[0-9]{1,18}", argument) and int(argument))
    ):
        raise UserError(f"{key}={spec} must have a whole number above 0 after {kind}:.")
    if kind == "bpe" and not 257 <= int(argument) <= MAX_IDS:
        raise UserError(
            f"{key}={spec} must have at least 257 ids (256 bytes and the end of text), at most "
            f"{MAX_IDS}."
        )
