"""The config.json of each family as model settings, and back.

For each family there are its names for settings of ours, `read_FAMILY` (a config.json to a
ModelConfig) and `write_FAMILY` (the other way). What they have in common comes first. A model of
ours fits a family where going there and back changes none of its settings
(`models.fitting_family`), so there is no second list of what a family can express.

What a config.json asks for and no setting of ours expresses is refused, by the family's own name
for it. Files of old and new versions of `transformers` are read as transformers reads them: where a
key is in two places the same one wins, and where it is missing the same default holds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.core.errors import UserError
from tinylm.model.config import ModelConfig

# A family's own name of each setting of ours.
Names = Mapping[str, str]
JsonObject = dict[str, Any]

# The largest value of any size.
_MOST = 2**31 - 1
# Our settings that are sizes. A family that has no name for one has no such choice.
_SIZES = (
    "vocab_size",
    "context",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "num_experts",
    "experts_per_token",
    # After mlp_dim, whose name it has in some families.
    "expert_dim",
)
# The name of the context in the config.json of all families with rotary positions.
_CONTEXT = "max_position_embeddings"
# Names that transformers takes for those of GPT-2 and GPT-Neo (its `attribute_map`).
_ALSO = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}

# Their names of activations, and ours: those of plain mlps, and those of gated ones.
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
    "olmo2": "q_norm and k_norm, and norms behind attention and mlp",
    "opt": "activation_function='relu'",
    "phi": "one norm for attention and mlp",
    "phi3": "qkv_proj and gate_up_proj, which are fused",
    "qwen2_moe": "shared_expert_gate",
    "smollm3": "no_rope_layers",
}


def _family(config: JsonObject) -> str:
    """Return the name of the family, for errors."""
    return str(config.get("model_type"))


def first_of(config: JsonObject, key: str) -> Any:
    """Return the value of a key, or of the other name that transformers knows it by."""
    value = config.get(key)
    if value is None:
        return config.get(_ALSO.get(key, key))
    return value


def _whole(config: JsonObject, key: str, value: Any) -> int:
    """Return a value if it can be a size; raise UserError if it can't."""
    if type(value) is not int or not 1 <= value <= _MOST:
        raise UserError(
            f"config.json has {key}={value!r}; {_family(config)} needs a whole number from 1 to "
            f"{_MOST}."
        )
    return value


def _sizes(config: JsonObject, names: Names, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return our settings that are sizes.

    Args:
      config: the content of a config.json.
      names: the family's.
      optional: our names of those that it may lack. They become 0, which means that they follow
        from others.
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


def _their_sizes(model: ModelConfig, names: Names) -> JsonObject:
    """Return our settings that are sizes by the family's names."""
    return {names[ours]: getattr(model, ours) for ours in _SIZES if ours in names}


def _flag(config: JsonObject, key: str, default: bool) -> bool:
    """Return true or false from a config.json; raise UserError for anything else."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise UserError(f"config.json has {key}={value!r}; {_family(config)} needs true or false.")
    return value


def _number(config: JsonObject, key: str, value: Any) -> float:
    """Return a value if it is a number above 0; raise UserError if it isn't."""
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
    """Return our name of the activation of a config.json; raise UserError if it isn't `known`."""
    name = config.get(key, default)
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"config.json has {key}={name!r}; tinylm reads {_family(config)} with "
            f"{', '.join(known)}."
        )
    return known[name]


def _activation_name(known: dict[str, str], ours: str) -> str:
    """Return the family's name of an activation of ours.

    One that the family doesn't have gets the name of another, so that it reads back as that one and
    `models.fitting_family` finds the difference.
    """
    for theirs, mlp in known.items():
        if mlp == ours:
            return theirs
    return next(iter(known))


def _rope(config: JsonObject) -> JsonObject:
    """Return the nested settings of rotary positions, which old files don't have.

    A `rope_scaling` that says anything wins over `rope_parameters` (transformers 5,
    `convert_rope_params_to_dict`).
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"config.json has {key}={rope!r:.60}, which is not an object.")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(
                f"config.json has {key} for each kind of layer; tinylm reads one for all."
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", *_ROPE_NAMES):
            raise UserError(
                f"config.json has {key} with rope_type={kind!r}; tinylm reads rotary positions "
                f"unscaled, or with {', '.join(_ROPE_NAMES)}."
            )
        return {**rope, "rope_type": kind}
    return {"rope_type": "default"}


# The scalings of rotary positions, with their names of our settings.
_ROPE_NAMES: dict[str, Names] = {
    "linear": {"rotary_factor": "factor"},
    "llama3": {
        "rotary_factor": "factor",
        "rotary_original_context": "original_max_position_embeddings",
        "rotary_slow_turns": "low_freq_factor",
        "rotary_fast_turns": "high_freq_factor",
    },
    "yarn": {
        "rotary_factor": "factor",
        "rotary_original_context": "original_max_position_embeddings",
        "rotary_slow_turns": "beta_slow",
        "rotary_fast_turns": "beta_fast",
        "rotary_attention_factor": "attention_factor",
    },
}


def _scaling(config: JsonObject, rope: JsonObject) -> dict[str, Any]:
    """Return our settings of the scaling that `rope`, the nested settings of a config.json, asks
    for.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    settings: dict[str, Any] = {"rotary_scaling": kind}
    found = _with_usual_values(config, rope)
    for ours, theirs in _ROPE_NAMES[kind].items():
        if ours == "rotary_original_context":
            settings[ours] = _whole(config, theirs, found.get(theirs))
        else:
            settings[ours] = _number(config, theirs, found.get(theirs))
    if settings["rotary_factor"] < 1:
        raise UserError(
            f"config.json has factor={settings['rotary_factor']} of {kind}; tinylm reads factors "
            "of at least 1."
        )
    if kind != "linear" and settings["rotary_fast_turns"] <= settings["rotary_slow_turns"]:
        names = _ROPE_NAMES[kind]
        slow = names["rotary_slow_turns"]
        fast = names["rotary_fast_turns"]
        raise UserError(
            f"config.json has {fast}={settings['rotary_fast_turns']}, which must be above {slow}="
            f"{settings['rotary_slow_turns']}."
        )
    return settings


def _with_usual_values(config: JsonObject, rope: JsonObject) -> JsonObject:
    """Return nested settings in which what may be missing has the value that transformers takes."""
    original_key = "original_max_position_embeddings"
    original = config.get(original_key, rope.get(original_key, config.get(_CONTEXT)))
    found = {**rope, original_key: original}
    if rope["rope_type"] != "yarn":
        return found

    if rope.get("truncate", True) is not True:
        raise UserError(
            "config.json has yarn with truncate=false; tinylm begins and ends its blend at whole "
            "pairs of features."
        )
    if rope.get("factor") is None:
        context = _whole(config, _CONTEXT, config.get(_CONTEXT))
        found["factor"] = context / _whole(config, original_key, original)
    found["beta_slow"] = rope.get("beta_slow") or 1
    found["beta_fast"] = rope.get("beta_fast") or 32
    if rope.get("attention_factor") is None:
        growth = 0.1 * math.log(max(_number(config, "factor", found["factor"]), 1))
        scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if scale and scale_all:
            # DeepSeek-V2's: what grows for the rotated features and what for all of them.
            above = 1 + growth * _number(config, "mscale", scale)
            below = 1 + growth * _number(config, "mscale_all_dim", scale_all)
            found["attention_factor"] = above / below
        else:
            found["attention_factor"] = 1 + growth
    return found


def _write_scaling(model: ModelConfig) -> JsonObject:
    """Return what a config.json says of the scaling of rotary positions; nothing where there is
    none.
    """
    if model.rotary_scaling == "none":
        return {}
    names = _ROPE_NAMES[model.rotary_scaling]
    numbers = {theirs: getattr(model, ours) for ours, theirs in names.items()}
    # Before version 5 transformers knows it by this name alone.
    return {"rope_scaling": {"rope_type": model.rotary_scaling, **numbers}}


def _windows(
    config: JsonObject,
    key: str,
    kinds: Any,
    *,
    known: tuple[str, str],
    num_layers: int,
    size_key: str,
) -> tuple[int, ...]:
    """Return our pattern of windows of attention from the kind of each layer.

    Args:
      config: the content of a config.json.
      key: the one that has the kinds, for errors.
      kinds: the kind of each layer, as the file has them.
      known: the name of the kind without a window, and of that with one.
      num_layers: how many kinds there must be.
      size_key: the key that has the size of the window, in tokens.

    Returns:
      The shortest pattern that, repeated over the layers, gives the window of each; 0 for none.
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
    windows = [size if kind == known[1] else 0 for kind in kinds]
    return _shortest_pattern(windows)


def _shortest_pattern(windows: list[int]) -> tuple[int, ...]:
    """Return the shortest pattern that gives the window of each layer when it is repeated."""
    for length in range(1, len(windows)):
        if len(windows) % length == 0:
            pattern = windows[:length]
            if pattern * (len(windows) // length) == windows:
                return tuple(pattern)
    return tuple(windows)


def _window_of_each_layer(model: ModelConfig) -> tuple[int, ...]:
    """Return the window of each layer, in tokens; 0 for none."""
    return model.attention_window * (model.num_layers // len(model.attention_window))


# GPT-2. The mlp is 4 times as wide as the model unless n_inner says otherwise.

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


def read_gpt2(config: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-2 config.json."""
    _only(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return ModelConfig(
        **_sizes(config, GPT2_NAMES, optional=("mlp_dim",)),
        position="learned",
        norm="layernorm",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(config, "activation_function", "gelu_new", _ACTIVATIONS),
        bias=True,
        qkv_bias=True,
        tie_embeddings=_flag(config, "tie_word_embeddings", True),
    )


def write_gpt2(model: ModelConfig) -> JsonObject:
    """Return what a GPT-2 config.json says of a model."""
    return {
        **_their_sizes(model, GPT2_NAMES),
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": _activation_name(_ACTIVATIONS, model.mlp),
        "tie_word_embeddings": model.tie_embeddings,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


# GPT-Neo. Layers attend globally or in a window, attention is not scaled, and its queries, keys and
# values have no biases.

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


def read_gpt_neo(config: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-Neo config.json."""
    sizes = _sizes(config, GPT_NEO_NAMES, optional=("mlp_dim",))
    num_layers = sizes["num_layers"]
    kinds = config.get("attention_layers")
    if kinds is None:
        kinds = _expanded(config, num_layers)
    windows = _windows(
        {"window_size": 256, **config},
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
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        mlp=_activation(config, "activation_function", "gelu_new", _ACTIVATIONS),
        bias=True,
        attention_scale=1.0,
        attention_window=windows,
        tie_embeddings=_flag(config, "tie_word_embeddings", True),
    )


def _expanded(config: JsonObject, num_layers: int) -> list[Any]:
    """Return the kind of each layer that `attention_types` asks for, a list of [kinds, how often].

    Their sum is compared with the number of layers first: a short text can ask for any number of
    them.
    """
    pairs = config.get("attention_types", [[["global", "local"], 12]])
    try:
        count = sum(len(kinds) * _whole(config, "attention_types", times) for kinds, times in pairs)
    except (TypeError, ValueError) as error:
        raise UserError(
            "config.json has attention_types that are not a list of [kinds, how often]."
        ) from error
    if count != num_layers:
        raise UserError(
            f"config.json has attention_types of {count} layers and num_layers={num_layers}."
        )
    expanded: list[Any] = []
    for kinds, times in pairs:
        expanded += list(kinds) * times
    return expanded


def write_gpt_neo(model: ModelConfig) -> JsonObject:
    """Return what a GPT-Neo config.json says of a model."""
    windows = _window_of_each_layer(model)
    kinds = ["local" if window else "global" for window in windows]
    return {
        **_their_sizes(model, GPT_NEO_NAMES),
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": _activation_name(_ACTIVATIONS, model.mlp),
        "attention_types": [[[kind], 1] for kind in kinds],
        "attention_layers": kinds,
        "window_size": max(windows) or 256,
        "tie_word_embeddings": model.tie_embeddings,
        "embed_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "resid_dropout": model.dropout,
    }


# GPT-NeoX. Both halves of a block read the same input unless it says otherwise, and a part of each
# head rotates. Biases of attention can be left out.

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
    "rotary_scaling": "rope_type",
    "rotary_fraction": "rotary_pct",
    "parallel_residual": "use_parallel_residual",
}


def read_gpt_neox(config: JsonObject) -> ModelConfig:
    """Return the model settings of a GPT-NeoX config.json."""
    rope = _rope(config)
    base, fraction = _neox_rope(config, rope)
    attention_bias = _flag(config, "attention_bias", True)
    return ModelConfig(
        **_sizes(config, GPT_NEOX_NAMES),
        position="rotary",
        rotary_fraction=fraction,
        rotary_base=base,
        **_scaling(config, rope),
        norm="layernorm",
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        mlp=_activation(config, "hidden_act", "gelu", _ACTIVATIONS),
        bias=True,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        parallel_residual=_flag(config, "use_parallel_residual", True),
        tie_embeddings=_flag(config, "tie_word_embeddings", False),
    )


def _neox_rope(config: JsonObject, rope: JsonObject) -> tuple[float, float]:
    """Return (base, rotating fraction) of GPT-NeoX, which has old names of its own for both."""
    base = rope.get("rope_theta", config.get("rotary_emb_base", 10_000.0))
    base = _number(config, "rope_theta", base)
    fraction = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    fraction = _number(config, "partial_rotary_factor", fraction)
    return base, fraction


def write_gpt_neox(model: ModelConfig) -> JsonObject:
    """Return what a GPT-NeoX config.json says of a model, by names that old versions know too."""
    return {
        **_their_sizes(model, GPT_NEOX_NAMES),
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
        **_write_scaling(model),
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": _activation_name(_ACTIVATIONS, model.mlp),
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.qkv_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
    }


# Llama, and what Mistral and Qwen2 share with it. It has switches of their own for the biases of
# attention and of the mlp, where we have one for all biases and exceptions from it.

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
    "rotary_scaling": "rope_type",
    "attention_window": "sliding_window",
}


def _llama_settings(config: JsonObject, **more: Any) -> dict[str, Any]:
    """Return the settings that Llama, Mistral and Qwen2 share.

    They rotate whole heads, whatever `partial_rotary_factor` says.
    """
    rope = _rope(config)
    base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return {
        **_sizes(config, LLAMA_NAMES, optional=("num_kv_heads", "head_dim")),
        "position": "rotary",
        "rotary_base": _number(config, "rope_theta", base),
        **_scaling(config, rope),
        "norm": "rmsnorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "mlp": _activation(config, "hidden_act", "silu", _GATED),
        "tie_embeddings": _flag(config, "tie_word_embeddings", False),
        **more,
    }


def _write_llama_settings(model: ModelConfig) -> JsonObject:
    return {
        **_their_sizes(model, LLAMA_NAMES),
        "rope_theta": model.rotary_base,
        **_write_scaling(model),
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": _activation_name(_GATED, model.mlp),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.dropout,
    }


def read_llama(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Llama config.json."""
    attention_bias = _flag(config, "attention_bias", False)
    mlp_bias = _flag(config, "mlp_bias", False)
    has_bias = attention_bias or mlp_bias
    settings = _llama_settings(config, bias=has_bias, qkv_bias=attention_bias)
    # Without biases the exceptions stay at their defaults, as in a model of ours.
    if has_bias:
        settings["out_bias"] = attention_bias
        settings["mlp_bias"] = mlp_bias
    return ModelConfig(**settings)


def write_llama(model: ModelConfig) -> JsonObject:
    """Return what a Llama config.json says of a model."""
    return {
        **_write_llama_settings(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.bias and model.mlp_bias,
    }


def read_mistral(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Mistral config.json.

    Mistral is Llama with one window of attention for all layers, or none.
    """
    window = config.get("sliding_window", 4096)
    size = 0 if window is None else _whole(config, "sliding_window", window)
    # Transformers' default, unlike Llama's, is a number.
    config = {"num_key_value_heads": 8, **config}
    return ModelConfig(**_llama_settings(config, attention_window=(size,)))


def write_mistral(model: ModelConfig) -> JsonObject:
    """Return what a Mistral config.json says of a model."""
    return {**_write_llama_settings(model), "sliding_window": max(model.attention_window) or None}


def read_qwen2(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Qwen2 config.json.

    Qwen2 is Llama with biases of queries, keys and values alone, and a window of attention in some
    of the layers: in those for which `layer_types` says so, or where that is missing in those from
    `max_window_layers` on.
    """
    # Transformers' defaults differ from Llama's.
    config = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, **config}
    # A window that isn't switched on doesn't count.
    if not _flag(config, "use_sliding_window", False):
        config["sliding_window"] = None
    settings = _llama_settings(config, qkv_bias=True)
    num_layers = settings["num_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"]
        if config["sliding_window"] is None:
            first = num_layers
        if type(first) is not int:
            raise UserError(
                f"config.json has max_window_layers={first!r}; qwen2 needs a whole number."
            )
        kinds = []
        for layer in range(num_layers):
            kinds.append("full_attention" if layer < first else "sliding_attention")
    settings["attention_window"] = _windows(
        config,
        "layer_types",
        kinds,
        known=("full_attention", "sliding_attention"),
        num_layers=num_layers,
        size_key="sliding_window",
    )
    return ModelConfig(**settings)


def write_qwen2(model: ModelConfig) -> JsonObject:
    """Return what a Qwen2 config.json says of a model."""
    windows = _window_of_each_layer(model)
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    first = kinds.index("sliding_attention") if any(windows) else model.num_layers
    return {
        **_write_llama_settings(model),
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def read_qwen3(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Qwen3 config.json.

    Qwen3 is Qwen2 without biases, and with a norm of each head's queries and keys.
    """
    _only(config, attention_bias=False)
    model = read_qwen2({"head_dim": 128, **config})
    return dataclasses.replace(model, qkv_bias=False, qk_norm=True, qk_norm_scale="head")


# Llama with experts: Mixtral, Qwen3-MoE and OLMoE. Each has a name of its own for the width of an
# expert; Qwen3-MoE alone has one for layers without experts, too, which is read but not followed.

MIXTRAL_NAMES = {
    **LLAMA_NAMES,
    "expert_dim": "intermediate_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
QWEN3_MOE_NAMES = {
    **MIXTRAL_NAMES,
    "expert_dim": "moe_intermediate_size",
    "num_experts": "num_experts",
    "router_normalize": "norm_topk_prob",
}
# OLMoE has no name for the size of a head.
OLMOE_NAMES = {
    name: theirs
    for name, theirs in {**QWEN3_MOE_NAMES, "expert_dim": "intermediate_size"}.items()
    if name != "head_dim"
}


def _expert_settings(config: JsonObject, names: Names, **more: Any) -> dict[str, Any]:
    """Return the settings that the three share; the bias that evens out loads is none of theirs."""
    _only(config, attention_bias=False)
    sizes = _sizes(config, names, optional=("num_kv_heads", "head_dim"))
    return {**_llama_settings(config), **sizes, "router_bias_rate": 0.0, **more}


def _write_expert_settings(model: ModelConfig, names: Names) -> JsonObject:
    sizes = _their_sizes(model, names)
    # A model without experts reads back as one of a single expert, which tells them apart.
    sizes[names["num_experts"]] = model.num_experts or 1
    sizes[names["expert_dim"]] = model.expert_dim or model.mlp_dim
    # Their balance loss is another one (over all layers and rows at once), so its weight is left to
    # their default.
    return {**_write_llama_settings(model), **sizes}


def read_mixtral(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Mixtral config.json."""
    # Transformers' defaults differ from Llama's.
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    config = {**defaults, **config}
    window = config.get("sliding_window")
    size = 0 if window is None else _whole(config, "sliding_window", window)
    return ModelConfig(**_expert_settings(config, MIXTRAL_NAMES, attention_window=(size,)))


def write_mixtral(model: ModelConfig) -> JsonObject:
    """Return what a Mixtral config.json says of a model."""
    settings = _write_expert_settings(model, MIXTRAL_NAMES)
    return {**settings, "sliding_window": max(model.attention_window) or None}


def read_qwen3_moe(config: JsonObject) -> ModelConfig:
    """Return the model settings of a Qwen3-MoE config.json."""
    defaults = {"num_key_value_heads": 4, "sliding_window": 4096}
    config = {**defaults, **config}
    # Every layer has experts.
    _only(config, decoder_sparse_step=1, mlp_only_layers=[])
    size = 0
    if _flag(config, "use_sliding_window", False) and config["sliding_window"] is not None:
        size = _whole(config, "sliding_window", config["sliding_window"])
    settings = _expert_settings(
        config,
        QWEN3_MOE_NAMES,
        attention_window=(size,),
        qk_norm=True,
        qk_norm_scale="head",
        router_normalize=_flag(config, "norm_topk_prob", False),
    )
    return ModelConfig(**settings)


def write_qwen3_moe(model: ModelConfig) -> JsonObject:
    """Return what a Qwen3-MoE config.json says of a model."""
    window = max(model.attention_window)
    return {
        **_write_expert_settings(model, QWEN3_MOE_NAMES),
        "norm_topk_prob": model.router_normalize,
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def read_olmoe(config: JsonObject) -> ModelConfig:
    """Return the model settings of an OLMoE config.json."""
    config = {"rms_norm_eps": 1e-5, **config}
    _only(config, clip_qkv=None)
    settings = _expert_settings(
        config,
        OLMOE_NAMES,
        head_dim=0,
        qk_norm=True,
        qk_norm_scale="all",
        router_normalize=_flag(config, "norm_topk_prob", False),
    )
    return ModelConfig(**settings)


def write_olmoe(model: ModelConfig) -> JsonObject:
    """Return what an OLMoE config.json says of a model."""
    settings = _write_expert_settings(model, OLMOE_NAMES)
    del settings["head_dim"]
    return {**settings, "norm_topk_prob": model.router_normalize}
