"""What is held out for validation: about the share that was asked for, or an error; and it is
said.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.core.errors import UserError
from tinylm.data import open_data, prepare, splits
from tinylm.data.config import DataConfig
from tinylm.data.sources import make_source


def config_of(tmp_path, **changes):
    base = {
        "seq_len": 8,
        "batch_size": 1,
        "store_dir": str(tmp_path / "stores"),
        "source": f"text:{tmp_path}/*.txt",
    }
    return DataConfig(**base | changes)


def write_texts(tmp_path, sizes):
    for number, size in enumerate(sizes):
        text = "".join(chr(97 + (number + i * i) % 26) for i in range(size))
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")


def texts_of_splits(data):
    """Return the text that each split decodes to, document by document."""
    store = data.stores[0]
    found = {}
    for name, split in store.manifest.splits.items():
        begin, end = split.tokens
        ids = np.empty(end - begin, np.int32)
        store.tokens.read(ids, begin)
        found[name] = data.tokenizer.decode(ids)
    return found


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(prepare, "say", lines.append)
    return lines


def test_a_large_last_document_is_cut_inside(tmp_path, told):
    write_texts(tmp_path, [700, 700, 700, 700, 80_000])
    data = open_data(config_of(tmp_path), seed=0)
    held_out = data.valid_splits[0].bytes
    assert held_out == pytest.approx(0.1 * 82_800, abs=1)
    assert "held out for validation: the end of the last document, 10.0% of the text" in told
    text = texts_of_splits(data)
    whole = "".join((tmp_path / f"{n}.txt").read_text(encoding="utf-8") for n in range(5))
    assert text["train"] + text["valid"] == whole
    # An end of text follows each document, and none the part of the one that is cut.
    ids = np.empty(data.stores[0].manifest.tokens, np.int32)
    data.stores[0].tokens.read(ids, 0)
    assert (ids == data.tokenizer.eot_id).sum() == 5


def test_a_large_document_in_the_middle_is_cut_inside(tmp_path, told):
    write_texts(tmp_path, [100, 80_000, 100])
    data = open_data(config_of(tmp_path, packing="packed"), seed=0)
    assert data.valid_splits[0].bytes == pytest.approx(8_020, abs=1)
    assert data.valid_splits[0].documents == (2, 4)
    assert (
        "held out for validation: the last 2 documents, cut inside one, 10.0% of the text" in told
    )
    assert len(data.train) and len(data.valid)


def test_pairs_are_not_cut_inside_and_a_share_far_off_is_an_error(tmp_path):
    pairs = [{"prompt": "a", "completion": "b" * size} for size in (700, 700, 700, 700, 80_000)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    config = config_of(tmp_path, source=f"jsonl:{tmp_path}/pairs.jsonl")
    with pytest.raises(
        UserError,
        match=r"data\.valid_fraction=0\.1 of .* the nearest share is 96\.6%; set data\.valid",
    ):
        open_data(config, seed=0, progress=False)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=30), st.floats(0.01, 0.9))
@settings(max_examples=300, deadline=None)
def test_the_share_held_out_is_never_far_off(sizes, fraction):
    source = make_source("text:x", DataConfig(valid_fraction=fraction))
    cut = splits.choose_cut(np.cumsum(sizes), source, can_cut_inside=True)
    before = (
        sum(sizes[: cut.document]) + cut.inside * sizes[cut.document]
        if cut.inside
        else sum(sizes[: cut.document])
    )
    held_out = 1 - before / sum(sizes)
    assert fraction / 2 - 1e-9 <= held_out <= fraction * 2 + 1e-9
    if cut.inside:
        assert held_out == pytest.approx(fraction)


def test_random_documents_are_held_out_by_their_own_text(tmp_path, told):
    stories = [f"<{n}>{'x' * (n % 7)}." for n in range(400)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    data = open_data(
        config_of(tmp_path, valid_split="random", packing="packed", seq_len=32), seed=0
    )
    text = texts_of_splits(data)
    held_out = [story for story in stories if story in text["valid"]]
    assert data.valid_splits[0].bytes / sum(map(len, stories)) == pytest.approx(0.1, abs=0.05)
    assert "".join(held_out) == text["valid"]
    assert "".join(story for story in stories if story not in held_out) == text["train"]
    assert any(
        line.startswith(f"held out for validation: {len(held_out)} random documents, ")
        for line in told
    )
    # Whatever else is there, and in whichever order, a document stays on its side.
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(reversed(stories[:300])), encoding="utf-8")
    fewer = texts_of_splits(open_data(config_of(tmp_path, valid_split="random"), seed=0))
    assert fewer["valid"] == "".join(
        story for story in reversed(stories[:300]) if story in held_out
    )


def test_random_documents_of_a_single_text_are_refused(tmp_path):
    write_texts(tmp_path, [500])
    with pytest.raises(
        UserError, match=r"random put all 1 documents of .* on one side; set data\.valid_split=tail"
    ):
        open_data(config_of(tmp_path, valid_split="random"), seed=0, progress=False)
    with pytest.raises(UserError, match=r"data\.valid_split=random can't sort ids"):
        config_of(tmp_path, valid_split="random", source="tokens:x", tokenizer="gpt2").check()


@pytest.mark.parametrize(
    ("sizes", "valid_split"),
    [([300] * 12, "tail"), ([300] * 12, "random"), ([40, 3_000], "tail"), ([900], "tail")],
)
def test_training_documents_are_the_text_of_the_training_split(tmp_path, valid_split, sizes):
    write_texts(tmp_path, sizes)
    config = config_of(tmp_path, valid_split=valid_split, valid_fraction=0.3)
    source = make_source(config.source, config)
    learned = "".join(
        document.text for document in splits.training_documents(source, holds_out=True)
    )
    assert learned == texts_of_splits(open_data(config, seed=0, progress=False))["train"]
    everything = "".join(
        document.text for document in splits.training_documents(source, holds_out=False)
    )
    assert everything == "".join(
        (tmp_path / f"{n}.txt").read_text("utf-8") for n in sorted(range(len(sizes)), key=str)
    )
