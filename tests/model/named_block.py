"""One block of the transformer with every operation written over named axes: what
docs/named_axes.md explains.

No axis has a place here, only a name: an operation names the axes that it works on (`untag`), and
is carried over all others. Slow and plain on purpose; the tests hold it equal to the production
block. The arrays are penzai's (github.com/google-deepmind/penzai).
"""

import jax
import jax.numpy as jnp
from penzai import pz

Named = pz.nx.NamedArray


def name(array: jax.Array, *axes: str) -> Named:
    """Return an array whose axes are called `axes`."""
    return pz.nx.wrap(array).tag(*axes)


def contract(x: Named, weight: Named, *axes: str) -> Named:
    """Sum over `axes` of x times weight; the axes of both are those of the result."""
    times = pz.nx.nmap(lambda a, b: jnp.tensordot(a, b, axes=len(axes)))
    return times(x.untag(*axes), weight.untag(*axes))


def along(function, x: Named, axis: str) -> Named:
    """Apply a function of a vector along `axis`."""
    return pz.nx.nmap(function)(x.untag(axis)).tag(axis)


def linear(x: Named, weights: dict[str, Named], *axes: str) -> Named:
    """Map `axes` of x to the kernel's other axes, and add the bias where there is one."""
    y = contract(x, weights["kernel"], *axes)
    return y + weights["bias"] if "bias" in weights else y


def norm(x: Named, weights: dict[str, Named], config) -> Named:
    """LayerNorm or RMSNorm over `embed`."""

    def normalize(vector):
        centered = vector - vector.mean() if config.norm == "layernorm" else vector
        return centered / jnp.sqrt(jnp.mean(centered**2) + config.norm_epsilon)

    y = along(normalize, x, "embed") * weights["scale"]
    return y + weights["bias"] if "bias" in weights else y


def rotate(x: Named, position: Named, config) -> Named:
    """Turn pairs of features of each head by angles that grow with the position."""

    def turn(head, at):
        size = int(len(head) * config.rotary_fraction)
        angle = at * config.rotary_base ** -(jnp.arange(0, size, 2) / size)
        pairs = head[: size // 2] + 1j * head[size // 2 : size]
        turned = pairs * jnp.exp(1j * angle)
        return jnp.concatenate([turned.real, turned.imag, head[size:]])

    return pz.nx.nmap(turn)(x.untag("head_dim"), position).tag("head_dim")


def attention(x: Named, weights: dict, config, window: int) -> Named:
    """Each token looks at those before it: `seq` asks, `keys` answers."""
    query, key, value = (linear(x, weights[part], "embed") for part in ("query", "key", "value"))
    position = pz.nx.arange("seq", x.named_shape["seq"])
    if config.position == "rotary":
        query, key = rotate(query, position, config), rotate(key, position, config)
    split = pz.nx.nmap(lambda heads: heads.reshape(config.num_kv_heads, -1))
    query = split(query.untag("heads")).tag("kv_heads", "group")
    key, value = (part.untag("seq").tag("keys") for part in (key, value))
    score = contract(query * config.attention_scale, key, "head_dim")
    distance = position - position.untag("seq").tag("keys")
    seen = (distance >= 0) & (distance < (window or config.context))
    score = pz.nx.nmap(jnp.where)(seen, score, -jnp.inf)
    share = along(jax.nn.softmax, score, "keys")
    mixed = contract(share, value, "keys")
    mixed = pz.nx.nmap(jnp.ravel)(mixed.untag("kv_heads", "group")).tag("heads")
    return linear(mixed, weights["out"], "heads", "head_dim")


def mlp(x: Named, weights: dict, config) -> Named:
    """Each token thinks by itself."""
    activation = {"gelu": jax.nn.gelu, "swiglu": jax.nn.silu}[config.mlp]
    up = linear(x, weights["up"], "embed")
    if "gate" in weights:
        hidden = pz.nx.nmap(activation)(linear(x, weights["gate"], "embed")) * up
    else:
        hidden = pz.nx.nmap(activation)(up)
    return linear(hidden, weights["down"], "mlp")


def block(x: Named, weights: dict, config, window: int = 0) -> Named:
    """Attention, then the mlp, each added to what came in."""
    middle = x + attention(
        norm(x, weights["attention_norm"], config), weights["attention"], config, window
    )
    return middle + mlp(norm(middle, weights["mlp_norm"], config), weights["mlp"], config)
