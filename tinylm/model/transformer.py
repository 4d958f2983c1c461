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

from tinylm.core.mesh import constrain
from tinylm.model import layers
from tinylm.model.attention import Visibility, attend
from tinylm.model.config import ModelConfig

Cache = dict[str, jax.Array]  # "k" and "v", each [L, B, K, S, H]

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
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv_heads = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        project = functools.partial(layers.Linear, {"embed": c.embed_dim}, std=c.init_std, bias=c.qkv_bias, rngs=rngs)
        self.query = project(heads)
        self.key = project(kv_heads)
        self.value = project(kv_heads)
        self.out = layers.Linear(heads, {"embed": c.embed_dim}, std=_output_std(c), bias=c.bias, rngs=rngs)

    def __call__(self, x_BTD, visibility, tables, dropout, cache=None, write=None):
        """Return (o_BTD, new cache slice); with a cache, keys and values are written into it and read from it."""
        c = self.config
        q_BNTH, k_BKTH, v_BKTH = (project(x_BTD).swapaxes(1, 2) for project in (self.query, self.key, self.value))
        if c.qk_norm:
            q_BNTH, k_BKTH = layers.rms_normalize(q_BNTH), layers.rms_normalize(k_BKTH)
        if tables is not None:
            q_BNTH, k_BKTH = layers.rotate(q_BNTH, tables), layers.rotate(k_BKTH, tables)
        q_BNTH = constrain(q_BNTH, "batch", "heads", None, "head_dim")
        if cache is not None:
            cache = {"k": write(cache["k"], k_BKTH), "v": write(cache["v"], v_BKTH)}
            k_BKTH, v_BKTH = cache["k"].astype(q_BNTH.dtype), cache["v"].astype(q_BNTH.dtype)
        o_BNTH = attend(
            q_BNTH, k_BKTH, v_BKTH, visibility, scale=c.attention_scale, softcap=c.attention_softcap,
            dropout=dropout, kernel=c.attention,
        )  # fmt: skip
        return self.out(o_BNTH.swapaxes(1, 2)), cache


class Mlp(nnx.Module):
    """Two linear maps with an activation between, or three where the activation is gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the maps."""
        c = config
        embed, mlp = {"embed": c.embed_dim}, {"mlp": c.mlp_dim}
        self.activation = layers.ACTIVATIONS[c.mlp]
        self.up = layers.Linear(embed, mlp, std=c.init_std, bias=c.bias, rngs=rngs)
        gated = c.mlp in layers.GATED
        self.gate = layers.Linear(embed, mlp, std=c.init_std, bias=c.bias, rngs=rngs) if gated else None
        self.down = layers.Linear(mlp, embed, std=_output_std(c), bias=c.bias, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the mlp to each position."""
        up_BTF = self.up(x_BTD)
        h_BTF = self.activation(up_BTF) if self.gate is None else self.activation(self.gate(x_BTD)) * up_BTF
        return self.down(constrain(h_BTF, "batch", None, "mlp"))


class Block(nnx.Module):
    """One layer: norm, attention, norm, mlp, with residual connections (pre-norm)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the parts."""
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BTD, visibility, tables, dropout, cache=None, write=None):
        """Return (x_BTD, new cache slice)."""
        o_BTD, cache = self.attention(
            self.attention_norm(x_BTD), visibility, tables, dropout.at(0), cache=cache, write=write
        )
        o_BTD = self.scale * dropout.at(1)(o_BTD)
        middle_BTD = x_BTD + o_BTD
        h_BTD = self.scale * dropout.at(2)(self.mlp(self.mlp_norm(x_BTD if self.parallel else middle_BTD)))
        return constrain(middle_BTD + h_BTD, "batch", "seq", "embed"), cache


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

        def layer(block, x, window, index, _):
            visible = Visibility(segments_BT=segments_BT, window=window, local_heads=self.config.local_heads)
            return block(x, visible, tables, dropout.at(index))

        return self._scan(layer, x_BTD, None)[0]

    def decode(self, tokens_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run tokens at `positions_BT` (consecutive in a row) through the cache; return (x_BTD, new cache).

        Keys are written at their positions, so a row may be padded on the right: what is written beyond its end is
        overwritten before any query sees it.
        """
        off = layers.Dropout(0.0, None)
        tables = self._rotary(positions_BT)
        slots_1S = jnp.arange(cache["k"].shape[3])[None]

        def write(old_BKSH, new_BKTH):
            start_B = positions_BT[:, 0]
            put = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (0, start, 0)))
            return put(old_BKSH, new_BKTH.astype(old_BKSH.dtype), start_B)

        def layer(block, x, window, _, layer_cache):
            visible = Visibility(positions_BT, slots_1S, window=window, local_heads=self.config.local_heads)
            return block(x, visible, tables, off, cache=layer_cache, write=write)

        return self._scan(layer, self._embed(tokens_BT, positions_BT), cache)

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

    def init_cache(self, batch_size: int, num_slots: int) -> Cache:
        """Return an empty cache for `num_slots` positions, in the compute type."""
        c = self.config
        shape = (c.num_layers, batch_size, c.num_kv_heads, num_slots, c.head_dim)
        axes = (None, "batch", "kv_heads", None, "head_dim")
        return {name: constrain(jnp.zeros(shape, c.compute_dtype), *axes) for name in ("k", "v")}

    def _embed(self, tokens_BT, positions_BT):
        x_BTD = self.embedding[...][tokens_BT] * self.config.embed_scale
        if self.positions is not None:
            x_BTD = x_BTD + self.positions[...][positions_BT]
        return constrain(x_BTD.astype(self.config.compute_dtype), "batch", "seq", "embed")

    def _rotary(self, positions_BT):
        c = self.config
        if c.position != "rotary":
            return None
        return layers.rotary_tables(positions_BT, int(c.head_dim * c.rotary_fraction), c.rotary_base)

    def _scan(self, layer, x_BTD, cache):
        """Run `layer(block, x, window, index, cache slice)` over all layers, one period of windows an iteration."""
        c = self.config
        graph, stacked = nnx.split(self.blocks)
        period = len(c.attention_window)

        def group(tree):
            return jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), tree)

        def body(x, xs):
            index, params, caches = xs
            new = []
            for i, window in enumerate(c.attention_window):
                block = nnx.merge(graph, jax.tree.map(lambda p: p[i], params))
                x, slice_ = layer(block, x, window, index + i, jax.tree.map(lambda s: s[i], caches))
                new.append(slice_)
            return x, jax.tree.map(lambda *slices: jnp.stack(slices), *new)

        starts = jnp.arange(0, c.num_layers, period)
        x_BTD, new_cache = jax.lax.scan(
            _REMAT[c.remat](body),
            x_BTD,
            (starts, group(stacked), group(cache)),
            unroll=c.unroll or c.num_layers // period,
        )
        return self.norm(x_BTD), jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), new_cache)


def make_norm(config: ModelConfig) -> layers.Norm:
    """Return the norm that the config names."""
    return layers.Norm(config.embed_dim, kind=config.norm, epsilon=config.norm_epsilon, bias=config.bias)


def abstract_transformer(config: ModelConfig) -> tuple[nnx.GraphDef, dict, dict[str, tuple]]:
    """Return (graph, parameters, axes) without making an array.

    `nnx.merge(graph, parameters)` is a model again; parameters are a nested dict of shapes; `axes` gives the logical
    axes of each by its path ("blocks/mlp/up/kernel"). Stacked parameters of the blocks begin with `layers`.
    """
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
