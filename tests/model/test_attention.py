"""Every kernel equals attention written out, forward and gradient: windows, segments, grouped
queries, soft cap.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.model.attention import attend
from tinylm.model.kernels import AttentionOptions, splash_attention
from tinylm.model.visibility import Visibility

B, N, T, H = 2, 4, 128, 8
CASES = {
    "causal": {},
    "window": {"window": 70},
    "grouped": {"kv_heads": 2},
    "one_kv_head": {"kv_heads": 1},
    "segments": {"segments": True},
    "all": {"window": 100, "kv_heads": 2, "segments": True, "softcap": 2.0},
}


def arrays(kv_heads=N, window=0, segments=False, softcap=0.0):
    """Return (q, k, v, output weights), visibility and soft cap of a case."""
    rng = np.random.default_rng(0)
    qkvo = [rng.normal(size=(B, n, T, H)).astype(np.float32) for n in (N, kv_heads, kv_heads, N)]
    ids = np.sort(rng.integers(0, 5, (B, T)), axis=1).astype(np.int32) if segments else None
    return qkvo, Visibility(segments_BT=ids, window=window), softcap


def written_out(q, k, v, visible, softcap):
    """Softmax over the keys that a query may see, head by head."""
    rows = []
    for b in range(B):
        for n in range(N):
            kv = n * k.shape[1] // N
            score = q[b, n] @ k[b, kv].T * 0.3
            score = softcap * jnp.tanh(score / softcap) if softcap else score
            distance = np.arange(T)[:, None] - np.arange(T)
            seen = (distance >= 0) & (distance < (visible.window or T))
            if visible.segments_BT is not None:
                seen &= visible.segments_BT[b][:, None] == visible.segments_BT[b]
            rows.append(jax.nn.softmax(jnp.where(seen, score, -jnp.inf)) @ v[b, kv])
    return jnp.stack(rows).reshape(B, N, T, H)


def splash_anywhere(q, k, v, visible, softcap):
    return splash_attention(q, k, v, visible, AttentionOptions(0.3, softcap), interpret=True)


def kernel(name):
    def attend_by_name(q, k, v, visible, softcap):
        return attend(q, k, v, visible, AttentionOptions(0.3, softcap), kernel=name)

    return attend_by_name


def outcome(function, qkvo, visible, softcap):
    """Return the output and its gradients with respect to q, k, v."""

    def weighed(q, k, v):
        out = function(q, k, v, visible, softcap)
        return (out * qkvo[3]).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(
        *qkvo[:3]
    )
    return [out, *grads]


KERNELS = {"xla": kernel("xla"), "splash": splash_anywhere}


@pytest.mark.parametrize(
    ("name", "case"), [*(("xla", case) for case in CASES), ("splash", "all"), ("splash", "causal")]
)
def test_kernels_equal_attention_written_out(name, case):
    qkvo, visible, softcap = arrays(**CASES[case])
    for ours, theirs in zip(
        outcome(KERNELS[name], qkvo, visible, softcap),
        outcome(written_out, qkvo, visible, softcap),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("case", ["causal", "window", "grouped", "segments"])
def test_cudnn_equals_attention_written_out(case):
    qkvo, visible, softcap = arrays(**CASES[case])
    half = [x.astype(jnp.bfloat16) for x in qkvo]
    for ours, theirs in zip(
        outcome(kernel("cudnn"), half, visible, softcap),
        outcome(written_out, qkvo, visible, softcap),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.1)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_splash_on_a_mesh_equals_attention_written_out(kv_heads):
    """One kv head doesn't divide by the two devices that split the query heads."""
    qkvo, visible, softcap = arrays(kv_heads=kv_heads, window=70, segments=True)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, model=2))):
        spread = jax.jit(lambda q, k, v: splash_anywhere(q, k, v, visible, softcap))(*qkvo[:3])
    np.testing.assert_allclose(spread, written_out(*qkvo[:3], visible, softcap), atol=2e-5)


@pytest.mark.parametrize(("name", "chip"), [("cudnn", "GPU"), ("splash", "TPU")])
def test_a_kernel_of_other_hardware_is_refused(name, chip):
    qkvo, visible, _ = arrays()
    with pytest.raises(UserError, match=f"model.attention={name} needs a {chip}"):
        attend(*qkvo[:3], visible, AttentionOptions(1.0), kernel=name)
