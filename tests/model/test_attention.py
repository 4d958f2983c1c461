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
from tinylm.model.kernels import (
    AttentionOptions,
    cudnn_attention,
    segment_features,
    splash_attention,
)
from tinylm.model.visibility import Visibility

B, N, T, H = 2, 4, 128, 8
CASES = {
    "causal": {},
    "window": {"window": 70},
    "grouped": {"kv_heads": 2},
    "one_kv_head": {"kv_heads": 1},
    "segments": {"segments": True},
    "window in segments": {"window": 20, "kv_heads": 2, "segments": True},
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


def cudnn_anywhere(q, k, v, visible, softcap):
    """What the cuDNN kernel is given, computed by XLA."""
    return cudnn_attention(q, k, v, visible, AttentionOptions(0.3, softcap), implementation="xla")


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


KERNELS = {"xla": kernel("xla"), "splash": splash_anywhere, "cudnn": cudnn_anywhere}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("xla", case) for case in CASES),
        ("splash", "all"),
        ("splash", "causal"),
        ("cudnn", "segments"),
        ("cudnn", "window in segments"),
    ],
)
def test_kernels_equal_attention_written_out(name, case):
    qkvo, visible, softcap = arrays(**CASES[case])
    # For cuDNN, which takes no float32, segments are features that may be half a last place off.
    atol = 2e-4 if name == "cudnn" else 2e-5
    for ours, theirs in zip(
        outcome(KERNELS[name], qkvo, visible, softcap),
        outcome(written_out, qkvo, visible, softcap),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("case", ["causal", "window", "grouped", "segments", "window in segments"])
def test_cudnn_equals_attention_written_out(case):
    qkvo, visible, softcap = arrays(**CASES[case])
    half = [x.astype(jnp.bfloat16) for x in qkvo]
    for ours, theirs in zip(
        outcome(kernel("cudnn"), half, visible, softcap),
        outcome(written_out, qkvo, visible, softcap),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.1)


@pytest.mark.parametrize("scale", [0.125, 0.3, 1.0])
def test_features_of_segments_are_exact_in_bfloat16(scale):
    """Whatever the runs are called, and however many they are: 0 within a text, -128 or less
    between two.
    """
    names = np.repeat(np.arange(1, 701), 2)[None]
    names[:, -100:] = 0  # as behind the last piece of a row
    features = segment_features(jnp.asarray(names), scale)
    q, k = (np.asarray(x.astype(jnp.bfloat16), np.float32)[0] for x in features)
    bias = scale * (q @ k.T)
    same = names[0][:, None] == names[0]
    causal = np.tri(names.shape[1], dtype=bool)
    assert np.all(bias[same] == 0)
    assert np.all(bias[causal & ~same] <= -128)


def test_packed_rows_have_no_mask_for_cudnn(monkeypatch):
    """No array of [T, T] but what the kernel makes for itself, which is taken out here."""
    given = []

    def recorded(q, k, v, **options):
        given.append(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    qkvo, visible, _ = arrays(segments=True)
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkvo[:3]]

    def attention(*qkv):
        return cudnn_attention(*qkv, visible, AttentionOptions(0.3))

    program = str(jax.make_jaxpr(attention)(*half))
    assert given[0]["mask"] is None
    assert given[0]["is_causal"]
    assert f"{T},{T}" not in program


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
