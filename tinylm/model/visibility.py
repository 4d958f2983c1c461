"""Who may look at whom: which keys each query of attention sees.

Masks are described, not made, until a kernel needs them: most kernels never make the whole square.

Axes: B batch, T query positions, S key positions, N query heads.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Visibility:
    """A query sees the keys that are not after it, within the window, and of its own segment.

    No query sees a key at a position below 0.
    """

    # Positions in the text, for queries and for keys. None: 0, 1, 2, ...
    query_positions_BT: jax.Array | None = None
    key_positions_BS: jax.Array | None = None
    # The position of each column in its row, where columns lie as `core.ring.balanced_order` has
    # them. None: it is the number of the column.
    order_T: jax.Array | None = None
    # The document of each position of a packed row. None: all positions are of one.
    segments_BT: jax.Array | None = None
    # How many keys a query sees, counted from itself backwards (0: all).
    window: int = 0
    # How many heads have that window; the others see all (0: all heads have it).
    local_heads: int = 0

    def allowed(self, queries: slice, keys: slice, num_heads: int) -> jax.Array:
        """Return the mask of some queries and keys, as booleans that broadcast to [B, N, T, S]."""
        query_B1T1 = _positions(self.query_positions_BT, queries)[:, None, :, None]
        key_B11S = _positions(self.key_positions_BS, keys)[:, None, None, :]
        distance_B1TS = query_B1T1 - key_B11S
        allowed_BNTS = (distance_B1TS >= 0) & (key_B11S >= 0)
        if self.window:
            near_BNTS = distance_B1TS < self.window
            if self.local_heads:
                is_global_N = jnp.arange(num_heads) >= self.local_heads
                near_BNTS = near_BNTS | is_global_N[:, None, None]
            allowed_BNTS = allowed_BNTS & near_BNTS
        if self.segments_BT is not None:
            query_segments_B1T1 = self.segments_BT[:, queries][:, None, :, None]
            key_segments_B11S = self.segments_BT[:, keys][:, None, None, :]
            is_same_B1TS = query_segments_B1T1 == key_segments_B11S
            allowed_BNTS = allowed_BNTS & is_same_B1TS
        return allowed_BNTS


# All earlier positions of a row that lies in its order.
EVERYTHING = Visibility()


def _positions(positions: jax.Array | None, part: slice) -> jax.Array:
    """Return the positions of a part of the queries or keys; given ones are not cut."""
    return jnp.arange(part.start, part.stop)[None] if positions is None else positions
