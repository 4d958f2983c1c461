"""`tokens:` reads plain ids in the type they have, and refuses what would be ids by accident."""

import io

import numpy as np
import pytest

from tinylm.core.errors import UserError
from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.data.id_files import open_ids
from tinylm.data.tokenizers import ByteTokenizer

VOCABULARY = 50_257
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 4096)


def npy_of(ids):
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def npz_of(ids):
    file = io.BytesIO()
    np.savez(file, ids)
    return file.getvalue()


def llmc_of(ids):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype(np.uint16).tobytes()


def padded_with_minus_one(ids):
    return np.where(np.arange(len(ids)) % 7 == 0, -1, ids).astype(np.int64).tobytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (IDS.astype(np.int64).tobytes(), "holds integers of 8 bytes .int64 is NumPy's default"),
        (IDS[:2].astype(np.int64).tobytes(), "holds integers of 8 bytes"),
        (padded_with_minus_one(IDS), "holds integers of 8 bytes"),
        (IDS.astype(np.float32).tobytes(), r"holds floats .float32.*np\.uint16"),
        (IDS.astype(np.float64).tobytes(), "holds floats .float64"),
        (npy_of(IDS.astype(np.uint16)), r"is a NumPy \.npy file"),
        (npz_of(IDS.astype(np.uint16)), "is a zip archive, as np.savez"),
        (
            llmc_of(IDS),
            r"has the header of llm\.c's files before its uint16 ids; cut it off: tail -c \+1025",
        ),
        (
            b"Once upon a time there was a cat, and a dog." * 200,
            "holds text, not ids; read it with data.source=text:",
        ),
        ("Жила-была кошка, и была собака.".encode() * 200, "holds text, not ids"),
    ],
)
def test_what_is_no_plain_stream_of_ids_is_refused_and_named(tmp_path, content, match):
    path = tmp_path / "ids.bin"
    path.write_bytes(content + b" " * (len(content) % 2))
    with pytest.raises(UserError, match=match) as error:
        open_ids(str(path), VOCABULARY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int32])
@pytest.mark.parametrize("vocabulary", [257, VOCABULARY, 128_256])
@pytest.mark.parametrize("seed", range(5))
def test_plain_ids_are_read_as_they_are(tmp_path, kind, vocabulary, seed):
    rng = np.random.default_rng(seed)
    # As in a text: a few ids are common, most are rare.
    ids = np.minimum(rng.zipf(1.2, 10_000 + seed), min(vocabulary, np.iinfo(kind).max)) - 1
    ids.astype(kind).tofile(tmp_path / "ids.bin")
    assert np.array_equal(open_ids(str(tmp_path / "ids.bin"), vocabulary), ids)


def test_an_id_out_of_range_does_not_turn_uint32_into_uint16(tmp_path):
    ids = np.array([1, 2, 3, 70_000] * 50, np.uint32)
    ids.tofile(tmp_path / "ids.bin")
    assert open_ids(str(tmp_path / "ids.bin"), 50_257).tolist() == ids.tolist()


def test_big_endian_ids_are_named(tmp_path):
    (IDS % 256).astype(">u2").tofile(tmp_path / "ids.bin")
    config = DataConfig(
        source=f"tokens:{tmp_path}/ids.bin", seq_len=8, batch_size=1, store_dir=str(tmp_path / "s")
    )
    with pytest.raises(
        UserError,
        match=r"has id \d+ at byte \d+ \(its bytes are in big-endian order\), but data\.tok",
    ):
        open_data(config, seed=0, progress=False)


def test_the_held_out_share_of_ids_is_met_inside_a_document(tmp_path):
    ids = np.full(10_000, 65, np.uint16)
    ids[[99, 199, 299, 9_999]] = ByteTokenizer.eot_id
    ids.tofile(tmp_path / "ids.bin")
    config = DataConfig(
        source=f"tokens:{tmp_path}/ids.bin",
        seq_len=8,
        batch_size=1,
        packing="packed",
        store_dir=str(tmp_path / "s"),
    )
    data = open_data(config, seed=0, progress=False)
    assert data.stores[0].manifest.splits["train"].tokens == (0, 9_000)
    assert data.valid_tokens == 1_000 and data.valid_splits[0].bytes == 999
    assert data.stores[0].manifest.held_out == "the last 1,000 of 10,000 ids, 10.0% of them"
