"""The KV cache of a layer: what it keeps of the tokens it has read, so that none is read twice.

A slot holds the key and the value of one position. A layer whose heads all look back no further
than a window keeps only that many slots and uses them in turn: position p lies in slot p % window,
where it replaces a position that no query can see any more.

    window 4, after positions 0 to 5:   slot      0  1  2  3
                                        position  4  5  2  3

Short convolutions look back too. Of their inputs the cache keeps the last `conv_taps - 1`.

Axes: B batch, T query positions, S slots, K kv heads, H head size, C inputs of a convolution,
D embed, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinylm.core.mesh import constrain


class LayerCache(NamedTuple):
    """What one layer remembers. Convolution inputs are None where the model has no convolutions.

    Where the batch or the kv heads number only one, that axis is missing from the keys and values
    stored here: XLA on CPU drops axes of size 1 in products, and would then hold each cache in two
    shapes and copy it from one to the other at every token (jax 0.10).
    """

    keys_BKSH: jax.Array
    values_BKSH: jax.Array
    attention_inputs_BCD: jax.Array | None = None
    mlp_inputs_BCD: jax.Array | None = None

    @property
    def num_slots(self) -> int:
        """The number of positions that the cache has room for."""
        return self.keys_BKSH.shape[-2]

    def append(
        self, k_BK1H: jax.Array, v_BK1H: jax.Array, slot: jax.Array
    ) -> tuple["LayerCache", jax.Array, jax.Array]:
        """Write one position into `slot`, modulo the number of slots.

        Returns:
          The new cache, and its (k_BKSH, v_BKSH) with all four axes, as attention reads them.
        """
        place = slot % self.num_slots
        keys = _write(self.keys_BKSH, k_BK1H, place)
        values = _write(self.values_BKSH, v_BK1H, place)
        batch_size, num_heads, _, head_dim = k_BK1H.shape
        whole_shape = (batch_size, num_heads, self.num_slots, head_dim)
        k_BKSH = keys.reshape(whole_shape)
        v_BKSH = values.reshape(whole_shape)
        cache = self._replace(keys_BKSH=keys, values_BKSH=values)
        return cache, k_BKSH, v_BKSH


def store_prompt(prompt: LayerCache, num_slots: int) -> LayerCache:
    """Return the cache of `num_slots` slots in which a layer goes on after a prompt.

    Args:
      prompt: keys and values of all T positions of the prompt, with all four axes.
      num_slots: the room for prompt and text, or the layer's window where that is smaller.
    """
    return prompt._replace(
        keys_BKSH=_store(prompt.keys_BKSH, num_slots),
        values_BKSH=_store(prompt.values_BKSH, num_slots),
    )


def _write(cached: jax.Array, new_BK1H: jax.Array, place: jax.Array) -> jax.Array:
    """Replace the slot `place` of keys or values, from which axes of size 1 may be missing."""
    *leading, _, head_dim = cached.shape
    new = new_BK1H.reshape(*leading, 1, head_dim)
    origin = [0 for _ in leading]
    return jax.lax.dynamic_update_slice(cached, new, (*origin, place, 0))


def _store(prompt_BKTH: jax.Array, num_slots: int) -> jax.Array:
    """Lay the last `num_slots` positions of a prompt into their slots."""
    num_positions = prompt_BKTH.shape[2]
    kept_BKSH = prompt_BKTH[:, :, -num_slots:]
    missing = num_slots - kept_BKSH.shape[2]
    no_padding = (0, 0)
    kept_BKSH = jnp.pad(kept_BKSH, (no_padding, no_padding, (0, missing), no_padding))
    if num_positions > num_slots:
        # The first kept position is num_positions - num_slots; its slot is that modulo num_slots.
        kept_BKSH = jnp.roll(kept_BKSH, num_positions, axis=2)
    kept_BKSH = constrain(kept_BKSH, "batch", "kv_heads", "positions", "head_dim")
    *leading, num_slots, head_dim = kept_BKSH.shape
    leading = [size for size in leading if size > 1]
    return kept_BKSH.reshape(*leading, num_slots, head_dim)
