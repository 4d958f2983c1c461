"""The config.json of each family as model settings, and back.

A model of ours fits a family where going there and back changes none of its settings (`misfits`),
so there is no second list of what a family can express. What a config.json asks for and no setting
of ours expresses is refused, by the family's own name for it; files of old and new versions of
`transformers` are read as transformers reads them: the same place of a key wins where it is there
twice, and the same default holds where it is missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.core.errors import UserError
from tinylm.model.config import ModelConfig

Names = Mapping[str, str]
JsonObject = dict[str, Any]

_MOST = 2**31 - 1  # of any size

# Each family's own name of a setting of ours.
GPT2_NAMES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "embed_dim": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "mlp_dim": "n_inner",
    "norm_epsilon": "layer_norm_epsilon",
    "mlp": "activation_function",
    "tie_embeddings": "tie_word_embeddings",
}
GPT_NEO_NAMES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "layer_norm_epsilon",
    "mlp": "activation_function",
    "tie_embeddings": "tie_word_embeddings",
    "attention_window": "window_size",
}
GPT_NEOX_NAMES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "mlp": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "rotary_base": "rotary_emb_base",
    "rotary_fraction": "rotary_pct",
    "parallel_residual": "use_parallel_residual",
}
LLAMA_NAMES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "mlp": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "attention_window": "sliding_window",
}
_SIZES = (
    "vocab_size",
    "context",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
)
# Names that transformers takes for those of GPT-2 and GPT-Neo (its `attribute_map`).
_ALSO = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}

_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu2": "relu2",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}

# What stands in the way of families that are near to those we read.
RELATIVES = {
    "bloom": "alibi positions",
    "falcon": "fused multi_query attention",
    "gemma": "norms that multiply by 1 + weight",
    "gemma2": "norms that multiply by 1 + weight",
    "gemma3_text": "norms that multiply by 1 + weight",
    "gptj": "one norm for attention and mlp, and rotary_dim",
    "granite": "logits_scaling",
    "mixtral": "num_local_experts",
    "olmo2": "q_norm and k_norm, and norms behind attention and mlp",
    "opt": "activation_function='relu'",
    "phi": "one norm for attention and mlp",
    "phi3": "qkv_proj and gate_up_proj, which are fused",
    "qwen2_moe": "num_experts",
    "qwen3": "q_norm and k_norm",
    "smollm3": "no_rope_layers",
}


def _family(config: JsonObject) -> str:
    return str(config.get("model_type"))


def first_of(config: JsonObject, key: str) -> Any:
    """Return the value of a key, or of the other name that transformers knows it by."""
    value = config.get(key)
    return config.get(_ALSO.get(key, key)) if value is None else value


def _whole(config: JsonObject, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise UserError(
            f"config.json has {key}={value!r}; {_family(config)} needs a whole number from 1 to "
            f"{_MOST}."
        )
    return value


def _sizes(config: JsonObject, names: Names, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return our sizes as a config.json has them; those of `optional` that it lacks are 0, which
    follow from others.
    """
    sizes: dict[str, Any] = {}
    for ours in _SIZES:
        if ours not in names:
            continue
        value = first_of(config, names[ours])
        if value is None and ours in optional:
            sizes[ours] = 0
        elif value is None:
            raise UserError(f"config.json of {_family(config)} lacks {names[ours]}.")
        else:
            sizes[ours] = _whole(config, names[ours], value)
    return sizes


def _flag(config: JsonObject, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise UserError(f"config.json has {key}={value!r}; {_family(config)} needs true or false.")
    return value


def _number(config: JsonObject, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(
            f"config.json has {key}={value!r}; {_family(config)} needs a number above 0."
        )
    return float(value)


def _only(config: JsonObject, **supported: Any) -> None:
    """Raise UserError where a key that is there has another value than the one we can follow."""
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json has {key}={config[key]!r}; tinylm reads {_family(config)} with "
                f"{value!r}."
            )


def _activation(config: JsonObject, key: str, default: str, known: dict[str, str]) -> str:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"config.json has {key}={name!r}; tinylm reads {_family(config)} with "
            f"{', '.join(known)}."
        )
    return known[name]


def _named(known: dict[str, str], ours: str) -> str:
    """Return their name of an activation; one that the family doesn't have reads back as
    another.
    """
    return next((theirs for theirs, mlp in known.items() if mlp == ours), next(iter(known)))


def _plain_rope(config: JsonObject) -> JsonObject:
    """Return the nested rotary settings of a config.json, empty in old ones; raise UserError where
    they scale.

    A `rope_scaling` that says anything wins over `rope_parameters` (transformers 5,
    `convert_rope_params_to_dict`).
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"config.json has {key}={rope!r:.60}, which is no object.")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(
                f"config.json has {key} for each kind of layer; tinylm reads one for all."
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(
                f"config.json has {key} with rope_type={kind!r}; tinylm reads rotary positions "
                "unscaled."
            )
        return rope
    return {}


def _neox_rope(config: JsonObject) -> tuple[float, float]:
    """Return (base, rotating fraction) of GPT-NeoX, which has old names of its own for both."""
    rope = _plain_rope(config)
    base = rope.get("rope_theta", config.get("rotary_emb_base", 10_000.0))
    fraction = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return _number(config, "rope_theta", base), _number(config, "partial_rotary_factor", fraction)


def _llama_rope(config: JsonObject) -> float:
    """Return the base of Llama and its kin: they rotate whole heads, whatever
    `partial_rotary_factor` says.
    """
    base = _plain_rope(config).get("rope_theta", config.get("rope_theta", 10_000.0))
    return _number(config, "rope_theta", base)


def read_gpt2(c: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-2 config.json."""
    _only(
        c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    return ModelConfig(
        **_sizes(c, GPT2_NAMES, optional=("mlp_dim",)),
        position="learned",
        norm="layernorm",
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(c, "activation_function", "gelu_new", _ACTIVATIONS),
        bias=True,
        qkv_bias=True,
        tie_embeddings=_flag(c, "tie_word_embeddings", True),
    )


def write_gpt2(m: ModelConfig) -> JsonObject:
    """Return what a GPT-2 config.json says of a model."""
    return {
        **_their_sizes(m, GPT2_NAMES),
        "layer_norm_epsilon": m.norm_epsilon,
        "activation_function": _named(_ACTIVATIONS, m.mlp),
        "tie_word_embeddings": m.tie_embeddings,
        "embd_pdrop": m.dropout,
        "attn_pdrop": m.dropout,
        "resid_pdrop": m.dropout,
    }


def _their_sizes(m: ModelConfig, names: Names) -> dict[str, int]:
    return {names[ours]: getattr(m, ours) for ours in _SIZES if ours in names}


def read_gpt_neo(c: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-Neo config.json."""
    sizes = _sizes(c, GPT_NEO_NAMES, optional=("mlp_dim",))
    num_layers = sizes["num_layers"]
    kinds = c.get("attention_layers")
    if kinds is None:
        kinds = _expanded(c, num_layers)
    windows = _windows(
        {"window_size": 256, **c},
        "attention_layers",
        kinds,
        known=("global", "local"),
        num_layers=num_layers,
        size_key="window_size",
    )
    return ModelConfig(
        **sizes,
        position="learned",
        norm="layernorm",
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(c, "activation_function", "gelu_new", _ACTIVATIONS),
        bias=True,
        attention_scale=1.0,
        attention_window=windows,
        tie_embeddings=_flag(c, "tie_word_embeddings", True),
    )


def _expanded(config: JsonObject, num_layers: int) -> list[Any]:
    """Return the kind of each layer that `attention_types` names, as [kinds, how often] pairs.

    Their sum is compared with the number of layers first: a short text can ask for any number of
    them.
    """
    pairs = config.get("attention_types", [[["global", "local"], 12]])
    try:
        count = sum(len(kinds) * _whole(config, "attention_types", times) for kinds, times in pairs)
    except (TypeError, ValueError) as error:
        raise UserError(
            "config.json has attention_types that are no list of [kinds, how often]."
        ) from error
    if count != num_layers:
        raise UserError(
            f"config.json has attention_types of {count} layers and num_layers={num_layers}."
        )
    return [kind for kinds, times in pairs for kind in list(kinds) * times]


def _windows(
    config: JsonObject,
    key: str,
    kinds: Any,
    *,
    known: tuple[str, str],
    num_layers: int,
    size_key: str,
) -> tuple[int, ...]:
    """Return our pattern of windows from the kind of each layer: `known` are that without and that
    with a window.
    """
    if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
        raise UserError(
            f"config.json has {key}={kinds!r:.80}; tinylm reads lists of {' and '.join(known)}."
        )
    if len(kinds) != num_layers:
        raise UserError(f"config.json has {key} of {len(kinds)} layers; there are {num_layers}.")
    if known[1] not in kinds:
        return (0,)
    size = _whole(config, size_key, config.get(size_key))
    return _period([size if kind == known[1] else 0 for kind in kinds])


def write_gpt_neo(m: ModelConfig) -> JsonObject:
    """Return what a GPT-Neo config.json says of a model."""
    windows = _each_layer(m)
    kinds = ["local" if window else "global" for window in windows]
    return {
        **_their_sizes(m, GPT_NEO_NAMES),
        "layer_norm_epsilon": m.norm_epsilon,
        "activation_function": _named(_ACTIVATIONS, m.mlp),
        "attention_types": [[[kind], 1] for kind in kinds],
        "attention_layers": kinds,
        "window_size": max(windows) or 256,
        "tie_word_embeddings": m.tie_embeddings,
        "embed_dropout": m.dropout,
        "attention_dropout": m.dropout,
        "resid_dropout": m.dropout,
    }


def _each_layer(m: ModelConfig) -> tuple[int, ...]:
    """Return the window of each layer."""
    return m.attention_window * (m.num_layers // len(m.attention_window))


def _period(windows: list[int]) -> tuple[int, ...]:
    """Return the shortest pattern that, repeated, gives the window of each layer."""
    lengths = [n for n in range(1, len(windows) + 1) if len(windows) % n == 0]
    return next(tuple(windows[:n]) for n in lengths if windows[:n] * (len(windows) // n) == windows)


def read_gpt_neox(c: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-NeoX config.json."""
    base, fraction = _neox_rope(c)
    attention_bias = _flag(c, "attention_bias", True)
    return ModelConfig(
        **_sizes(c, GPT_NEOX_NAMES),
        position="rotary",
        rotary_fraction=fraction,
        rotary_base=base,
        norm="layernorm",
        norm_epsilon=c.get("layer_norm_eps", 1e-5),
        mlp=_activation(c, "hidden_act", "gelu", _ACTIVATIONS),
        bias=True,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        parallel_residual=_flag(c, "use_parallel_residual", True),
        tie_embeddings=_flag(c, "tie_word_embeddings", False),
    )


def write_gpt_neox(m: ModelConfig) -> JsonObject:
    """Return what a GPT-NeoX config.json says of a model, by names that old versions know too."""
    return {
        **_their_sizes(m, GPT_NEOX_NAMES),
        "rotary_pct": m.rotary_fraction,
        "rotary_emb_base": m.rotary_base,
        "layer_norm_eps": m.norm_epsilon,
        "hidden_act": _named(_ACTIVATIONS, m.mlp),
        "use_parallel_residual": m.parallel_residual,
        "attention_bias": m.qkv_bias,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_dropout": m.dropout,
        "hidden_dropout": m.dropout,
    }


def _llama_settings(c: JsonObject, **more: Any) -> dict[str, Any]:
    """Return the settings that Llama, Mistral and Qwen2 share."""
    return {
        **_sizes(c, LLAMA_NAMES, optional=("num_kv_heads", "head_dim")),
        "position": "rotary",
        "rotary_base": _llama_rope(c),
        "norm": "rmsnorm",
        "norm_epsilon": c.get("rms_norm_eps", 1e-6),
        "mlp": _activation(c, "hidden_act", "silu", _GATED),
        "tie_embeddings": _flag(c, "tie_word_embeddings", False),
        **more,
    }


def _write_llama_settings(m: ModelConfig) -> JsonObject:
    return {
        **_their_sizes(m, LLAMA_NAMES),
        "rope_theta": m.rotary_base,
        "rms_norm_eps": m.norm_epsilon,
        "hidden_act": _named(_GATED, m.mlp),
        "tie_word_embeddings": m.tie_embeddings,
        "attention_dropout": m.dropout,
    }


def read_llama(c: JsonObject) -> ModelConfig:
    """Return the model settings of a Llama config.json."""
    attention_bias, mlp_bias = _flag(c, "attention_bias", False), _flag(c, "mlp_bias", False)
    settings = _llama_settings(c, bias=attention_bias or mlp_bias, qkv_bias=attention_bias)
    if settings["bias"]:
        settings |= {"out_bias": attention_bias, "mlp_bias": mlp_bias}
    return ModelConfig(**settings)


def write_llama(m: ModelConfig) -> JsonObject:
    """Return what a Llama config.json says of a model."""
    return {
        **_write_llama_settings(m),
        "attention_bias": m.qkv_bias,
        "mlp_bias": m.bias and m.mlp_bias,
    }


def read_mistral(c: JsonObject) -> ModelConfig:
    """Return the model settings of a Mistral config.json: Llama's with one window for all layers,
    or none.
    """
    window = c.get("sliding_window", 4096)
    size = 0 if window is None else _whole(c, "sliding_window", window)
    # Transformers' default, unlike Llama's, is a number.
    c = {"num_key_value_heads": 8, **c}
    return ModelConfig(**_llama_settings(c, attention_window=(size,)))


def write_mistral(m: ModelConfig) -> JsonObject:
    """Return what a Mistral config.json says of a model."""
    return {**_write_llama_settings(m), "sliding_window": max(m.attention_window) or None}


def read_qwen2(c: JsonObject) -> ModelConfig:
    """Return the model settings of a Qwen2 config.json: Llama's with biases of queries, keys and
    values alone.

    Layers have a window where `layer_types` says so; without it, from layer `max_window_layers` on.
    """
    # Transformers' defaults, which differ from Llama's, and the window that counts only where it is
    # switched on.
    c = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, **c}
    if not _flag(c, "use_sliding_window", False):
        c["sliding_window"] = None
    settings = _llama_settings(c, qkv_bias=True)
    num_layers = settings["num_layers"]
    kinds = c.get("layer_types")
    if kinds is None:
        first = num_layers if c["sliding_window"] is None else c["max_window_layers"]
        if type(first) is not int:
            raise UserError(
                f"config.json has max_window_layers={first!r}; qwen2 needs a whole number."
            )
        kinds = [
            "full_attention" if layer < first else "sliding_attention"
            for layer in range(num_layers)
        ]
    settings["attention_window"] = _windows(
        c,
        "layer_types",
        kinds,
        known=("full_attention", "sliding_attention"),
        num_layers=num_layers,
        size_key="sliding_window",
    )
    return ModelConfig(**settings)


def write_qwen2(m: ModelConfig) -> JsonObject:
    """Return what a Qwen2 config.json says of a model."""
    windows = _each_layer(m)
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    first = kinds.index("sliding_attention") if any(windows) else m.num_layers
    return {
        **_write_llama_settings(m),
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "max_window_layers": first,
        "layer_types": kinds,
    }
