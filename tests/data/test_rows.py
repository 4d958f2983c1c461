"""Rows: each target once an epoch, packing that crosses no document, exact mixtures, batches alike
on any hosts.
"""

import hashlib
import socket
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.data import open_data, packing
from tinylm.data import rows as rows_of
from tinylm.data.config import DataConfig, parse_mixture
from tinylm.data.pipeline import eval_batches, train_batches
from tinylm.data.rows import schedule

TEXTS = ["".join(chr(97 + (i * j) % 26) for j in range(3 + (i * 7) % 40)) for i in range(1, 41)]


def opened(tmp_path, seed=0, texts=TEXTS, **settings):
    if not (tmp_path / "text.txt").exists():
        (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts))
    config = DataConfig(
        **{
            "source": f"text:{tmp_path}/text.txt",
            "seq_len": 16,
            "batch_size": 4,
            "store_dir": str(tmp_path / "stores"),
        }
        | settings
    )
    return open_data(config, seed=seed, progress=False)


def epoch(rows, number=0):
    return rows.read(number * len(rows) + np.arange(len(rows)))


def stream(data, split="train"):
    store = (data.stores if split == "train" else data.valid_stores)[0]
    begin, end = store.manifest.splits[split].tokens
    out = np.empty(end - begin, np.int32)
    store.tokens.read(out, begin)
    return out


def scored(examples):
    """Return the sorted (input, target) pairs that carry loss."""
    chosen = examples["weights"] > 0
    return sorted(
        zip(examples["tokens"][chosen].tolist(), examples["targets"][chosen].tolist(), strict=True)
    )


@pytest.mark.parametrize("packing", ["stream", "packed", "single"])
def test_every_target_is_scored_once_in_every_epoch_in_another_order(tmp_path, packing):
    data = opened(tmp_path, packing=packing)
    ids = stream(data)
    wanted = sorted(zip([data.tokenizer.eot_id, *ids[:-1].tolist()], ids.tolist(), strict=True))
    first, second = epoch(data.train), epoch(data.train, 1)
    assert scored(first) == wanted and scored(second) == wanted
    assert not np.array_equal(first["targets"], second["targets"])


def test_each_window_comes_once_and_the_grid_moves_each_epoch(tmp_path):
    data = opened(
        tmp_path, texts=[chr(0x4E00 + i) for i in range(200)], tokenizer="char", valid_fraction=0
    )
    ids = stream(data)
    place = {tuple(ids[i : i + 2]): i for i in range(len(ids) - 1)} | {
        (ids[-1], ids[0]): len(ids) - 1
    }
    offsets = set()
    for number in range(6):
        starts = [place[tuple(row[:2])] for row in epoch(data.train, number)["targets"]]
        assert len(set(starts)) == len(starts) == len(data.train)
        full = {start % 16 for start in starts if start >= starts[0] % 16}
        offsets.add(min(full))
    assert len(offsets) > 2


@pytest.mark.parametrize("packing", ["stream", "packed", "single"])
def test_evaluation_scores_the_whole_split_once_in_order(tmp_path, packing):
    data = opened(tmp_path, packing=packing, valid_fraction=0.3)
    targets = []
    for batch in eval_batches(data.valid, batch_size=4, owned_rows=np.arange(4)):
        assert batch["targets"].shape == (4, 16)
        targets.append(batch["targets"][batch["weights"] > 0])
    found = np.concatenate(targets)
    expected = stream(data, "valid")
    assert len(found) == data.valid_tokens
    assert (
        np.array_equal(found, expected)
        if packing == "stream"
        else sorted(found) == sorted(expected)
    )


def test_packed_rows_hold_whole_documents_with_places_of_their_own(tmp_path):
    data = opened(tmp_path, packing="packed", seq_len=64, valid_fraction=0)
    eot, texts, rows = data.tokenizer.eot_id, [], epoch(data.train)
    for tokens, targets, weights, segments, positions in zip(*rows.values(), strict=True):
        assert np.array_equal(segments > 0, weights > 0)
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert tokens[here][0] == eot and targets[here][-1] == eot
            assert np.array_equal(tokens[here][1:], targets[here][:-1])
            assert np.array_equal(positions[here], np.arange(here.sum()))
            texts.append(data.tokenizer.decode(targets[here]))
    assert sorted(texts) == sorted(TEXTS)
    assert data.split_documents == 0


@pytest.mark.parametrize("packing", ["stream", "packed", "single"])
@pytest.mark.parametrize("ends", [[], [300], [20, 300], [99]])
def test_ready_ids_without_an_end_of_text_are_cut_inside_and_no_split_reads_the_other(
    tmp_path, packing, ends
):
    ids = np.arange(400, dtype=np.uint16) % 100
    ids[360:] += 100
    ids[ends] = 256
    ids.tofile(tmp_path / "ids.bin")
    data = opened(
        tmp_path, source=f"tokens:{tmp_path}/ids.bin", packing=packing, valid_fraction=0.1
    )
    cut = len(stream(data))
    assert ends or cut == 360
    targets = {}
    for split, rows in (("train", data.train), ("valid", data.valid)):
        examples = epoch(rows) if split == "train" else rows.read(np.arange(len(rows)))
        targets[split] = sorted(examples["targets"][examples["weights"] > 0].tolist())
    assert targets == {"train": sorted(ids[:cut].tolist()), "valid": sorted(ids[cut:].tolist())}


def test_a_document_longer_than_a_row_is_split_and_counted(tmp_path):
    data = opened(tmp_path, packing="packed", texts=["a" * 40, "bcd"] * 8, valid_fraction=0)
    assert data.split_documents == 8
    rows = epoch(data.train)
    assert (rows["weights"] > 0).sum() == 8 * (41 + 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_first_fit_is_the_first_row_with_room(lengths):
    free, expected = [], []
    for length in lengths:
        row = next((row for row, room in enumerate(free) if room >= length), len(free))
        free += [12] if row == len(free) else []
        free[row] -= length
        expected.append(row)
    assert packing.first_fit(np.array(lengths), 12).tolist() == expected


def test_first_fit_costs_nothing_for_columns():
    """So that rows may be long: memory for each of 2^60 columns is nowhere to be had."""
    lengths = np.array([3, 2**59, 2**59, 2**60, 7])
    assert packing.first_fit(lengths, 2**60).tolist() == [0, 0, 1, 2, 0]


@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_rows_of_a_million_tokens(tmp_path, packing):
    """Documents of 1 token to 2.2 rows: each target once, and places from the begin of a piece."""
    seq_len = 2**20
    sizes = [1, seq_len // 2, 2 * seq_len + seq_len // 5, 5000, seq_len]
    ids = np.random.default_rng(0).integers(0, 256, sum(sizes)).astype(np.uint16)
    ids[np.cumsum(sizes) - 1] = 256
    ids.tofile(tmp_path / "a.bin")
    data = opened(
        tmp_path,
        source=f"tokens:{tmp_path}/a.bin",
        seq_len=seq_len,
        batch_size=1,
        packing=packing,
        valid_fraction=0,
    )
    rows = epoch(data.train)
    counted = rows["weights"] > 0
    assert counted.sum() == len(ids)
    assert np.array_equal(np.bincount(rows["targets"][counted]), np.bincount(ids))
    assert data.split_documents == (0 if packing == "stream" else 1)
    if packing == "packed":
        assert len(data.train) == 4
        assert rows["positions"].max() == seq_len - 1


def test_packing_is_planned_once_for_store_and_context(tmp_path, monkeypatch):
    first = opened(tmp_path, packing="packed")
    monkeypatch.setattr(packing, "write_plan", lambda *args, **kwargs: pytest.fail("planned again"))
    assert np.array_equal(
        epoch(opened(tmp_path, packing="packed").train)["targets"], epoch(first.train)["targets"]
    )


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_plan_that_is_not_whole_is_made_again_and_dead_ones_go(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(packing, "PACK_DOCUMENTS", 7)
    first = opened(tmp_path, packing="packed")
    folder = first.stores[0].folder
    plan = folder / "plan-train-packed-16"
    wanted = epoch(first.train)["targets"]
    dead = folder / f"{plan.name}.{socket.gethostname()}.12345.tmp"
    dead.mkdir()
    if damage == "header":
        (plan / packing.PLAN).write_text("{")
    elif damage == "gone":
        (plan / "pieces-00000.bin").unlink()
    else:
        (plan / "ends-00000.bin").write_bytes((plan / "ends-00000.bin").read_bytes()[:-8])
    assert np.array_equal(epoch(opened(tmp_path, packing="packed").train)["targets"], wanted)
    assert packing.load_plan(plan) is not None and not dead.exists()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=7))
def test_a_mixture_is_exact_to_one_example_over_any_prefix(parts):
    spec = (
        ", ".join(f"{part / 100}*text:{i}" for i, part in enumerate(parts))
        if len(parts) > 1
        else "tales"
    )
    weights = [weight for weight, _ in parse_mixture(spec)]
    sources, ranks, counts = schedule(tuple(weights))
    for source, weight in enumerate(weights):
        so_far = np.cumsum(sources == source)
        assert np.all(np.abs(so_far - np.arange(1, len(sources) + 1) * float(weight)) < 1 + 1e-9)
        assert np.array_equal(ranks[sources == source], np.arange(counts[source]))
        assert counts[source] == weight * len(sources)


def test_a_mixture_reads_each_source_in_epochs_of_its_own(tmp_path):
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(text.upper() for text in TEXTS[:9]))
    source = f"0.75*text:{tmp_path}/text.txt, 0.25*text:{tmp_path}/b.txt"
    data = opened(tmp_path, source=source, tokenizer="char", packing="single", seq_len=48)
    rows = data.train.read(np.arange(200))
    upper = [data.tokenizer.decode(row[:1]).isupper() for row in rows["targets"]]
    assert sum(upper) == 50
    alone = opened(
        tmp_path, source=f"text:{tmp_path}/b.txt", packing="single", seq_len=48, batch_size=1
    )
    texts = [
        data.tokenizer.decode(row) for row, up in zip(rows["targets"], upper, strict=True) if up
    ]
    for start in range(0, 40, len(alone.train)):
        assert len(set(texts[start : start + len(alone.train)])) == len(alone.train)
    assert len(data.valid) > len(alone.valid)


@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_batches_are_alike_on_any_number_of_processes_and_threads(tmp_path, packing):
    data = opened(tmp_path, packing=packing)

    def digest(processes, threads, start=0, count=6):
        parts = [
            train_batches(
                data.train,
                batch_shape=(2, 8),
                owned_rows=owned,
                start=start,
                num_threads=threads,
                prefetch=3,
            )
            for owned in np.split(np.arange(8), processes)
        ]
        hashes = []
        for number in range(start, start + count):
            pieces = [next(part) for part in parts]
            assert all(index == number for index, _ in pieces)
            whole = {
                name: np.concatenate([piece[name] for _, piece in pieces], axis=1)
                for name in pieces[0][1]
            }
            assert whole["targets"].shape == (2, 8, 16)
            hashes.append(
                hashlib.sha256(
                    b"".join(whole[name].tobytes() for name in sorted(whole))
                ).hexdigest()
            )
        for part in parts:
            part.close()
        return hashes

    wanted = digest(1, 0)
    assert len(set(wanted)) == len(wanted)
    for processes in (1, 2, 4):
        for threads in (0, 1, 4):
            assert digest(processes, threads) == wanted
    assert digest(2, 2, start=4, count=2) == wanted[4:]
    plain = data.train.read(16 + np.arange(16))
    batch = next(
        train_batches(
            data.train, batch_shape=(2, 8), owned_rows=np.arange(8), start=1, num_threads=0
        )
    )[1]
    assert np.array_equal(batch["targets"].reshape(16, 16), plain["targets"])


def test_seeking_far_is_as_good_as_counting_there(tmp_path):
    data = opened(tmp_path)
    far = 10**12 + 17
    assert np.array_equal(
        data.train.read(np.array([far]))["targets"],
        data.train.read(np.array([far - 1, far]))["targets"][1:],
    )
    assert not np.array_equal(
        opened(tmp_path, seed=1).train.read(np.arange(9))["targets"],
        data.train.read(np.arange(9))["targets"],
    )


def test_what_a_thread_raises_is_raised_and_closing_ends_the_threads(tmp_path):
    class Broken:
        def __len__(self):
            return 8

        def read(self, indices):
            if indices[0] >= 192:
                raise OSError("the disk went away")
            return {"tokens": np.zeros((len(indices), 2), np.int32)}

    batches = train_batches(
        Broken(), batch_shape=(1, 8), owned_rows=np.arange(8), num_threads=2, prefetch=4
    )
    assert [next(batches)[0] for _ in range(24)] == [*range(24)]
    with pytest.raises(OSError, match="went away"):
        next(batches)
    import threading

    batches = train_batches(
        Broken(), batch_shape=(1, 8), owned_rows=np.arange(8), num_threads=2, prefetch=2
    )
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if "grain-prefetch" in thread.name:
            thread.join(5)
            assert not thread.is_alive()


def test_prompts_carry_no_loss_and_answers_come_back(tmp_path):
    data = opened(
        tmp_path, source="addition:12", tokenizer="char", packing="single", loss_on="answer"
    )
    rows = epoch(data.train)
    for targets, weights in zip(rows["targets"], rows["weights"], strict=True):
        prompt, _, answer = data.tokenizer.decode(targets).partition("=")
        a, b = prompt.split("+")
        assert int(answer) == int(a) + int(b)
        assert data.tokenizer.decode(targets[weights > 0]) == answer
        assert weights.sum() == len(answer) + 1
    held_out = {data.tokenizer.decode(prompt) for prompt, _ in data.answers()}
    assert held_out and not held_out & {
        data.tokenizer.decode(row).partition("=")[0] + "=" for row in rows["targets"]
    }
    every = opened(tmp_path, source="addition:12", tokenizer="char", packing="single")
    assert epoch(every.train)["weights"].sum() > 2 * rows["weights"].sum()


def test_weights_of_a_mixture_add_up_to_one():
    assert parse_mixture("0.7*tales, 0.3*text:a,b.txt") == [
        (Fraction(7, 10), "tales"),
        (Fraction(3, 10), "text:a,b.txt"),
    ]
    assert parse_mixture("2*tales, 1*addition") == [
        (Fraction(2, 3), "tales"),
        (Fraction(1, 3), "addition"),
    ]


def test_the_example_of_rows_holds_each_token_once_an_epoch(tmp_path, monkeypatch):
    """Windows of 4 targets over 10 tokens, with the offsets 1 and 3, as in the docstring of rows."""
    offsets = {0: 1, 1: 3}
    real_draw = rows_of.draw

    def draw(seed, purpose, epoch):
        return offsets[epoch] if purpose == "grid" else real_draw(seed, purpose, epoch)

    monkeypatch.setattr(rows_of, "draw", draw)
    rows = opened(
        tmp_path, texts=["012345678"], tokenizer="byte", seq_len=4, batch_size=1, valid_fraction=0.0
    ).train
    tokens = [*b"012345678", 256]
    for epoch, starts in ((0, {1, 5, 9}), (1, {1, 3, 7})):
        examples = rows.read(epoch * len(rows) + np.arange(len(rows)))
        assert {tokens.index(first) for first in examples["targets"][:, 0]} == starts
        targets = examples["targets"][examples["weights"] == 1]
        assert sorted(targets.tolist()) == sorted(tokens)
