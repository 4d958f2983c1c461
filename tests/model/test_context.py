"""Attention over rows that the mesh splits by position equals attention over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.ring import balanced_order
from tinylm.model.attention import attend
from tinylm.model.kernels import AttentionOptions, plain_attention
from tinylm.model.layers import Dropout
from tinylm.model.visibility import Visibility

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
