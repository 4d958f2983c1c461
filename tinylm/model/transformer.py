"""The decoder-only transformer: embeddings, a scan over stacked blocks, a norm, logits.

All layers share one block whose parameters are stacked on a leading L axis and scanned, so that
compile time doesn't grow with depth. A pattern of attention windows makes the scan run over its
period. The vocabulary is padded to a multiple of 128 whatever the mesh, so that the state is the
same on every mesh; padded logits are masked.

Axes: B batch, T query positions, S key positions (slots of a cache), D embed, N query heads,
K kv heads, H head size, F mlp, V vocab, L layers, C inputs that a convolution remembers.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.core.collectives import look_up
from tinylm.core.expert_shards import EXCHANGED
from tinylm.core.log import say_once
from tinylm.core.mesh import constrain
from tinylm.core.text import path_text
from tinylm.model import layers
from tinylm.model.attention import attend, can_be_unrolled
from tinylm.model.cache import LayerCache, store_prompt
from tinylm.model.config import ModelConfig
from tinylm.model.experts import CHOICE, Experts, RouterSums, RouterTotals, totals
from tinylm.model.grouped import PRODUCT
from tinylm.model.kernels import AttentionOptions, heads_axes
from tinylm.model.mlp import Mlp
from tinylm.model.rotary import Rotary, rotary_angles, rotate
from tinylm.model.visibility import Visibility

Cache = list[LayerCache]  # one for each layer


def _is_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Say whether an operation is a product of matrices, or cuDNN's attention, which is several.

    JAX 0.10 to 0.12 knows the latter by this name. By another one it would be computed again.
    """
    is_matmul = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if is_matmul(primitive, *operands, **params):
        return True
    return primitive.name.startswith("dot_product_attention")


_CHOICES = jax.checkpoint_policies.save_only_these_names(CHOICE)
# Products by expert are loops or kernels of their own, and rows that came from other devices would
# have to be sent again.
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    _is_product, jax.checkpoint_policies.save_only_these_names(CHOICE, PRODUCT, EXCHANGED)
)

# What the backward pass finds stored, and what it computes again, by model.remat.
_REMAT: dict[str, Callable] = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(body, policy=_PRODUCTS),
    "full": lambda body: jax.checkpoint(body, policy=_CHOICES),
}


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a layer needs to know of the tokens that it reads, besides their features."""

    visibility: Visibility  # which keys a query sees
    rotary: Rotary | None = None  # None: the model has no rotary positions
    dropout: layers.Dropout = layers.NO_DROPOUT
    slot: jax.Array | None = None  # of the cache, for the one token that is read
    # How much each token counts in the sums of the routers; None: nobody asks for them.
    counted_BT: jax.Array | None = None

    def of_layer(self, layer: jax.Array | int, window: int) -> "LayerInputs":
        """Return these inputs for one layer: its window, its dropout."""
        visibility = dataclasses.replace(self.visibility, window=window)
        return dataclasses.replace(self, visibility=visibility, dropout=self.dropout.at(layer))


class Attention(nnx.Module):
    """Multi-head attention with rotary positions, query-key norm and grouped queries."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the four projections."""
        self.config = c = config
        embed = {"embed": c.embed_dim}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv_heads = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        qkv: dict[str, Any] = {
            "std": c.init_std,
            "bias": c.qkv_bias,
            "rngs": rngs,
        }
        self.conv = layers.ShortConv(c.embed_dim, c.conv_taps)
        self.query = layers.Linear(embed, heads, **qkv)
        self.key = layers.Linear(embed, kv_heads, **qkv)
        self.value = layers.Linear(embed, kv_heads, **qkv)
        norms: dict[str, Any] = {"scales": c.qk_norm_scale, "epsilon": c.norm_epsilon}
        self.query_norm = layers.HeadNorm(heads, **norms) if c.qk_norm else None
        self.key_norm = layers.HeadNorm(kv_heads, **norms) if c.qk_norm else None
        out_bias = c.bias and c.out_bias
        self.out = layers.Linear(heads, embed, std=c.output_std, bias=out_bias, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Let each position read from those that it sees.

        Args:
          x_BTD: normalized features.
          inputs: masks, positions and dropout of this layer.
          cache: what the layer remembers; then T is 1, and the token is written to it. Without
            one the positions read from each other.

        Returns:
          o_BTD, and the cache with these tokens in it.
        """
        c = self.config
        earlier_BCD = None if cache is None else cache.attention_inputs_BCD
        x_BTD, last_BCD = self.conv(x_BTD, inputs.visibility, earlier_BCD)
        q_BNTH = _heads_first(self.query(x_BTD), "heads")
        k_BKTH = _heads_first(self.key(x_BTD), "kv_heads")
        v_BKTH = _heads_first(self.value(x_BTD), "kv_heads")
        if self.query_norm is not None and self.key_norm is not None:
            q_BNTH = self.query_norm(q_BNTH)
            k_BKTH = self.key_norm(k_BKTH)
        if inputs.rotary is not None:
            q_BNTH = rotate(q_BNTH, inputs.rotary)
            k_BKTH = rotate(k_BKTH, inputs.rotary)
        if cache is None:
            # The positions themselves are what they read from.
            k_BKSH = k_BKTH
            v_BKSH = v_BKTH
            cache = LayerCache(k_BKSH, v_BKSH)
        else:
            assert inputs.slot is not None, "a token goes into a slot of the cache"
            cache, k_BKSH, v_BKSH = cache.append(k_BKTH, v_BKTH, inputs.slot)
        options = AttentionOptions(c.attention_scale, c.attention_softcap, inputs.dropout.at(0))
        o_BNTH = attend(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            inputs.visibility,
            options,
            kernel=c.attention,
            context_form=c.context_attention,
        )
        o_BTNH = constrain(o_BNTH, *heads_axes("heads")).swapaxes(1, 2)
        return self.out(o_BTNH), cache._replace(attention_inputs_BCD=last_BCD)


def _heads_first(x_BTNH: jax.Array, heads: str) -> jax.Array:
    """Return x_BNTH, split over the mesh by its heads: their matrices lie contiguous in memory."""
    return constrain(x_BTNH.swapaxes(1, 2), *heads_axes(heads))


class Block(nnx.Module):
    """One layer: norm, attention, add; norm, mlp, add (pre-norm)."""

    def __init__(self, config: ModelConfig, *, has_experts: bool, rngs: nnx.Rngs):
        """Build the parts, with experts in the place of the mlp or without."""
        self.parallel = config.parallel_residual
        self.scale = config.residual_scale
        self.attention_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = (Experts if has_experts else Mlp)(config, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Return (x_BTD, what the layer remembers of it); see `Attention` for the arguments.

        Between the products the positions of a text are split over all of the mesh but what splits
        the batch; for them, those over what splits heads are gathered (Korthikanti et al. 2022,
        section 4.2.2).
        """
        x_BTD, cache, _ = self.with_routing(x_BTD, inputs, cache)
        return x_BTD, cache

    def with_routing(
        self, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache, RouterSums | None]:
        """Return what `__call__` does, and the router's sums where there are any."""
        dropout = inputs.dropout
        earlier_BCD = None if cache is None else cache.mlp_inputs_BCD

        normed_BTD = _whole_rows(self.attention_norm(x_BTD))
        o_BTD, cache = self.attention(normed_BTD, inputs, cache)
        attended_BTD = x_BTD + self.scale * dropout.at(1)(_split_rows(o_BTD))

        mlp_input_BTD = x_BTD if self.parallel else attended_BTD
        normed_BTD = _whole_rows(self.mlp_norm(mlp_input_BTD))
        made = self.mlp(normed_BTD, inputs.visibility, earlier_BCD, inputs.counted_BT)
        y_BTD = attended_BTD + self.scale * dropout.at(2)(_split_rows(made.y_BTD))
        return y_BTD, cache._replace(mlp_inputs_BCD=made.last_BCD), made.routing


def _whole_rows(x_BTD: jax.Array) -> jax.Array:
    return constrain(x_BTD, "batch", "positions", "embed")


def _split_rows(x_BTD: jax.Array) -> jax.Array:
    return constrain(x_BTD, "batch", "seq", "embed")


class Transformer(nnx.Module):
    """A language model: tokens in, logits out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build from a resolved config."""
        self.config = c = config
        vocab, embed = c.padded_vocab, c.embed_dim
        self.embedding = layers.weight(rngs, (vocab, embed), ("vocab", "embed"), c.init_std)
        self.positions = (
            layers.weight(rngs, (c.context, embed), ("seq", "embed"), c.init_std)
            if c.position == "learned"
            else None
        )
        keys = jax.random.split(rngs.params(), c.num_layers)
        num_dense = c.dense_layers if c.num_experts else 0
        self.dense_blocks = _stacked_blocks(c, keys[:num_dense], False) if num_dense else None
        self.blocks = _stacked_blocks(c, keys[num_dense:], c.num_experts > 0)
        self.norm = make_norm(c)
        self.head = (
            None
            if c.tie_embeddings
            else layers.weight(rngs, (embed, vocab), ("embed", "vocab"), c.init_std)
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        row_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Return logits_BTV in float32 over the padded vocabulary.

        Args:
          tokens_BT: ids of tokens.
          segments_BT, positions_BT: come with packed rows. A token sees those of its own segment.
          row_keys_B: one random key a row; turns dropout on.
        """
        x_BTD = self.features(
            tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, row_keys_B=row_keys_B
        )
        return self.logits(x_BTD)

    def features(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        row_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Return what the output matrix reads, x_BTD; the arguments are those of `__call__`."""
        x_BTD, _ = self.features_and_routing(
            tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT, row_keys_B=row_keys_B
        )
        return x_BTD

    def features_and_routing(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        row_keys_B: jax.Array | None = None,
        order_T: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterTotals | None]:
        """Return what `features` does, and what the routers did with the tokens that count.

        Args:
          tokens_BT, segments_BT, positions_BT, row_keys_B: those of `__call__`.
          order_T: the position of each column, where columns lie as `core.ring.balanced_order` has
            them.
          counted_BT: how much each token counts there; None: nobody asks.
        """
        c = self.config
        dropout = layers.Dropout(c.dropout, row_keys_B, order_T)
        if positions_BT is None:
            in_row_T = jnp.arange(tokens_BT.shape[1]) if order_T is None else order_T
            positions_BT = in_row_T[None]
        visibility = Visibility(segments_BT=segments_BT, order_T=order_T)
        inputs = self.layer_inputs(positions_BT, visibility, dropout)
        inputs = dataclasses.replace(inputs, counted_BT=counted_BT)
        # The place after the last layer is that of the embedding.
        x_BTD = dropout.at(c.num_layers)(self.embed(tokens_BT, positions_BT))

        def without_cache(
            block: Block, x_BTD: jax.Array, inputs: LayerInputs
        ) -> tuple[jax.Array, RouterSums | None]:
            x_BTD, _, sums = block.with_routing(x_BTD, inputs)
            return x_BTD, sums

        x_BTD, results = self._scan(without_cache, x_BTD, inputs)
        sums = results[-1]
        return x_BTD, None if sums is None else totals(sums, c)

    def prefill(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, num_slots: int
    ) -> tuple[jax.Array, Cache]:
        """Read prompts, padded on the left up to position 0.

        Returns:
          x_BTD, and for each layer a cache of `num_slots` slots, fewer where all its heads have a
          window. Column t of the prompt lies in slot t.
        """
        c = self.config
        # Padding has positions below 0: it is a segment of its own, which no real token sees.
        real_BT = positions_BT >= 0
        inputs = self.layer_inputs(positions_BT, Visibility(segments_BT=real_BT))
        x_BTD = self.embed(tokens_BT, jnp.maximum(positions_BT, 0))
        x_BTD, results = self._scan(Block.__call__, x_BTD, inputs)
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
        cache = []
        for layer in range(c.num_layers):
            window = self.window_of_layer(layer)
            all_heads_local = window > 0 and not c.local_heads
            num_kept = min(window, num_slots) if all_heads_local else num_slots
            cache.append(store_prompt(jax.tree.map(lambda x: x[layer], stacked), num_kept))
        return x_BTD, cache

    def decode(
        self,
        token_B: jax.Array,
        position_B: jax.Array,
        slot: jax.Array,
        cache: Cache,
        blocks: list[Block],
    ) -> tuple[jax.Array, Cache]:
        """Run one token a row through all layers.

        Args:
          token_B, position_B: the token, and its position in its text.
          slot: where in the cache it goes, the same for all rows.
          cache: what the layers remember, from `prefill` or the call before.
          blocks: those of `unstacked_blocks`, so that each layer's cache is written in place.

        Returns:
          x_BD, and the new cache.
        """
        position_B1 = position_B[:, None]
        x_B1D = self.embed(token_B[:, None], position_B1)
        inputs = self.layer_inputs(position_B1, Visibility(position_B1), slot=slot)
        new_cache = []
        for layer, (block, layer_cache) in enumerate(zip(blocks, cache, strict=True)):
            # Slots are used in turn, so the age of what a slot holds, in tokens, follows from the
            # slot being written. Ages that reach below position 0 belong to slots never written.
            num_slots = layer_cache.num_slots
            age_S = (slot - jnp.arange(num_slots)) % num_slots
            visibility = dataclasses.replace(
                inputs.visibility, key_positions_BS=position_B1 - age_S
            )
            layer_inputs = dataclasses.replace(inputs, visibility=visibility)
            layer_inputs = layer_inputs.of_layer(layer, self.window_of_layer(layer))
            x_B1D, layer_cache = block(x_B1D, layer_inputs, layer_cache)
            new_cache.append(layer_cache)
        return self.norm(x_B1D)[:, 0], new_cache

    @property
    def output_matrix(self) -> jax.Array:
        """The matrix that makes logits, of the axes `output_axes`."""
        return self.embedding[...] if self.head is None else self.head[...]

    @property
    def output_axes(self) -> tuple[str, str]:
        """The logical axes of the output matrix."""
        return ("vocab", "embed") if self.head is None else ("embed", "vocab")

    def logits(self, x_BTD: jax.Array, matrix: jax.Array | None = None) -> jax.Array:
        """Return float32 logits_BTV; those of padded ids are far below all others.

        Args:
          x_BTD: what `features` returned.
          matrix: stands for the output matrix; None: it is the model's own.
        """
        c = self.config
        equation = "BTD,VD->BTV" if self.head is None else "BTD,DV->BTV"
        if matrix is None:
            matrix = self.output_matrix
        logits_BTV = jnp.einsum(
            equation, x_BTD, matrix.astype(x_BTD.dtype), preferred_element_type=jnp.float32
        )
        logits_BTV = constrain(logits_BTV, "batch", "positions", "vocab")
        if c.logit_softcap:
            logits_BTV = c.logit_softcap * jnp.tanh(logits_BTV / c.logit_softcap)
        return jnp.where(jnp.arange(c.padded_vocab) < c.vocab_size, logits_BTV, layers.MASKED_LOGIT)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Return what the first block reads: x_BTD of tokens at positions."""
        dtype = self.config.compute_dtype
        x_BTD = look_up(self.embedding[...], tokens_BT, dtype) * self.config.embed_scale
        if self.positions is not None:
            x_BTD = x_BTD + self.positions[...][positions_BT]
        return _split_rows(x_BTD.astype(dtype))

    def layer_inputs(
        self,
        positions_BT: jax.Array,
        visibility: Visibility,
        dropout: layers.Dropout = layers.NO_DROPOUT,
        slot: jax.Array | None = None,
    ) -> LayerInputs:
        """Return what all layers need to know of tokens at positions; see
        `LayerInputs.of_layer`.
        """
        c = self.config
        rotary = rotary_angles(positions_BT, c) if c.position == "rotary" else None
        visibility = dataclasses.replace(visibility, local_heads=c.local_heads)
        return LayerInputs(visibility, rotary, dropout, slot)

    def window_of_layer(self, layer: int) -> int:
        """Return how far back a layer looks, in tokens (0: to the start)."""
        windows = self.config.attention_window
        return windows[layer % len(windows)]

    def unstacked_blocks(self) -> list[Block]:
        """Return the blocks one by one.

        To be called before a loop over tokens, not in it, because it copies their parameters.
        """
        blocks = []
        for stack, layers_of_stack in self._stacks():
            graph, stacked = nnx.split(stack)
            for place in range(len(layers_of_stack)):
                params = jax.tree.map(operator.itemgetter(place), stacked)
                blocks.append(nnx.merge(graph, params))
        return blocks

    def _stacks(self) -> list[tuple[Block, range]]:
        """Return the blocks of each kind, stacked, and the numbers of their layers."""
        c = self.config
        if self.dense_blocks is None:
            return [(self.blocks, range(c.num_layers))]
        return [
            (self.dense_blocks, range(c.dense_layers)),
            (self.blocks, range(c.dense_layers, c.num_layers)),
        ]

    def _scan(
        self,
        run_layer: Callable[[Block, jax.Array, LayerInputs], tuple[jax.Array, Any]],
        x_BTD: jax.Array,
        inputs: LayerInputs,
    ) -> tuple[jax.Array, list]:
        """Run all layers and the last norm; return (x_BTD, the second results of each kind of
        layers, stacked on L).
        """
        results = []
        for stack, layers_of_stack in self._stacks():
            x_BTD, of_stack = self._scan_stack(stack, layers_of_stack, run_layer, x_BTD, inputs)
            results.append(of_stack)
        return self.norm(x_BTD), results

    def _scan_stack(
        self,
        stack: Block,
        layers_of_stack: range,
        run_layer: Callable[[Block, jax.Array, LayerInputs], tuple[jax.Array, Any]],
        x_BTD: jax.Array,
        inputs: LayerInputs,
    ) -> tuple[jax.Array, Any]:
        """Run the layers of one kind; return (x_BTD, the second results stacked on L).

        One iteration runs one period of the pattern of windows, in which the window of each layer
        is a constant of the program:

            attention_window (0, 256), 6 layers:   3 iterations of [all tokens, 256 tokens]
        """
        c = self.config
        graph, stacked = nnx.split(stack)
        period = len(c.attention_window)
        grouped = jax.tree.map(lambda p: p.reshape(-1, period, *p.shape[1:]), stacked)

        def run_period(x_BTD: jax.Array, xs: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            first_layer, params = xs
            results = []
            for i, window in enumerate(c.attention_window):
                block = nnx.merge(graph, jax.tree.map(operator.itemgetter(i), params))
                x_BTD, result = run_layer(block, x_BTD, inputs.of_layer(first_layer + i, window))
                results.append(result)
            return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

        first_layers = jnp.arange(layers_of_stack.start, layers_of_stack.stop, period)
        num_iterations = len(layers_of_stack) // period
        unroll = c.unroll or num_iterations
        if unroll > 1 and not can_be_unrolled(c.attention):
            say_once(
                f"model.unroll={c.unroll} counts as 1: on this mesh the compiler fails on fused "
                "attention in unrolled layers."
            )
            unroll = 1
        x_BTD, results = jax.lax.scan(
            _REMAT[c.remat](run_period),
            x_BTD,
            (first_layers, grouped),
            unroll=unroll,
        )
        results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
        return x_BTD, results


def _stacked_blocks(config: ModelConfig, keys: jax.Array, has_experts: bool) -> Block:
    """Return a block for each key, their parameters stacked on L."""

    def make(key: jax.Array) -> Block:
        return Block(config, has_experts=has_experts, rngs=nnx.Rngs(params=key))

    return nnx.vmap(make)(keys)


def make_norm(config: ModelConfig) -> layers.Norm:
    """Return the norm that the config names."""
    return layers.Norm(
        config.embed_dim, kind=config.norm, epsilon=config.norm_epsilon, bias=config.bias
    )


def abstract_transformer(config: ModelConfig) -> tuple[nnx.GraphDef, dict, dict[str, tuple]]:
    """Describe the model without making an array.

    Returns:
      graph: `nnx.merge(graph, parameters)` is a model again.
      parameters: a nested dict of shapes.
      axes: the logical axes of each parameter by its path ("blocks/mlp/up/kernel"). Those of the
        stacked blocks begin with `layers`.
    """
    assert config.is_resolved, (
        f"sizes of the model are still open; use what resolve() returned, not {config}"
    )
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(model, nnx.Param)
    axes = {}
    for path, param in nnx.to_flat_state(state):
        name = path_text(path)
        num_axes = len(param.get_value().shape)
        is_stacked = num_axes > len(param.axes)
        axes[name] = ("layers", *param.axes) if is_stacked else param.axes
    parameters = nnx.to_pure_dict(state)
    return graph, parameters, axes


def init_parameters(config: ModelConfig, seed: jax.Array | int) -> dict:
    """Return freshly drawn parameters as a nested dict, the same for a seed on any mesh.

    Made to be jitted, with the shardings of the parameters.
    """
    model = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
