"""The mlp of a block.

Axes: B batch, T positions, D embed, F mlp, C inputs that a convolution remembers.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

from tinylm.core.mesh import constrain
from tinylm.model import layers
from tinylm.model.config import ModelConfig
from tinylm.model.visibility import EVERYTHING, Visibility


class MlpResult(NamedTuple):
    """What the second half of a block makes of its input."""

    y_BTD: jax.Array
    last_BCD: jax.Array | None  # the last inputs of the convolution
    routing: Any = None  # the router's sums, where there is a router and they are asked for


class Mlp(nnx.Module):
    """Two linear maps with an activation between, or three with a gate (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the maps."""
        c = config
        embed = {"embed": c.embed_dim}
        mlp = {"mlp": c.mlp_dim}
        inner: dict[str, Any] = {
            "std": c.init_std,
            "bias": c.bias and c.mlp_bias,
            "rngs": rngs,
        }
        self.conv = layers.ShortConv(c.embed_dim, c.conv_taps)
        self.kind = c.mlp
        self.up = layers.Linear(embed, mlp, **inner)
        self.gate = layers.Linear(embed, mlp, **inner) if c.mlp in layers.GATED else None
        outer: dict[str, Any] = {**inner, "std": c.output_std}
        self.down = layers.Linear(mlp, embed, **outer)

    def __call__(
        self,
        x_BTD: jax.Array,
        visibility: Visibility = EVERYTHING,
        earlier_BCD: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> MlpResult:
        """Apply the mlp to each position.

        Args:
          x_BTD: normalized features.
          visibility, earlier_BCD: see `layers.ShortConv`.
          counted_BT: means something to experts alone.
        """
        del counted_BT
        x_BTD, last_BCD = self.conv(x_BTD, visibility, earlier_BCD)
        up_BTF = self.up(x_BTD)
        if self.gate is None:
            h_BTF = layers.activate(self.kind, up_BTF)
        else:
            h_BTF = layers.activate(self.kind, self.gate(x_BTD)) * up_BTF
        return MlpResult(self.down(constrain(h_BTF, "batch", "positions", "mlp")), last_BCD)
