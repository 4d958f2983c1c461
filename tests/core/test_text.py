"""Tables and figures as text."""

import jax
import pytest
from flax import traverse_util

from tinylm.core.text import bytes_text, columns, path_text, secs_text, table


def test_columns_of_a_table_begin_and_end_at_one_place():
    heads = ("name", "shape", "bytes")
    rows = [heads, ("a", "2 3", "24"), ("blocks/kernel", "8 16", "1,024")]
    lines = table(rows, num_right=1)
    assert len({len(line) for line in lines}) == 1
    assert len({line.index(shape) for line, (_, shape, _) in zip(lines, rows, strict=True)}) == 1
    assert [line.split()[-1] for line in lines] == ["bytes", "24", "1,024"]


def test_no_line_ends_in_spaces():
    assert table([("a", "long"), ("b", "x")])[1] == "b  x"
    assert columns(("a", "b", ""), (3, -3, 5)) == "a    b"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**29, "1.50 GiB")]
)
def test_bytes(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("secs", "text"), [(2e-6, "2.00 us"), (0.05, "50.00 ms"), (90, "90.00 s"), (5400, "1.50 h")]
)
def test_secs(secs, text):
    assert secs_text(secs) == text


def test_a_path_is_that_of_the_flat_tree():
    tree = {"blocks": {"mlp": {"kernel": 1.0}, "norm": {"scale": 2.0}}, "embedding": 3.0}
    flat = traverse_util.flatten_dict(tree, sep="/")
    found = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert found == flat
