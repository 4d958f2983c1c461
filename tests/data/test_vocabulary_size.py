"""The size of a vocabulary is known from the tokenizer, or from a store, before any text is
read.
"""

import pytest

from tinylm.core.errors import UserError
from tinylm.data import known_vocab_size, open_data
from tinylm.data.config import DataConfig
from tinylm.data.tokenizers import BpeTokenizer

TEXT = "The cat sat on the mat, and the other cat sat on the other mat. " * 20


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"tokenizer": "byte"}, 257),
        ({"tokenizer": "bpe:300"}, 300),
        ({"tokenizer": "gpt2"}, 50_257),
        ({"tokenizer": "char", "source": "addition:3"}, 5 + 2 + 1),
        ({"tokenizer": "gpt2", "vocab_top_k": 1000}, 1000),
    ],
)
def test_the_tokenizer_says_it_without_any_text(settings, size):
    found, origin = known_vocab_size(DataConfig(**{"source": "text:/no/such/text", **settings}))
    assert found == size
    assert origin.startswith("data.")


def test_a_file_says_it(tmp_path):
    tokenizer = BpeTokenizer.train([TEXT], 270)
    tokenizer.save(tmp_path)
    config = DataConfig(source="text:/no/such/text", tokenizer=f"hf:{tmp_path}/tokenizer.json")
    assert known_vocab_size(config)[0] == tokenizer.vocab_size
    with pytest.raises(UserError, match=r"no/tokenizer\.json of data\.tokenizer can't be read"):
        known_vocab_size(DataConfig(tokenizer="hf:no/tokenizer.json"))


def test_characters_are_counted_in_the_store_alone(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    config = DataConfig(
        source=f"text:{tmp_path}/a.txt", tokenizer="char", seq_len=8, store_dir=str(tmp_path / "s")
    )
    with pytest.raises(
        UserError, match=r"tinylm\.prepare .* or set --config\.model\.vocab_size \(typically 66"
    ):
        known_vocab_size(config)
    with pytest.raises(UserError, match="typically 66"):
        known_vocab_size(DataConfig(source="text:/no/such/text", tokenizer="char"))
    data = open_data(config, seed=0, progress=False)
    assert known_vocab_size(config)[0] == data.vocab_size == len(set(TEXT)) + 1
