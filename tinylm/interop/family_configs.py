"""The config.json of each family as model settings, and back.

A model of ours fits a family where going there and back changes none of its settings (`misfits`), so there is no
second list of what a family can express. What a config.json asks for and no setting of ours expresses is refused, by
key and value; files of old and new versions of `transformers` are read.
"""

from typing import Any

from tinylm.core.errors import UserError
from tinylm.model.config import ModelConfig

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu2": "relu2"}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def _need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"config.json of {config.get('model_type')} lacks {key}.")
    return config[key]


def _only(config: dict[str, Any], **supported: Any) -> None:
    """Raise UserError where a key that is there has another value than the one we can follow."""
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json has {key}={config[key]!r}; tinylm reads {config['model_type']} with {value!r}."
            )


def _activation(config: dict[str, Any], key: str, default: str, known: dict[str, str]) -> str:
    name = config.get(key, default)
    if name not in known:
        raise UserError(f"config.json has {key}={name!r}; tinylm reads {config['model_type']} with {', '.join(known)}.")
    return known[name]


def _named(known: dict[str, str], ours: str) -> str:
    """Return their name of an activation; one that the family doesn't have reads back as another."""
    return next((theirs for theirs, mlp in known.items() if mlp == ours), next(iter(known)))


def _rope(config: dict[str, Any], fraction: float) -> tuple[float, float]:
    """Return (base, rotating fraction) as old and new config files write them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json scales rotary positions (rope_type={kind!r}); tinylm reads plain ones.")
    base = rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10_000.0)))
    old = config.get("rotary_pct", config.get("partial_rotary_factor", fraction))
    return float(base), float(rope.get("partial_rotary_factor", old))


def read_gpt2(c: dict[str, Any]) -> ModelConfig:
    """Return the model settings of a GPT-2 config.json."""
    _only(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return ModelConfig(
        vocab_size=_need(c, "vocab_size"), context=_need(c, "n_positions"), embed_dim=_need(c, "n_embd"),
        num_layers=_need(c, "n_layer"), num_heads=_need(c, "n_head"), mlp_dim=c.get("n_inner") or 0,
        position="learned", norm="layernorm", norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(c, "activation_function", "gelu_new", _ACTIVATIONS), bias=True, qkv_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_gpt2(m: ModelConfig) -> dict[str, Any]:
    """Return what a GPT-2 config.json says of a model."""
    return {
        "vocab_size": m.vocab_size, "n_positions": m.context, "n_embd": m.embed_dim, "n_layer": m.num_layers,
        "n_head": m.num_heads, "n_inner": m.mlp_dim, "layer_norm_epsilon": m.norm_epsilon,
        "activation_function": _named(_ACTIVATIONS, m.mlp), "tie_word_embeddings": m.tie_embeddings,
        "embd_pdrop": m.dropout, "attn_pdrop": m.dropout, "resid_pdrop": m.dropout,
    }  # fmt: skip


def read_gpt_neo(c: dict[str, Any]) -> ModelConfig:
    """Return the model settings of a GPT-Neo config.json."""
    kinds = c.get("attention_layers") or [
        kind for kinds, count in _need(c, "attention_types") for kind in kinds * count
    ]
    if set(kinds) - {"global", "local"}:
        raise UserError(f"config.json has attention layers {sorted(set(kinds))}; tinylm reads global and local ones.")
    windows = [c.get("window_size", 256) if kind == "local" else 0 for kind in kinds]
    return ModelConfig(
        vocab_size=_need(c, "vocab_size"), context=_need(c, "max_position_embeddings"),
        embed_dim=_need(c, "hidden_size"), num_layers=_need(c, "num_layers"), num_heads=_need(c, "num_heads"),
        mlp_dim=c.get("intermediate_size") or 0, position="learned", norm="layernorm",
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(c, "activation_function", "gelu_new", _ACTIVATIONS), bias=True, attention_scale=1.0,
        attention_window=_period(windows), tie_embeddings=c.get("tie_word_embeddings", True),
    )  # fmt: skip


def write_gpt_neo(m: ModelConfig) -> dict[str, Any]:
    """Return what a GPT-Neo config.json says of a model."""
    windows = m.attention_window * (m.num_layers // len(m.attention_window))
    kinds = ["local" if window else "global" for window in windows]
    return {
        "vocab_size": m.vocab_size, "max_position_embeddings": m.context, "hidden_size": m.embed_dim,
        "num_layers": m.num_layers, "num_heads": m.num_heads, "intermediate_size": m.mlp_dim,
        "layer_norm_epsilon": m.norm_epsilon, "activation_function": _named(_ACTIVATIONS, m.mlp),
        "attention_types": [[[kind], 1] for kind in kinds], "attention_layers": kinds,
        "window_size": max(windows) or 256, "tie_word_embeddings": m.tie_embeddings,
        "embed_dropout": m.dropout, "attention_dropout": m.dropout, "resid_dropout": m.dropout,
    }  # fmt: skip


def _period(windows: list[int]) -> tuple[int, ...]:
    """Return the shortest pattern that, repeated, gives the window of each layer."""
    lengths = [n for n in range(1, len(windows) + 1) if len(windows) % n == 0]
    return next(tuple(windows[:n]) for n in lengths if windows[:n] * (len(windows) // n) == windows)


def read_gpt_neox(c: dict[str, Any]) -> ModelConfig:
    """Return the model settings of a GPT-NeoX config.json."""
    base, fraction = _rope(c, 0.25)
    _only(c, attention_bias=True)
    return ModelConfig(
        vocab_size=_need(c, "vocab_size"), context=_need(c, "max_position_embeddings"),
        embed_dim=_need(c, "hidden_size"), num_layers=_need(c, "num_hidden_layers"),
        num_heads=_need(c, "num_attention_heads"), mlp_dim=_need(c, "intermediate_size"), position="rotary",
        rotary_fraction=fraction, rotary_base=base, norm="layernorm", norm_epsilon=c.get("layer_norm_eps", 1e-5),
        mlp=_activation(c, "hidden_act", "gelu", _ACTIVATIONS), bias=True, qkv_bias=True,
        parallel_residual=c.get("use_parallel_residual", True), tie_embeddings=c.get("tie_word_embeddings", False),
    )  # fmt: skip


def write_gpt_neox(m: ModelConfig) -> dict[str, Any]:
    """Return what a GPT-NeoX config.json says of a model."""
    return {
        "vocab_size": m.vocab_size, "max_position_embeddings": m.context, "hidden_size": m.embed_dim,
        "num_hidden_layers": m.num_layers, "num_attention_heads": m.num_heads, "intermediate_size": m.mlp_dim,
        "rotary_pct": m.rotary_fraction, "rotary_emb_base": m.rotary_base, "layer_norm_eps": m.norm_epsilon,
        "hidden_act": _named(_ACTIVATIONS, m.mlp), "use_parallel_residual": m.parallel_residual,
        "attention_bias": True, "tie_word_embeddings": m.tie_embeddings, "attention_dropout": m.dropout,
        "hidden_dropout": m.dropout,
    }  # fmt: skip


def read_llama(c: dict[str, Any]) -> ModelConfig:
    """Return the model settings of a Llama config.json."""
    base, fraction = _rope(c, 1.0)
    bias = c.get("attention_bias", False)
    _only(c, mlp_bias=bias, partial_rotary_factor=1.0)
    return ModelConfig(
        vocab_size=_need(c, "vocab_size"), context=_need(c, "max_position_embeddings"),
        embed_dim=_need(c, "hidden_size"), num_layers=_need(c, "num_hidden_layers"),
        num_heads=_need(c, "num_attention_heads"), num_kv_heads=c.get("num_key_value_heads") or 0,
        head_dim=c.get("head_dim") or 0, mlp_dim=_need(c, "intermediate_size"), position="rotary",
        rotary_fraction=fraction, rotary_base=base, norm="rmsnorm", norm_epsilon=c.get("rms_norm_eps", 1e-6),
        mlp=_activation(c, "hidden_act", "silu", _GATED), bias=bias, qkv_bias=bias,
        tie_embeddings=c.get("tie_word_embeddings", False),
    )  # fmt: skip


def write_llama(m: ModelConfig) -> dict[str, Any]:
    """Return what a Llama config.json says of a model."""
    return {
        "vocab_size": m.vocab_size, "max_position_embeddings": m.context, "hidden_size": m.embed_dim,
        "num_hidden_layers": m.num_layers, "num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim, "intermediate_size": m.mlp_dim, "rope_theta": m.rotary_base,
        "rms_norm_eps": m.norm_epsilon, "hidden_act": _named(_GATED, m.mlp), "attention_bias": m.bias,
        "mlp_bias": m.bias, "tie_word_embeddings": m.tie_embeddings, "attention_dropout": m.dropout,
    }  # fmt: skip
