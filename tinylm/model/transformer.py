"""The decoder-only transformer: embeddings, a scan over stacked blocks, a norm, logits.

Axes: B batch, T query positions, S key positions, D embed, N query heads, K kv heads, G query heads per kv head,
H head size, F mlp, V vocab, L layers.

All layers share one block whose parameters are stacked on a leading L axis and scanned, so that compile time doesn't
grow with depth. A pattern of attention windows makes the scan run over its period. The vocabulary is padded to a
multiple of 128 whatever the mesh, so that the state is the same on every mesh; padded logits are masked.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.core.mesh import constrain, look_up
from tinylm.model import layers
from tinylm.model.attention import Visibility, attend
from tinylm.model.config import ModelConfig

Cache = list[tuple[jax.Array, ...]]  # keys, values and convolutions' last inputs of each layer (see `prefill`)

_REMAT: dict[str, Callable] = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class Attention(nnx.Module):
    """Multi-head attention with rotary positions, query-key norm and grouped queries as configured."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the four projections."""
        c = config
        self.config = c
        self.conv = layers.ShortConv(c.embed_dim, c.conv_taps)
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv_heads = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        project = functools.partial(layers.Linear, {"embed": c.embed_dim}, std=c.init_std, bias=c.qkv_bias, rngs=rngs)
        self.query = project(heads)
        self.key = project(kv_heads)
        self.value = project(kv_heads)
        bias = c.bias and c.out_bias
        self.out = layers.Linear(heads, {"embed": c.embed_dim}, std=_output_std(c), bias=bias, rngs=rngs)

    def __call__(self, x_BTD, visibility, tables, dropout, write=None, earlier=()):
        """Return (o_BTD, (keys, values, what the convolution keeps)).

        Keys and values are those of `x_BTD`, or what `write` makes of them.
        """
        c = self.config
        x_BTD, last = self.conv(x_BTD, visibility.segments_BT, *earlier)
        q_BNTH, k_BKTH, v_BKTH = (
            constrain(project(x_BTD).swapaxes(1, 2), "batch", heads, None, "head_dim")
            for project, heads in ((self.query, "heads"), (self.key, "kv_heads"), (self.value, "kv_heads"))
        )
        if c.qk_norm:
            q_BNTH, k_BKTH = layers.rms_normalize(q_BNTH), layers.rms_normalize(k_BKTH)
        if tables is not None:
            q_BNTH, k_BKTH = layers.rotate(q_BNTH, tables), layers.rotate(k_BKTH, tables)
        if write is not None:
            k_BKTH, v_BKTH = write(k_BKTH, v_BKTH)
        o_BNTH = attend(
            q_BNTH, k_BKTH, v_BKTH, visibility, scale=c.attention_scale, softcap=c.attention_softcap,
            dropout=dropout, kernel=c.attention,
        )  # fmt: skip
        o_BTNH = constrain(o_BNTH, "batch", "heads", None, "head_dim").swapaxes(1, 2)
        return self.out(o_BTNH), (k_BKTH, v_BKTH, *last)


class Mlp(nnx.Module):
    """Two linear maps with an activation between, or three where the activation is gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the maps."""
        c = config
        bias = c.bias and c.mlp_bias
        embed, mlp = {"embed": c.embed_dim}, {"mlp": c.mlp_dim}
        self.conv = layers.ShortConv(c.embed_dim, c.conv_taps)
        self.activation = layers.ACTIVATIONS[c.mlp]
        self.up = layers.Linear(embed, mlp, std=c.init_std, bias=bias, rngs=rngs)
        gated = c.mlp in layers.GATED
        self.gate = layers.Linear(embed, mlp, std=c.init_std, bias=bias, rngs=rngs) if gated else None
        self.down = layers.Linear(mlp, embed, std=_output_std(c), bias=bias, rngs=rngs)

    def __call__(self, x_BTD, segments_BT=None, earlier=()) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Apply the mlp to each position; return (y_BTD, what the convolution keeps)."""
        x_BTD, last = self.conv(x_BTD, segments_BT, *earlier)
        up_BTF = self.up(x_BTD)
        h_BTF = self.activation(up_BTF) if self.gate is None else self.activation(self.gate(x_BTD)) * up_BTF
        return self.down(constrain(h_BTF, "batch", None, "mlp")), last


class Block(nnx.Module):
    """One layer: norm, attention, norm, mlp, with residual connections (pre-norm)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the parts."""
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BTD, visibility, tables, dropout, write=None, earlier=()):
        """Return (x_BTD, (keys, values as attention does, what the two convolutions keep: `earlier` of the next call)).

        Positions are whole for products, split between them (Korthikanti et al. 2022, section 4.2.2).
        """
        whole, split = (lambda x, seq=seq: constrain(x, "batch", seq, "embed") for seq in (None, "seq"))
        normed_BTD = whole(self.attention_norm(x_BTD))
        o_BTD, kept = self.attention(normed_BTD, visibility, tables, dropout.at(0), write, earlier[:1])
        o_BTD = self.scale * dropout.at(1)(split(o_BTD))
        middle_BTD = x_BTD + o_BTD
        normed_BTD = whole(self.mlp_norm(x_BTD if self.parallel else middle_BTD))
        h_BTD, last = self.mlp(normed_BTD, visibility.segments_BT, earlier[1:])
        return middle_BTD + self.scale * dropout.at(2)(split(h_BTD)), (*kept, *last)


class Transformer(nnx.Module):
    """A language model: tokens in, logits out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build from a resolved config."""
        c = config
        self.config = c
        vocab, embed = c.padded_vocab, c.embed_dim
        self.embedding = layers.weight(rngs, (vocab, embed), ("vocab", "embed"), c.init_std)
        learned = c.position == "learned"
        self.positions = layers.weight(rngs, (c.context, embed), ("seq", "embed"), c.init_std) if learned else None
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.blocks = nnx.vmap(lambda key: Block(c, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = make_norm(c)
        self.head = None if c.tie_embeddings else layers.weight(rngs, (embed, vocab), ("embed", "vocab"), c.init_std)

    def __call__(self, tokens_BT, *, segments_BT=None, positions_BT=None, row_keys_B=None) -> jax.Array:
        """Return logits_BTV in float32 over the padded vocabulary.

        `segments_BT` and `positions_BT` come with packed rows; `row_keys_B` (one random key a row) turns dropout on.
        """
        x_BTD = self.features(tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, row_keys_B=row_keys_B)
        return self.logits(x_BTD)

    def features(self, tokens_BT, *, segments_BT=None, positions_BT=None, row_keys_B=None) -> jax.Array:
        """Return what the output matrix reads, x_BTD."""
        dropout = layers.Dropout(self.config.dropout, row_keys_B)
        positions = jnp.arange(tokens_BT.shape[1])[None] if positions_BT is None else positions_BT
        x_BTD = dropout.at(self.config.num_layers)(self._embed(tokens_BT, positions))
        tables = self._rotary(positions)

        def layer(block, x, window, index):
            visible = Visibility(segments_BT=segments_BT, window=window, local_heads=self.config.local_heads)
            return block(x, visible, tables, dropout.at(index))[0], None

        return self._scan(layer, x_BTD)[0]

    def prefill(self, tokens_BT, positions_BT, num_slots: int) -> tuple[jax.Array, Cache]:
        """Read prompts, padded on the left up to position 0; return (x_BTD, cache of `num_slots` positions).

        Column t is slot t of the cache. A layer whose heads all have a window keeps no more slots than that, and
        writes slot s over slot s - window. Axes of size 1 are dropped: XLA drops them in products, and
        would then keep, and copy, each cache in two shapes.
        """
        c = self.config
        tables, real_BT = self._rotary(positions_BT), positions_BT >= 0
        x_BTD = self._embed(tokens_BT, jnp.maximum(positions_BT, 0))

        def layer(block, x, window, _):
            visible = Visibility(segments_BT=real_BT, window=window, local_heads=c.local_heads)
            return block(x, visible, tables, layers.Dropout(0.0, None))

        def keep(x_BKTH, window):
            size = min(window, num_slots) if window and not c.local_heads else num_slots
            kept = x_BKTH[:, :, -size:]
            kept = jnp.pad(kept, ((0, 0), (0, 0), (0, size - kept.shape[2]), (0, 0)))
            kept = jnp.roll(kept, x_BKTH.shape[2], axis=2) if x_BKTH.shape[2] > size else kept
            kept = constrain(kept, "batch", "kv_heads", None, "head_dim")
            return kept.reshape(*[n for n in kept.shape[:2] if n > 1], *kept.shape[2:])

        x_BTD, (k_LBKTH, v_LBKTH, *last) = self._scan(layer, x_BTD)
        windows = c.attention_window * (c.num_layers // len(c.attention_window))
        return x_BTD, [
            (keep(k_LBKTH[i], window), keep(v_LBKTH[i], window), *(x[i] for x in last))
            for i, window in enumerate(windows)
        ]

    def unstacked_blocks(self) -> list[Block]:
        """Return the blocks one by one; to be called before a loop over tokens, for it copies their parameters."""
        graph, stacked = nnx.split(self.blocks)
        return [nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked)) for i in range(self.config.num_layers)]

    def decode(self, token_B, position_B, slot, cache: Cache, blocks: list[Block]) -> tuple[jax.Array, Cache]:
        """Run one token a row, at `position_B` of its text and `slot` of the cache; return (x_BD, new cache).

        The blocks are those of `unstacked_blocks`, so that each layer's cache is written in place.
        """
        c, before, cache = self.config, cache, []
        tables = self._rotary(position_B[:, None])
        x_B1D = self._embed(token_B[:, None], position_B[:, None])
        for i, (block, old) in enumerate(zip(blocks, before, strict=True)):
            size, window = old[0].shape[-2], c.attention_window[i % len(c.attention_window)]
            age_S = (slot - jnp.arange(size)) % size  # steps since a slot was written; positions below 0 never were
            visible = Visibility(position_B[:, None], position_B[:, None] - age_S, window=window,
                                 local_heads=c.local_heads)  # fmt: skip

            def write(*new, old=old[:2], at=slot % size):
                at = (*[0] * (old[0].ndim - 2), at, 0)
                cache.append(tuple(
                    jax.lax.dynamic_update_slice(x, x1.reshape(*x.shape[:-2], 1, -1), at)
                    for x, x1 in zip(old, new, strict=True)
                ))  # fmt: skip
                return (x.reshape(*new[0].shape[:2], *x.shape[-2:]) for x in cache[-1])

            x_B1D, (_, _, *last) = block(x_B1D, visible, tables, layers.Dropout(0.0, None), write, old[2:])
            cache[-1] += tuple(last)
        return self.norm(x_B1D)[:, 0], cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits_BTV; those of padded ids are far below all others."""
        c = self.config
        exact = {"preferred_element_type": jnp.float32}
        if self.head is None:
            logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.embedding[...].astype(x_BTD.dtype), **exact)
        else:
            logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, self.head[...].astype(x_BTD.dtype), **exact)
        logits_BTV = constrain(logits_BTV, "batch", None, "vocab")
        if c.logit_softcap:
            logits_BTV = c.logit_softcap * jnp.tanh(logits_BTV / c.logit_softcap)
        return jnp.where(jnp.arange(c.padded_vocab) < c.vocab_size, logits_BTV, -1e30)

    def _embed(self, tokens_BT, positions_BT):
        dtype = self.config.compute_dtype
        x_BTD = look_up(self.embedding[...], tokens_BT, dtype) * self.config.embed_scale
        if self.positions is not None:
            x_BTD = x_BTD + self.positions[...][positions_BT]
        return constrain(x_BTD.astype(dtype), "batch", "seq", "embed")

    def _rotary(self, positions_BT):
        c = self.config
        if c.position != "rotary":
            return None
        return layers.rotary_tables(positions_BT, int(c.head_dim * c.rotary_fraction), c.rotary_base)

    def _scan(self, layer, x_BTD):
        """Run `layer(block, x, window, index) -> (x, kept)` over all layers, one period of windows an iteration."""
        c = self.config
        graph, stacked = nnx.split(self.blocks)
        period = len(c.attention_window)
        grouped = jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), stacked)

        def body(x, xs):
            index, params = xs
            kept = []
            for i, window in enumerate(c.attention_window):
                block = nnx.merge(graph, jax.tree.map(lambda p: p[i], params))
                x, keep = layer(block, x, window, index + i)
                kept.append(keep)
            return x, jax.tree.map(lambda *parts: jnp.stack(parts), *kept)

        starts = jnp.arange(0, c.num_layers, period)
        unroll = c.unroll or c.num_layers // period
        x_BTD, kept = jax.lax.scan(_REMAT[c.remat](body), x_BTD, (starts, grouped), unroll=unroll)
        return self.norm(x_BTD), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)


def make_norm(config: ModelConfig) -> layers.Norm:
    """Return the norm that the config names."""
    return layers.Norm(config.embed_dim, kind=config.norm, epsilon=config.norm_epsilon, bias=config.bias)


def abstract_transformer(config: ModelConfig) -> tuple[nnx.GraphDef, dict, dict[str, tuple]]:
    """Return (graph, parameters, axes) without making an array.

    `nnx.merge(graph, parameters)` is a model again; parameters are a nested dict of shapes; `axes` gives the logical
    axes of each by its path ("blocks/mlp/up/kernel"). Stacked parameters of the blocks begin with `layers`.
    """
    assert config.is_resolved, f"sizes of the model are still open; use what resolve() returned, not {config}"
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(model, nnx.Param)
    axes = {
        "/".join(map(str, path)): ("layers",) * (len(param.get_value().shape) - len(param.axes)) + param.axes
        for path, param in nnx.to_flat_state(state)
    }
    return graph, nnx.to_pure_dict(state), axes


def init_parameters(config: ModelConfig, seed: jax.Array | int) -> dict:
    """Return freshly drawn parameters as a nested dict, the same for a seed on any mesh; made to be jitted."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param))


def _output_std(config: ModelConfig) -> float:
    """Smaller weights where a block writes to the residual stream (Radford et al. 2019, section 2.3)."""
    return config.init_std / (2 * config.num_layers) ** 0.5
