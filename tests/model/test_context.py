"""Attention over rows that the mesh splits by position equals attention over whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.extend.random import threefry2x32_p

from tinylm.core.mesh import MeshConfig, activation_sharding, make_mesh
from tinylm.core.ring import balanced_order, order_of_parts
from tinylm.model.attention import attend
from tinylm.model.kernels import (
    AttentionOptions,
    heads_axes,
    plain_attention,
    splash_block_sizes,
    splash_mask,
)
from tinylm.model.layers import Dropout
from tinylm.model.random_bits import bits_at
from tinylm.model.splash_rows import splash_over_gathered
from tinylm.model.visibility import Visibility
from tinylm.tools.programs import read_collectives

B, N, K, T, H = 2, 4, 2, 64, 8
# Documents of a packed row: some within a stretch, one over several devices.
ENDS = ((5, 21, 22, 60), (64,))
OPTIONS = {
    "all": {},
    "window": {"window": 6},
    "long window": {"window": 20},
    "two kinds of heads": {"window": 6, "local_heads": 1},
    "segments": {"packed": True},
    "soft cap": {"softcap": 0.5},
    "dropout": {"dropout": 0.5},
    "all at once": {
        "window": 20,
        "local_heads": 3,
        "packed": True,
        "softcap": 0.5,
        "dropout": 0.3,
    },
    "neighbours with dropout": {"window": 4, "packed": True, "dropout": 0.3},
}


def segments():
    number = [np.searchsorted(ends, np.arange(T), side="right") + 1 for ends in ENDS]
    return jnp.asarray(np.stack(number), jnp.int32)


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((B, N, T, H), (B, K, T, H), (B, K, T, H), (B, N, T, H))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def both(case: dict, form: str, mesh: MeshConfig, *, balanced: bool = True):
    """Return (o, dq, dk, dv) of whole rows, and of rows that a mesh splits, in their own order."""
    keys = jax.vmap(jax.random.key)(jnp.arange(B))
    window, local = case.get("window", 0), case.get("local_heads", 0)
    *qkv, weigh = arrays()

    def run(order, *qkv):
        dropout = Dropout(case.get("dropout", 0.0), keys, order)
        options = AttentionOptions(0.7, case.get("softcap", 0.0), dropout)
        in_order = jnp.arange(T) if order is None else order
        seen = Visibility(
            order_T=order,
            segments_BT=segments()[:, in_order] if case.get("packed") else None,
            window=window,
            local_heads=local,
        )

        def loss(*qkv):
            split = [x[:, :, in_order] for x in qkv]
            if form:
                o = attend(*split, seen, options, context_form=form)
            else:
                o = plain_attention(*split, seen, options)
            o = jnp.zeros_like(o).at[:, :, in_order].set(o)
            return jnp.sum(o * weigh), o

        (_, o), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return (o, *grads)

    wanted_form, form = form, ""
    plain = jax.jit(lambda *qkv: run(None, *qkv))(*qkv)
    form = wanted_form
    with jax.set_mesh(make_mesh(mesh)):
        order = balanced_order(T) if balanced else None
        order = None if order is None else jnp.asarray(order)
        split = jax.jit(lambda *qkv: run(order, *qkv))(*qkv)
    return plain, split


@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize("name", OPTIONS)
def test_split_rows_give_the_same_attention_and_gradients(name, form):
    plain, split = both(OPTIONS[name], form, MeshConfig(data=1, context=4, model=2))
    for ours, theirs in zip(split, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "model"), [(1, 2), (2, 1)])
def test_splash_over_gathered_keys_gives_the_same_attention_and_gradients(kv_heads, model):
    length = 512
    rng = np.random.default_rng(0)
    shapes = ((1, 4, length, 64), (1, kv_heads, length, 64), (1, kv_heads, length, 64))
    qkv = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weigh = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    documents = jnp.asarray(np.searchsorted((100, 300), np.arange(length), side="right")[None])
    options = AttentionOptions(0.2)

    def run(kernel, order):
        in_order = jnp.arange(length) if order is None else order
        seen = Visibility(order_T=order, segments_BT=documents[:, in_order], window=200)

        def loss(*qkv):
            o = kernel(*(x[:, :, in_order] for x in qkv), seen, options)
            o = jnp.zeros_like(o).at[:, :, in_order].set(o)
            return jnp.sum(o * weigh), o

        (_, o), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return (o, *grads)

    whole = jax.jit(lambda: run(plain_attention, None))()
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2, model=model))):
        order = jnp.asarray(balanced_order(length))
        split = jax.jit(
            lambda: run(functools.partial(splash_over_gathered, interpret=True), order)
        )()
    for ours, theirs in zip(split, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_parts", "window"), [(1, 0), (1, 300), (4, 0), (4, 300)])
def test_splash_skips_the_blocks_that_it_would_with_its_own_masks(num_parts, window):
    """It looks at every number of them, and at the ends of a block alone of ours."""
    length = 2048
    square = (length, length)
    if num_parts == 1:
        own = splash.LocalMask(square, (window - 1, 0), 0) if window else splash.CausalMask(square)
    else:
        position = order_of_parts(length, num_parts)
        distance = position[:, None] - position[None]
        own = splash.NumpyMask((distance >= 0) & (distance < (window or length)))
    kernels = [
        splash.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=num_parts,
            block_sizes=splash_block_sizes(128),
        )
        for mask in (splash.MultiHeadMask([own]), splash_mask(length, num_parts, window))
    ]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, kernels))


def test_a_window_needs_neighbours_alone():
    """The ring sends to the next device for each other device; a window sends twice."""

    def sends(window):
        mesh = make_mesh(MeshConfig(data=1, context=8))
        with jax.set_mesh(mesh):
            order = jnp.asarray(balanced_order(T))

            def loss(q, k, v):
                seen = Visibility(order_T=order, window=window)
                return jnp.sum(attend(q, k, v, seen, AttentionOptions(1.0)))

            qkv = []
            for x in arrays()[:3]:
                sharding = activation_sharding(mesh, heads_axes("heads"), x.shape)
                qkv.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
            text = jax.jit(loss).lower(*qkv).compile().as_text()
        (one,) = (row for row in read_collectives(text, mesh) if "permute" in row.kind)
        return one.bytes_per_step

    of_position = 2 * B * K * H * 4  # key and value
    assert sends(0) == pytest.approx(7 * 8 * of_position, rel=0.1)
    # A stretch has four positions; the numbers of positions, which masks need, are sent as well.
    assert sends(3) == pytest.approx(2 * 2 * of_position, rel=0.1)


def test_bits_by_their_place_are_those_of_the_whole_array():
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    whole = jax.vmap(lambda key: jax.random.bits(key, (5, 7, 11), jnp.uint16))(keys)
    first, second, third = jnp.array([4, 0]), jnp.array([6, 2, 2]), jnp.array([10])
    places = ((first[:, None, None], 5), (second[:, None], 7), (third, 11))
    some = bits_at(jax.random.key_data(keys), places)
    np.testing.assert_array_equal(some, whole[:, first][:, :, second][:, :, :, third])


def test_places_beyond_32_bits_are_counted_right():
    """As of attention weights of long rows: head 3 of 4, 2^20 queries and keys."""
    length = 2**20
    places = ((jnp.array([3]), 4), (jnp.array([length - 1]), length), (jnp.array([5]), length))
    number = 3
    for index, size in ((length - 1, length), (5, length)):
        number = number * size + index
    key_words = jax.random.key_data(jax.random.key(1))
    high, low = np.uint32(number >> 32), np.uint32(number & 0xFFFFFFFF)
    hashed = threefry2x32_p.bind(*(jnp.asarray(x) for x in (*key_words, high, low)))
    assert bits_at(key_words[None], places)[0, 0] == (hashed[0] ^ hashed[1]).astype(jnp.uint16)


def test_rows_whose_columns_lie_in_their_order_are_gathered():
    plain, split = both(OPTIONS["segments"], "ring", MeshConfig(data=2, context=4), balanced=False)
    for ours, theirs in zip(split, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
