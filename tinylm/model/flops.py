"""FLOPs of a model by formula: what its matrices and its attention must multiply.

A multiply-add counts 2, and the backward pass costs twice the forward pass (Kaplan et al. 2020,
section 2.1; PaLM, appendix B). Recomputation is not counted. Compilers' own counts see the body of
a scan once, so they are not used.
"""

import math

from tinylm.model.config import ModelConfig
from tinylm.model.layers import GATED


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOPs of forward and backward pass for one token of a row of `seq_len` tokens."""
    return 3 * forward_flops_per_token(config, seq_len)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return FLOPs of the forward pass for one token; causal attention counts the visible half."""
    c = config
    query_and_output = 2 * c.num_heads * c.head_dim
    key_and_value = 2 * c.num_kv_heads * c.head_dim
    mapped_features = query_and_output + key_and_value + _mean_mlp_features(c)
    maps = 2 * c.embed_dim * mapped_features
    # Each tap of a convolution, before attention and before the mlp, is a multiply-add a feature.
    convolutions = 2 * 2 * c.conv_taps * c.embed_dim
    attention = [_attention_flops(c, seq_len, window) for window in c.attention_window]
    mean_attention = sum(attention) / len(attention)
    layer = maps + convolutions + mean_attention
    output_map = 2 * c.embed_dim * c.vocab_size
    return c.num_layers * layer + output_map


def _mean_mlp_features(config: ModelConfig) -> float:
    """Return how many features a token's mlps map from and to, averaged over the layers.

    Of the experts those count that a token is sent to, and the logits of the router.
    """
    c = config
    maps = 3 if c.mlp in GATED else 2
    router_features = c.num_expert_layers * c.num_experts / c.num_layers
    return maps * mean_hidden_features(c) + router_features


def mean_hidden_features(config: ModelConfig) -> float:
    """Return how many hidden features the mlps of a token have, averaged over the layers."""
    c = config
    of_experts = (c.experts_per_token + c.shared_experts) * c.expert_dim
    dense_layers = c.num_layers - c.num_expert_layers
    total = c.num_expert_layers * of_experts + dense_layers * c.mlp_dim
    return total / c.num_layers


def _attention_flops(config: ModelConfig, seq_len: int, window: int) -> float:
    """Return FLOPs of the products with keys and with values, for one token and layer."""
    local_heads = config.local_heads or config.num_heads
    global_heads = config.num_heads - local_heads
    keys = local_heads * _visible_keys(seq_len, window) + global_heads * _visible_keys(seq_len, 0)
    return 2 * 2 * config.head_dim * keys


def _visible_keys(seq_len: int, window: int) -> float:
    """Return how many keys a query sees, averaged over a row."""
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def count_parameters(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> int:
    """Return the number of parameters, without the rows that pad the vocabulary.

    Args:
      shapes: the shape of each parameter by its path.
      config: the resolved model.
    """
    padding_rows = config.padded_vocab - config.vocab_size
    vocab_matrices = sum(1 for path in shapes if path in ("embedding", "head"))
    total = sum(math.prod(shape) for shape in shapes.values())
    return total - vocab_matrices * padding_rows * config.embed_dim


def count_active_parameters(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> int:
    """Return the number of parameters that a token meets: of the experts those that it is sent to.

    Args:
      shapes: the shape of each parameter by its path.
      config: the resolved model.
    """
    total = count_parameters(shapes, config)
    if not config.num_experts:
        return total
    passed_by = config.num_experts - config.experts_per_token
    for name in ("up", "gate", "down"):
        shape = shapes.get(f"blocks/mlp/{name}")
        if shape is not None:
            total -= math.prod(shape) // config.num_experts * passed_by
    return total
