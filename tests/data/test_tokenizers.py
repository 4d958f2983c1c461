"""Tokenizers: exact round trips on hostile text, ids of the libraries they stand for, saving, cutting."""

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

from tinylm.core.errors import StorageError, UserError
from tinylm.data import pieces, tokenizers, vocabularies
from tinylm.data.bpe import BpeTokenizer
from tinylm.data.cut import CutTokenizer, count_ids
from tinylm.data.tokenizers import ByteTokenizer, CharTokenizer, build_tokenizer, load_tokenizer

TEXT = "Once upon a time there was a cat.\nShe said: “café!”\n\n  Two  spaces, 日本 and 🙂.\n" * 20
HOSTILE = st.text(max_size=60) | st.lists(
    st.sampled_from(["<|endoftext|>", "</s>", "\n\n", "  ", "\u200d", "e\u0301", "🙂", "\r\n", "\x1f", " a", "'ll"]),
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
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=330, model_type="bpe", num_threads=1,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return model.getvalue()


def hf_json(bpe):
    content = json.loads(bpe.files["tokenizer.json"])
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
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
def makers():
    bpe = BpeTokenizer.train([TEXT], 300)
    return {
        "byte": ByteTokenizer,
        "bpe": lambda: bpe,
        "hf": lambda: vocabularies.HfTokenizer(hf_json(bpe)),
        "metaspace": lambda: vocabularies.HfTokenizer(metaspace_json()),
        "sentencepiece": lambda: vocabularies.SentencePieceTokenizer(sentencepiece_model()),
        "gpt2": lambda: vocabularies.Gpt2Tokenizer.of_folder(str(real("gpt2_bpe"))),
        "llama2c": lambda: build_tokenizer(f"llama2c:{real('stories260k/tok512.bin')}", 0, list),
        "cut": lambda: CutTokenizer.of(bpe, [TEXT], 280),
    }


@pytest.mark.parametrize("name", ["byte", "bpe", "hf", "sentencepiece", "gpt2", "llama2c", "cut"])
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


@pytest.mark.parametrize("name", ["byte", "bpe", "hf", "sentencepiece", "gpt2", "llama2c", "cut"])
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
    assert BpeTokenizer.train([TEXT], 320).fingerprint == BpeTokenizer.train(iter([TEXT]), 320).fingerprint


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["a", " b", "\n", "\n\n", "\r\n", "  ", "1", ",", "é", "it's", "\t"]), max_size=40).map(
        "".join
    )
)
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(text):
    cut, whole = pieces._PIECE_CHARS, BPE._encode_pieces([text])[0]
    pieces._PIECE_CHARS = 2
    try:
        assert "".join(pieces.pieces(text)) == text
        assert BPE.encode_batch([text])[0].tolist() == whole.tolist()
    finally:
        pieces._PIECE_CHARS = cut


BPE = BpeTokenizer.train([TEXT + "a b\n\nit's 1,\r\n  é\t" * 9], 330)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(alphabet=st.characters(max_codepoint=127), max_size=40) | st.text(alphabet="a' 1,\n\tse\x1c_", max_size=20)
)
def test_ids_by_words_are_those_of_the_library(text):
    assert BPE._encode_words([text, "", text])[0].tolist() == BPE._inner.encode(text, add_special_tokens=False).ids


def test_gpt2_ids_are_those_of_tiktoken_and_of_both_tinystories_files():
    tokenizer = vocabularies.Gpt2Tokenizer.of_folder(str(real("gpt2_bpe")))
    texts = [
        story
        for name in ("train", "valid")
        for story in real(f"tinystories/{name}.txt").read_bytes().decode().split("<|endoftext|>")
        if story.strip()
    ]
    ids = tokenizer.encode_batch(texts)
    assert sum(map(len, ids)) + len(ids) == 1_231_914
    assert [one.tolist() for one in ids[:300]] == tokenizer._inner.encode_ordinary_batch(texts[:300])
    odd = ["plain", "has <|endoftext|> inside", ""]
    assert [one.tolist() for one in tokenizer.encode_batch(odd)] == [tokenizer._inner.encode_ordinary(t) for t in odd]


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
        best, place = -1e10, None
        for i in range(len(ids) - 1):
            union = index.get(pieces[ids[i]] + pieces[ids[i + 1]])
            if union is not None and scores[union] > best:
                best, place = scores[union], (i, union)
        if place is None:
            return ids
        ids[place[0] : place[0] + 2] = [place[1]]


def test_llama2c_ids_are_those_of_run_c():
    content = real("stories260k/tok512.bin").read_bytes()
    tokenizer = vocabularies.Llama2cTokenizer(content)
    pieces, scores = vocabularies._read_llama2c(content)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text(alphabet="abehlnot .,\nTé🙂", max_size=30) | HOSTILE)
    def check(text):
        assert tokenizer.encode(text) == run_c_encode(pieces, scores, text)

    check()
    story = real("stories260k/expected_greedy_200.txt").read_text()
    assert tokenizer.decode(tokenizer.encode(story)) == story


def test_a_cut_keeps_the_most_common_ids_and_counts_the_rest():
    texts = ["aaaa bbb cc d"]
    cut = CutTokenizer.of(CharTokenizer.of(texts), texts, 5)
    assert cut.vocab_size == 5
    assert cut.decode(cut.encode("abc d")) == "ab\ufffd \ufffd"
    assert cut.counts == {"counted_tokens": 13, "dropped_tokens": 3}


def test_a_cut_of_a_byte_level_vocabulary_spells_what_it_drops(makers):
    base = makers["bpe"]()
    cut = CutTokenizer.of(base, [TEXT], 270)
    assert cut.vocab_size == 270 and cut.spells
    kept = {int(i) for i in cut._kept}
    common = np.argsort(-count_ids(base, [TEXT]), kind="stable")[:10]
    assert {int(i) for i in common} <= kept | {base.eot_id}
    assert len(cut.encode(TEXT)) > len(base.encode(TEXT))


@pytest.mark.parametrize("name", ["byte", "bpe", "hf", "metaspace", "sentencepiece", "gpt2", "llama2c", "cut"])
def test_bytes_of_ids_are_those_of_the_texts(makers, name):
    """So that bits per byte of ready ids are those of the text they were made from."""
    tokenizer = makers[name]()
    texts = ["Once upon a cat.", "She said: “café!”", "there was"]
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot_id]]
    assert tokenizer.count_bytes(np.array(ids)) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("name", ["byte", "bpe", "hf", "metaspace", "sentencepiece", "gpt2", "llama2c", "cut"])
def test_what_follows_other_ids_keeps_its_space(makers, name):
    tokenizer, text = makers[name](), "Once upon a time there was a cat."
    ids = tokenizer.encode(text)
    for i in range(len(ids) + 1):
        assert tokenizer.decode(ids[:i]) + tokenizer.decode_after(ids[:i], ids[i:]) == text


@pytest.mark.parametrize("name", ["metaspace", "sentencepiece"])
def test_a_cut_keeps_the_spaces_around_what_it_does_not_know(makers, name):
    base = makers[name]()
    cut = CutTokenizer.of(base, ["there was a cat"], 99)
    strange = "\ufffd" * len(base.encode("Two"))
    assert cut.decode(cut.encode("Two was Two Two a cat")) == f"{strange} was{strange}{strange} a cat"


@pytest.mark.parametrize("damage", [b"{", b'{"name": "char"}', b"[]", b'{"name": "no:kind"}', b'{"chars": "ab"}'])
def test_a_damaged_header_is_one_clear_line(tmp_path, damage):
    CharTokenizer("ab").save(tmp_path)
    (tmp_path / tokenizers.HEADER_FILE).write_bytes(damage)
    with pytest.raises(UserError, match="holds no whole tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\n\xff", b"", b'{"a": 0}'])
def test_a_damaged_gpt2_vocabulary_is_one_clear_line(tmp_path, name, content):
    for file in ("encoder.json", "vocab.bpe"):
        (tmp_path / file).write_bytes(content if file == name else real(f"gpt2_bpe/{file}").read_bytes())
    with pytest.raises(UserError, match="belong together"):
        build_tokenizer(f"gpt2:{tmp_path}", 0, list)


BYTE_RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


@pytest.mark.parametrize("content", [b"", b"YQ== 0\nYg== 0\n", BYTE_RANKS[7:], BYTE_RANKS + b"YWI= 9\n"])
def test_ranks_that_are_no_vocabulary_are_one_clear_line(tmp_path, content):
    vocabularies.Gpt2Tokenizer.restore(BYTE_RANKS).save(tmp_path)
    (tmp_path / "gpt2.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=r"holds no whole tokenizer.*its ranks must be"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bpe", "hf", "gpt2", "llama2c", "sentencepiece", "cut"])
def test_half_of_a_surrogate_pair_is_one_clear_line(makers, name):
    with pytest.raises(UserError, match=r"no Unicode at character 1: '\\udcff'"):
        makers[name]().encode("a\udcffb")


def test_a_vocabulary_without_unknown_token_says_what_it_cannot_spell():
    from tokenizers import Tokenizer, models

    word_kinds = [kind({"a": 0}, unk_token="zz") for kind in (models.WordLevel, models.WordPiece)]
    for kind in [*word_kinds, models.Unigram([("a", -1.0)])]:
        with pytest.raises(UserError, match="can't spell a text: "):
            vocabularies.HfTokenizer(Tokenizer(kind).to_str().encode()).encode("hello")


def test_ids_that_no_memory_holds_are_refused():
    from tokenizers import Tokenizer, models

    content = Tokenizer(models.BPE({"a": 0, "b": 4_000_000_000}, [])).to_str().encode()
    with pytest.raises(UserError, match=r"no tokenizer\.json: its ids reach 4000000001"):
        vocabularies.HfTokenizer(content)


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
