"""Tokenizers: exact round trips on hostile text, ids of the libraries, saving, pruning."""

import base64
import io
import json
import os
import pathlib
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import write_gpt2, write_llama2c

from tinylm.core.errors import StorageError, UserError
from tinylm.data import open_data, splits, tokenizers
from tinylm.data.config import DataConfig
from tinylm.data.sources.base import Document
from tinylm.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    PrunedTokenizer,
    build_tokenizer,
    load_tokenizer,
    portions,
)
from tinylm.data.tokenizers import bpe as bpe_module
from tinylm.data.tokenizers.imported import read_llama2c
from tinylm.data.tokenizers.pruned import count_ids
from tinylm.data.tokenizers.tokenizer_json import encode_by_library

TEXT = "Once upon a time there was a cat.\nShe said: “café!”\n\n  Two  spaces, 日本 and 🙂.\n" * 20
HOSTILE = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [
            "<|endoftext|>",
            "</s>",
            "\n\n",
            "  ",
            "\u200d",
            "e\u0301",
            "🙂",
            "\r\n",
            "\x1f",
            " a",
            "'ll",
        ]
    ),
    max_size=8,
).map("".join)


def real(path):
    folder = os.environ.get("TINYLM_TEST_DATA")
    if not folder:
        pytest.skip("needs the real files that TINYLM_TEST_DATA names")
    return pathlib.Path(folder) / path


def sentencepiece_model():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        num_threads=1,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        allow_whitespace_only_pieces=True,
    )
    return model.getvalue()


def hf_json(bpe):
    content = json.loads(bpe.files["tokenizer.json"])
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    return json.dumps(content).encode()


def metaspace_json():
    """Return a tokenizer.json that marks spaces as SentencePiece does, as Llama's own is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    inner.train_from_iterator([TEXT], trainer)
    return inner.to_str().encode()


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    bpe = BpeTokenizer.train([TEXT], 300)
    own = tmp_path_factory.mktemp("vocabularies")
    gpt2 = write_gpt2(own / "gpt2")
    llama2c = write_llama2c(own / "tokenizer.bin")
    return {
        "byte": ByteTokenizer,
        "bpe": lambda: bpe,
        "hf": lambda: tokenizers.JsonTokenizer(hf_json(bpe)),
        "metaspace": lambda: tokenizers.JsonTokenizer(metaspace_json()),
        "sentencepiece": lambda: tokenizers.SentencePieceTokenizer(sentencepiece_model()),
        "gpt2": lambda: tokenizers.Gpt2Tokenizer.of_folder(str(gpt2)),
        "real gpt2": lambda: tokenizers.Gpt2Tokenizer.of_folder(str(real("gpt2_bpe"))),
        "llama2c": lambda: build_tokenizer(f"llama2c:{llama2c}", 0, list),
        "real llama2c": lambda: build_tokenizer(
            f"llama2c:{real('stories260k/tok512.bin')}", 0, list
        ),
        "pruned": lambda: PrunedTokenizer.of(bpe, [TEXT], 280),
    }


@pytest.fixture
def said(monkeypatch):
    """A function that returns what was said since it was called last."""
    lines = []
    for module in ("tokenizers", "store_finder"):
        monkeypatch.setattr(f"tinylm.data.{module}.say", lines.append)

    def take():
        text = "\n".join(lines)
        lines.clear()
        return text

    return take


@pytest.mark.parametrize(
    "name",
    [
        "byte",
        "bpe",
        "hf",
        "sentencepiece",
        "gpt2",
        "real gpt2",
        "llama2c",
        "real llama2c",
        "pruned",
    ],
)
def test_any_text_comes_back_and_never_holds_the_end(makers, name):
    tokenizer = makers[name]()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(HOSTILE)
    def check(text):
        if name == "sentencepiece" and ("\u2581" in text or "\0" in text):
            return  # its own mark for a space
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([*ids, tokenizer.eot_id]) == text

    check()


def test_characters_come_back_and_strange_ones_are_named():
    tokenizer = CharTokenizer.of([TEXT])
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == len(set(TEXT)) + 1
    assert tokenizer.decode([tokenizer.eot_id]) == ""
    with pytest.raises(UserError, match="'XY'"):
        tokenizer.encode("a cat XYX")


@pytest.mark.parametrize(
    "name", ["byte", "bpe", "hf", "sentencepiece", "gpt2", "llama2c", "pruned"]
)
def test_a_saved_tokenizer_is_the_same_and_an_altered_one_is_refused(makers, name, tmp_path):
    tokenizer = makers[name]()
    tokenizer.save(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    header = json.loads((tmp_path / tokenizers.HEADER_FILE).read_text())
    header["fingerprint"] = "0" * 32
    (tmp_path / tokenizers.HEADER_FILE).write_text(json.dumps(header))
    with pytest.raises(UserError, match="altered"):
        load_tokenizer(str(tmp_path))


def test_training_bpe_twice_gives_the_same_merges():
    assert (
        BpeTokenizer.train([TEXT], 320).fingerprint
        == BpeTokenizer.train(iter([TEXT]), 320).fingerprint
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["a", " b", "\n", "\n\n", "\r\n", "  ", "1", ",", "é", "it's", "\t"]),
        max_size=40,
    ).map("".join)
)
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(text):
    usual = portions.PIECE_CHARS
    whole = BPE.encode_whole([text])[0]
    portions.PIECE_CHARS = 2
    try:
        assert "".join(portions.split_text(text)) == text
        assert BPE.encode_batch([text])[0].tolist() == whole.tolist()
    finally:
        portions.PIECE_CHARS = usual


BPE = BpeTokenizer.train([TEXT + "a b\n\nit's 1,\r\n  é\t" * 9], 330)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(alphabet=st.characters(max_codepoint=127), max_size=40)
    | st.text(alphabet="a' 1,\n\tse\x1c_", max_size=20)
)
def test_ids_by_words_are_those_of_the_library(text):
    assert (
        BPE.encode_by_words([text, "", text])[0].tolist()
        == BPE.inner.encode(text, add_special_tokens=False).ids
    )


def test_one_text_that_is_not_ascii_does_not_send_the_others_to_the_library(monkeypatch):
    """A curly quote in a batch of a million characters would make all of it slow."""
    texts = ["it's a", "é a", "", "b 1,"]
    alone = [BPE.encode(text) for text in texts]
    by_library = []

    def encode_and_note(inner, texts):
        by_library.extend(texts)
        return encode_by_library(inner, texts)

    monkeypatch.setattr(bpe_module, "encode_by_library", encode_and_note)
    assert [ids.tolist() for ids in BPE.encode_whole(texts)] == alone
    assert by_library == ["é a"]


def test_gpt2_ids_of_both_tinystories_files_are_those_of_tiktoken():
    tokenizer = tokenizers.Gpt2Tokenizer.of_folder(str(real("gpt2_bpe")))
    texts = [
        story
        for name in ("train", "valid")
        for story in real(f"tinystories/{name}.txt").read_bytes().decode().split("<|endoftext|>")
        if story.strip()
    ]
    ids = tokenizer.encode_batch(texts)
    assert sum(map(len, ids)) + len(ids) == 1_231_914
    assert [one.tolist() for one in ids[:300]] == tokenizer.inner.encode_ordinary_batch(texts[:300])


@pytest.mark.parametrize("name", ["gpt2", "real gpt2"])
def test_gpt2_ids_are_those_of_tiktoken_whatever_the_text(makers, name):
    tokenizer = makers[name]()
    odd = ["plain", "has <|endoftext|> inside", "", TEXT]
    assert [one.tolist() for one in tokenizer.encode_batch(odd)] == [
        tokenizer.inner.encode_ordinary(text) for text in odd
    ]
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()), "merges are made"


def test_hf_and_sentencepiece_ids_are_those_of_their_libraries(makers):
    import sentencepiece
    import tokenizers as hf

    plain = hf.Tokenizer.from_str(makers["bpe"]().files["tokenizer.json"].decode())
    assert makers["hf"]().encode(TEXT) == plain.encode(TEXT, add_special_tokens=False).ids
    inner = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert makers["sentencepiece"]().encode(TEXT) == inner.encode(TEXT)


def run_c_encode(pieces, scores, text):
    """Return the ids that `encode` of llama2.c's run.c gives, by its own quadratic algorithm."""
    index = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    ids = [index[b" "]] if text else []
    for char in text:
        content = char.encode()
        ids += [index[content]] if content in index else [byte + 3 for byte in content]
    while True:
        best = -1e10
        place = None
        for i in range(len(ids) - 1):
            union = index.get(pieces[ids[i]] + pieces[ids[i + 1]])
            if union is not None and scores[union] > best:
                best = scores[union]
                place = (i, union)
        if place is None:
            return ids
        ids[place[0] : place[0] + 2] = [place[1]]


@pytest.mark.parametrize("name", ["own", "real"])
def test_llama2c_ids_are_those_of_run_c(tmp_path, name):
    if name == "own":
        content = write_llama2c(tmp_path / "tokenizer.bin").read_bytes()
        story = "the cat ate that"
    else:
        content = real("stories260k/tok512.bin").read_bytes()
        story = real("stories260k/expected_greedy_200.txt").read_text()
    tokenizer = tokenizers.Llama2cTokenizer(content)
    pieces, scores = read_llama2c(content)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text(alphabet="abehlnot .,\nTé🙂", max_size=30) | HOSTILE)
    def check(text):
        assert tokenizer.encode(text) == run_c_encode(pieces, scores, text)

    check()
    assert tokenizer.decode(tokenizer.encode(story)) == story


def test_pruning_keeps_the_most_common_ids_and_counts_the_rest():
    texts = ["aaaa bbb cc d"]
    pruned = PrunedTokenizer.of(CharTokenizer.of(texts), texts, 5)
    assert pruned.vocab_size == 5
    assert pruned.decode(pruned.encode("abc d")) == "ab\ufffd \ufffd"
    assert pruned.counts == {"counted_tokens": 13, "dropped_tokens": 3}


def test_a_pruned_byte_level_vocabulary_spells_what_it_drops(makers):
    base = makers["bpe"]()
    pruned = PrunedTokenizer.of(base, [TEXT], 270)
    assert pruned.vocab_size == 270 and pruned.spells
    kept = {int(i) for i in pruned.kept}
    common = np.argsort(-count_ids(base, [TEXT]), kind="stable")[:10]
    assert {int(i) for i in common} <= kept | {base.eot_id}
    assert len(pruned.encode(TEXT)) > len(base.encode(TEXT))


def tokenizer_json(bpe, *added, **changes):
    """Return the file of `bpe` without its end of text, with added words and other settings of its
    model.
    """
    from tokenizers import Tokenizer

    content = {**json.loads(bpe.files["tokenizer.json"]), "added_tokens": []}
    content["model"] = {**content["model"], **changes}
    inner = Tokenizer.from_str(json.dumps(content))
    inner.add_tokens(list(added))
    return inner.to_str().encode()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_a_text_that_spells_the_end_does_not_end(makers, special, end):
    """Whatever the file says of the token: by the library's own doing, one that isn't special ends
    the text.
    """
    from tokenizers import AddedToken

    content = tokenizer_json(
        makers["bpe"](), AddedToken(end, special=special), AddedToken("café", special=special)
    )
    tokenizer = tokenizers.JsonTokenizer(content, end)
    text = f"a {end}{end} café\n{end}"
    ids = tokenizer.encode(text)
    assert tokenizer.eot_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.describe_end() == f"{end} (id {tokenizer.eot_id})"


def sides(texts, side):
    """Return those texts that a random split puts on one side."""
    return [document.text for document in splits.side_of(map(Document, texts), side, 0.3)]


@pytest.mark.parametrize("where", ["tail", "random", "source"])
@pytest.mark.parametrize("tokenizer", ["bpe:290", "char", "pruned"])
def test_a_tokenizer_learns_from_the_training_split_alone(tmp_path, where, tokenizer):
    """The alphabet of char alone is that of all text."""
    train = [f"once upon {i}" for i in range(40)]
    valid = ["QZQZQZ" * 9] * 4
    if where == "random":
        train = sides([f"once upon {i}" for i in range(60)], "train")
        valid = sides([f"QZQZQZ {i}" for i in range(60)], "valid")
    (tmp_path / "train.txt").write_text(
        "<|endoftext|>".join(train if where == "source" else [*train, *valid])
    )
    (tmp_path / "valid.txt").write_text("<|endoftext|>".join(valid))
    config = DataConfig(
        source=f"text:{tmp_path}/train.txt",
        valid_fraction=0.3,
        seq_len=8,
        batch_size=1,
        tokenizer="char" if tokenizer == "pruned" else tokenizer,
        vocab_top_k=9 if tokenizer == "pruned" else 0,
        valid_split="random" if where == "random" else "tail",
        valid_source=f"text:{tmp_path}/valid.txt" if where == "source" else "",
        store_dir=str(tmp_path / "stores"),
    )
    learned = open_data(config, seed=0, progress=False).tokenizer
    written = [learned.decode([i]) for i in range(learned.vocab_size)]
    if tokenizer == "char":
        assert {"Q", "Z"} <= set(written)
    else:
        assert not any(
            "QZ" in token or token == "Z" * (tokenizer == "cut") for token in written if token
        )


def word_level(vocab, unknown="[UNK]"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token=unknown)
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner.to_str().encode()


def test_a_vocabulary_whose_words_have_the_end_among_them_gives_another_id_or_says_so():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = tokenizers.JsonTokenizer(word_level(["[UNK]", "</s>", "once"]))
    assert tokenizer.encode("once </s> upon") == [2, 0, 0]
    inner = Tokenizer(models.BPE({"a": 0, "</s>": 1}, [], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"a text holds '</s>', for which .* set data\.eot_token"):
        tokenizers.JsonTokenizer(inner.to_str().encode()).encode("a </s>")
    with pytest.raises(
        UserError, match="one token, '</s>', for the end of text and for what it can't spell"
    ):
        tokenizers.JsonTokenizer(word_level(["a", "</s>"], "</s>"))


def test_the_end_of_text_is_the_one_that_is_named_or_declared_or_a_new_one_that_is_said(
    makers, tmp_path, said
):
    vocab = json.loads(makers["bpe"]().files["tokenizer.json"])["model"]["vocab"]
    vocab = {"<|pad|>" if token == "<|endoftext|>" else token: i for token, i in vocab.items()}
    (tmp_path / "tokenizer.json").write_bytes(
        tokenizer_json(makers["bpe"](), "<|im_end|>", vocab=vocab)
    )
    spec = f"hf:{tmp_path}/tokenizer.json"
    with_new = build_tokenizer(spec, 0, list)
    assert with_new.eot_id == with_new.vocab_size - 1 == 301
    assert "has no token of a usual name" in said()
    named = build_tokenizer(spec, 0, list, "<|im_end|>")
    assert (named.eot_id, named.vocab_size) == (300, 301)
    assert "ends a text with <|im_end|> (id 300)" in said()
    with pytest.raises(
        UserError, match=r"data\.eot_token=<\|imend\|> isn't a token.*did you mean '<\|im_end\|>'"
    ):
        build_tokenizer(spec, 0, list, "<|imend|>")
    hashes = tokenizers.tokenizer_file_hashes(spec)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert build_tokenizer(spec, 0, list).fingerprint == named.fingerprint
    assert tokenizers.tokenizer_file_hashes(spec) != hashes
    named.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eot_id == 300
    with pytest.raises(
        UserError, match=r"data\.eot_token=a is for data\.tokenizer=hf: and sentencepiece:"
    ):
        DataConfig(eot_token="a").check()


def test_another_piece_of_sentencepiece_can_end_a_text(tmp_path):
    (tmp_path / "a.model").write_bytes(sentencepiece_model())
    tokenizer = build_tokenizer(f"sentencepiece:{tmp_path}/a.model", 0, list, "<s>")
    assert tokenizer.describe_end() == "<s> (id 1)"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eot_id == 1
    for piece, match in (("<unk>", "can't be the end of text"), ("nosuch", "isn't a piece")):
        with pytest.raises(UserError, match=match):
            build_tokenizer(f"sentencepiece:{tmp_path}/a.model", 0, list, piece)


@pytest.mark.parametrize("word", ["člověk", "Ġab", "日本", "<|x|>", "éé"])
def test_added_words_of_a_byte_level_vocabulary_come_back(makers, word, tmp_path, said):
    """Also those whose letters are among the ones that such a vocabulary writes for bytes."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(makers["bpe"](), word))
    tokenizer = build_tokenizer(f"hf:{tmp_path}/tokenizer.json", 0, list)
    assert 300 in tokenizer.encode(f"a {word} b") and tokenizer.decode([300]) == word
    assert tokenizer.decode(tokenizer.encode(f"a {word} b")) == f"a {word} b"
    assert tokenizer.count_bytes(np.array([300])) == len(word.encode())
    assert "back exactly" not in said()


def test_an_added_word_that_does_not_come_back_is_said(makers, tmp_path, said):
    from tokenizers import AddedToken

    (tmp_path / "tokenizer.json").write_bytes(
        tokenizer_json(makers["bpe"](), AddedToken("<x>", lstrip=True))
    )
    build_tokenizer(f"hf:{tmp_path}/tokenizer.json", 0, list)
    assert "doesn't write its added words back exactly: 'a <x> b' becomes 'a<x> b'" in said()


def test_what_a_tokenizer_cannot_spell_is_counted_and_said(tmp_path, said):
    (tmp_path / "tokenizer.json").write_bytes(word_level(["[UNK]", "</s>", "once", "upon"]))
    (tmp_path / "a.txt").write_text(
        "once upon 日本<|endoftext|>once nothing upon<|endoftext|>once upon once"
    )
    config = DataConfig(
        source=f"text:{tmp_path}/a.txt",
        tokenizer=f"hf:{tmp_path}/tokenizer.json",
        seq_len=2,
        batch_size=1,
        store_dir=str(tmp_path / "stores"),
    )
    data = open_data(config, seed=0, progress=False)
    assert data.stores[0].manifest.unknown == 2
    assert "2 of 12 tokens of text:" in (line := said())
    assert "can't spell, such as '日本'" in line
    np.array([2, 0, 0, 1, 3, 2, 1, 2, 3, 1], np.uint16).tofile(tmp_path / "ids.bin")
    config.source = f"tokens:{tmp_path}/ids.bin"
    assert open_data(config, seed=0, progress=False).stores[0].manifest.unknown == 2


@pytest.mark.parametrize("size", [0, 20])
def test_unknown_ids_of_sentencepiece_and_of_a_pruned_vocabulary_are_known(size):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat"] * 9),
        model_writer=model,
        vocab_size=12,
        model_type="char",
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = tokenizers.SentencePieceTokenizer(model.getvalue())
    if size:
        tokenizer = PrunedTokenizer.of(tokenizer, ["a cat"], 6)
    assert tokenizer.count_unknown(np.array(tokenizer.encode("a cat"))) == 0
    assert tokenizer.count_unknown(np.array(tokenizer.encode("a 日 cat"))) == 1


@pytest.mark.parametrize(
    "name", ["byte", "bpe", "hf", "metaspace", "sentencepiece", "gpt2", "llama2c", "pruned"]
)
def test_bytes_of_ids_are_those_of_the_texts(makers, name):
    """So that bits per byte of ready ids are those of the text they were made from."""
    tokenizer = makers[name]()
    texts = ["Once upon a cat.", "She said: “café!”", "there was"]
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot_id]]
    assert tokenizer.count_bytes(np.array(ids)) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    "name", ["byte", "bpe", "hf", "metaspace", "sentencepiece", "gpt2", "llama2c", "pruned"]
)
def test_what_follows_other_ids_keeps_its_space(makers, name):
    tokenizer = makers[name]()
    text = "Once upon a time there was a cat."
    ids = tokenizer.encode(text)
    for i in range(len(ids) + 1):
        assert tokenizer.decode(ids[:i]) + tokenizer.decode_after(ids[:i], ids[i:]) == text


@pytest.mark.parametrize("name", ["metaspace", "sentencepiece"])
def test_a_pruned_vocabulary_keeps_the_spaces_around_what_it_does_not_know(makers, name):
    base = makers[name]()
    pruned = PrunedTokenizer.of(base, ["there was a cat"], 99)
    strange = "\ufffd" * len(base.encode("Two"))
    assert (
        pruned.decode(pruned.encode("Two was Two Two a cat"))
        == f"{strange} was{strange}{strange} a cat"
    )


@pytest.mark.parametrize(
    "damage", [b"{", b'{"name": "char"}', b"[]", b'{"name": "no:kind"}', b'{"chars": "ab"}']
)
def test_a_damaged_header_is_one_clear_line(tmp_path, damage):
    CharTokenizer("ab").save(tmp_path)
    (tmp_path / tokenizers.HEADER_FILE).write_bytes(damage)
    with pytest.raises(UserError, match="holds no whole tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\n\xff", b"", b'{"a": 0}'])
def test_a_damaged_gpt2_vocabulary_is_one_clear_line(tmp_path, name, content):
    write_gpt2(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="belong together"):
        build_tokenizer(f"gpt2:{tmp_path}", 0, list)


BYTE_RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


@pytest.mark.parametrize(
    "content", [b"", b"YQ== 0\nYg== 0\n", BYTE_RANKS[7:], BYTE_RANKS + b"YWI= 9\n"]
)
def test_ranks_that_are_no_vocabulary_are_one_clear_line(tmp_path, content):
    tokenizers.Gpt2Tokenizer.restore(BYTE_RANKS).save(tmp_path)
    (tmp_path / "gpt2.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=r"holds no whole tokenizer.*its ranks must be"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bpe", "hf", "gpt2", "llama2c", "sentencepiece", "pruned"])
def test_half_of_a_surrogate_pair_is_one_clear_line(makers, name):
    with pytest.raises(UserError, match=r"not valid Unicode at character 1: '\\udcff'"):
        makers[name]().encode("a\udcffb")


def test_a_vocabulary_without_unknown_token_says_what_it_cannot_spell():
    from tokenizers import Tokenizer, models

    word_kinds = [kind({"a": 0}, unk_token="zz") for kind in (models.WordLevel, models.WordPiece)]
    for kind in [*word_kinds, models.Unigram([("a", -1.0)])]:
        with pytest.raises(UserError, match="can't spell a text: "):
            tokenizers.JsonTokenizer(Tokenizer(kind).to_str().encode()).encode("hello")


def test_ids_that_no_memory_holds_are_refused():
    from tokenizers import Tokenizer, models

    # The library writes a vocabulary in the order of its ids and tries each one: so the large id is
    # put in afterwards.
    content = (
        Tokenizer(models.BPE({"a": 0, "b": 7}, [])).to_str().replace('"b":7', '"b":4000000000')
    )
    with pytest.raises(UserError, match=r"not a tokenizer\.json: its ids reach 4000000001"):
        tokenizers.JsonTokenizer(content.encode())


@pytest.mark.parametrize("place", ["file", "full"])
def test_a_tokenizer_that_cannot_be_saved_is_one_clear_line(makers, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"the tokenizer can't be written into .*: "):
            makers["bpe"]().save(tmp_path / place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", [b"no such thing", b""])
@pytest.mark.parametrize("spec", ["hf:{}", "llama2c:{}", "sentencepiece:{}", "gpt2:{}"])
def test_a_wrong_or_missing_vocabulary_is_one_clear_line(spec, content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    for path in (tmp_path / "x", tmp_path / "absent"):
        with pytest.raises(UserError) as error:
            build_tokenizer(spec.format(path), 0, list)
        assert "\n" not in str(error.value)


def test_words_beyond_those_of_a_language_are_cut_for_learning_alone():
    from tinylm.data.tokenizers.bpe import LONGEST_WORD, bound_words

    dna = "".join("ACGT"[i * i % 7 % 4] for i in range(4 * LONGEST_WORD + 5))
    text = f"a {dna} b{' ' * 3 * LONGEST_WORD}c"
    parts = list(bound_words(text))
    assert "".join(parts) == text
    assert max(len(word) for part in parts for word in part.split(" ")) <= LONGEST_WORD
    assert max(len(part) - len(part.strip(" ")) for part in parts) <= 2 * LONGEST_WORD
    usual = "plain words, none of them long. " * 500
    assert list(bound_words(usual)) == [usual]
    tokenizer = BpeTokenizer.train([text] * 3, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
