"""Associative recall: what is asked for at the end stands in the first quarter of a row, and nowhere
else.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.data.sources import recall
from tinylm.data.sources.recall import KEYS, recall_text
from tinylm.data.tokenizers import CharTokenizer
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer, init_parameters


@pytest.mark.parametrize("seq_len", [64, 100, 1024])
def test_answers_stand_in_the_first_quarter_alone(seq_len):
    for index in range(20):
        prompt, answers = recall_text("train", index, seq_len)
        assert len(prompt) + len(answers) == seq_len - 1
        assert prompt[-1] == "?"
        early, rest = prompt[: seq_len // 4], prompt[seq_len // 4 : -1]
        assert set(rest) <= set(recall.FILLER)
        pairs = re.findall("[a-h][A-P]", early)
        assert answers == "".join(sorted(pairs))
        assert answers[::2] == KEYS
        # Nothing else in the row is of a pair.
        assert len(re.findall("[a-hA-P]", prompt)) == 2 * len(KEYS)


def test_each_text_and_split_has_pairs_of_its_own():
    texts = [recall_text(split, index, 128) for split in ("train", "valid") for index in range(200)]
    assert len(set(texts)) == 400
    assert texts[:3] == [recall_text("train", index, 128) for index in range(3)]
    # Any value may belong to any key, and any key may come first.
    assert {answers[1] for _, answers in texts} == set(recall.VALUES)
    assert {re.search("[a-h]", prompt)[0] for prompt, _ in texts} == set(KEYS)
    # A shared folder holds stores of other machines, which have to be of the same texts.
    assert texts[0][1] == "aAbBcBdAeAfKgHhO"


def test_a_text_fills_a_row_and_its_answers_alone_carry_loss(tmp_path):
    config = DataConfig(
        source="recall:40",
        tokenizer="char",
        seq_len=64,
        packing="single",
        loss_on="answer",
        store_dir=str(tmp_path),
    )
    data = open_data(config, seed=0, progress=False)
    assert (len(data.train), len(data.valid)) == (40, 3)
    assert data.split_documents == 0
    rows = data.train.read(np.arange(40))
    num_answers = 2 * len(KEYS) + 1  # and the end of text
    assert (rows["weights"][:, -num_answers:] == 1).all()
    assert rows["weights"].sum() == 40 * num_answers

    config.seq_len = 63
    with pytest.raises(UserError, match=r"recall:40 needs rows of at least 64 tokens.*here 63"):
        open_data(config, seed=0, progress=False)


@pytest.mark.parametrize("windows", [(16, 16), (4, 0)])
def test_a_window_cannot_know_the_answers(windows):
    """By the logits over the answers, once the pairs are those of another text: windows that don't
    reach them see no difference, a layer that sees all does.
    """
    tokenizer = CharTokenizer.of(recall_text("train", index, 128)[0] for index in range(9))
    prompt, answers = recall_text("train", 0, 128)
    other, _ = recall_text("train", 1, 128)
    rows = [prompt + answers, other[:32] + prompt[32:] + answers]
    tokens_BT = jnp.asarray(tokenizer.encode_batch(rows))

    config = ModelConfig(embed_dim=32, num_layers=2, attention_window=windows, init_std=0.3)
    config = config.resolve(tokenizer.vocab_size, 128)
    graph, _, _ = abstract_transformer(config)
    params = jax.jit(lambda: init_parameters(config, 0))()
    logits_BTV = jax.jit(lambda params: nnx.merge(graph, params)(tokens_BT))(params)
    one, another = np.asarray(logits_BTV[:, -len(answers) :])
    assert np.array_equal(one, another) == (0 not in windows)
