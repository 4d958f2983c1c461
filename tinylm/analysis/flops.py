"""FLOPs of a model by formula: what its matrices and its attention must multiply, recomputation not counted.

A multiply-add counts 2; the backward pass costs twice the forward pass (Kaplan et al. 2020, section 2.1; PaLM, app. B).
Compilers' own counts see the body of a scan once, so they are not used.
"""

import math

from tinylm.model.config import ModelConfig


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOPs of forward and backward pass for one token of a row of `seq_len` tokens."""
    return 3 * forward_flops_per_token(config, seq_len)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOPs of the forward pass for one token; causal attention counts the visible half."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    mlp_maps = 3 if c.mlp in ("swiglu", "geglu") else 2
    block = 2 * c.embed_dim * (2 * heads + 2 * kv_heads + mlp_maps * c.mlp_dim)
    local = (c.local_heads or c.num_heads) * c.head_dim
    keys = [(_visible_keys(seq_len, window), _visible_keys(seq_len, 0)) for window in c.attention_window]
    attention = sum(4 * (local * near + (heads - local) * all_) for near, all_ in keys) / len(keys)
    return c.num_layers * (block + attention) + 2 * c.embed_dim * c.vocab_size


def _visible_keys(seq_len: int, window: int) -> float:
    """Return how many keys a query sees, averaged over a row."""
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def count_parameters(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> int:
    """Return the number of parameters by path and shape, without the rows that pad the vocabulary."""
    padding = config.padded_vocab - config.vocab_size
    vocab_maps = sum(1 for path in shapes if path in ("embedding", "head"))
    return sum(math.prod(shape) for shape in shapes.values()) - vocab_maps * padding * config.embed_dim
