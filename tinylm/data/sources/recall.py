"""The source `recall`: associative recall over the length of a row, which a window can't solve.

Pairs of a key and a value stand near the beginning of a row, among letters that mean nothing; at
the end all keys are asked for. So each answer is one token that lies most of the row away from the
question, and a model that doesn't reach that far can only guess: 1 of 16 values is right. It is the
task of Arora et al. (2023, Zoology, section 3) with its distances as long as the row.

    row      s u a F x i . . d B v | w k x r . . . . . . . t m | ? a F b C c P d B ...
             first quarter: pairs    letters that mean nothing   answers, in order of the keys

The keys of the answers are always the same, so the values alone have to be learned, and the text
is right as a whole or not (`eval.exact_match`).
"""

import hashlib
import pathlib
from collections.abc import Iterator

from tinylm.core.errors import UserError
from tinylm.data.sources.base import Document, Source, hash_bytes

KEYS = "abcdefgh"
VALUES = "ABCDEFGHIJKLMNOP"
FILLER = "ijklmnopqrstuvwx"
QUESTION = "?"
PAIRS_SHARE = 4  # the pairs lie in the first of so many parts of a row
LEAST_SEQ_LEN = PAIRS_SHARE * len(KEYS) * 2
DEFAULT_TOKENS = 1 << 24  # of all training texts, where nobody says how many they are
VALID_SHARE = 16  # so many training texts come to one for validation

# A byte is one of the letters that mean nothing, each as often as the others.
_FILLER_OF_BYTE = bytes(ord(FILLER[byte % len(FILLER)]) for byte in range(256))
_DRAW_BYTES = 64  # where 8 pairs lie and what they are: some 170 bits in rows of 2^20 tokens


class RecallSource(Source):
    """Texts as long as a row, of which `recall:N` has N in training."""

    own_splits = True

    def identity(self) -> list:
        code = hash_bytes(pathlib.Path(__file__).read_bytes())
        counts = [self._count("train"), self._count("valid")]
        return [super().identity(), self.config.seq_len, counts, code]

    def read_split(self, split: str) -> Iterator[Document]:
        for index in range(self._count(split)):
            prompt, answers = recall_text(split, index, self.config.seq_len)
            yield Document(answers, prompt=prompt)

    def _count(self, split: str) -> int:
        if self.config.seq_len < LEAST_SEQ_LEN:
            raise UserError(
                f"{self.setting} needs rows of at least {LEAST_SEQ_LEN} tokens; set data.seq_len "
                f"(here {self.config.seq_len})."
            )
        train = int(self.argument or max(DEFAULT_TOKENS // self.config.seq_len, VALID_SHARE))
        return train if split == "train" else -(-train // VALID_SHARE)  # rounded up


def recall_text(split: str, index: int, seq_len: int) -> tuple[str, str]:
    """Return text number `index` of a split as a prompt and its answers.

    It is the same on every machine and Python. Of 8 pairs there are more than 10^14, so that no
    text of one split is likely in the other.

    Args:
      split: "train" or "valid".
      index: from 0.
      seq_len: how many characters prompt, answers and an end of text have together.
    """
    num_filler = seq_len - 1 - len(QUESTION) - 2 * len(KEYS)
    name = f"recall {split} {index}".encode()
    drawn = hashlib.shake_256(name).digest(_DRAW_BYTES + num_filler)
    filler = drawn[_DRAW_BYTES:].translate(_FILLER_OF_BYTE).decode()

    # Each pair has a part of the first quarter to itself, and lies anywhere in it.
    number = int.from_bytes(drawn[:_DRAW_BYTES], "big")
    part_chars = seq_len // PAIRS_SHARE // len(KEYS)
    keys_left = list(KEYS)
    pairs: list[str] = []
    quarter: list[str] = []
    for part in range(len(KEYS)):
        number, key = divmod(number, len(keys_left))
        number, value = divmod(number, len(VALUES))
        number, place = divmod(number, part_chars - 1)
        pairs.append(keys_left.pop(key) + VALUES[value])
        letters = filler[part * part_chars : (part + 1) * part_chars]
        quarter.append(letters[:place] + pairs[-1] + letters[place + 2 :])

    rest = filler[part_chars * len(KEYS) :]
    return "".join([*quarter, rest, QUESTION]), "".join(sorted(pairs))
