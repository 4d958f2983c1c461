"""Small models of each family, with every weight random, that the tests of interop share."""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.data.tokenizers import ByteTokenizer
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer
from tinylm.run.open_run import Run

VOCAB = 259  # the byte tokenizer's 257 and two ids that nothing uses
_GPT = {"position": "learned", "norm": "layernorm", "bias": True}
_EXPERTS = {
    "mlp": "swiglu",
    "num_experts": 4,
    "mlp_dim": 40,
    "expert_dim": 40,
    "num_kv_heads": 2,
    "router_bias_rate": 0.0,
}
SETTINGS = {
    "gpt2": {**_GPT, "qkv_bias": True},
    "gpt2_untied": {
        **_GPT,
        "qkv_bias": True,
        "tie_embeddings": False,
        "mlp": "gelu_exact",
        "mlp_dim": 24,
    },
    "gpt_neo": {**_GPT, "attention_scale": 1.0, "attention_window": (0, 5)},
    "gpt_neo_all_local": {
        **_GPT,
        "attention_scale": 1.0,
        "attention_window": (5,),
        "norm_epsilon": 1e-6,
    },
    "gpt_neox": {
        "norm": "layernorm",
        "bias": True,
        "qkv_bias": True,
        "rotary_fraction": 0.25,
        "mlp": "gelu_exact",
        "parallel_residual": True,
        "tie_embeddings": False,
    },
    "gpt_neox_serial": {"norm": "layernorm", "bias": True, "qkv_bias": True, "rotary_base": 500.0},
    "llama": {"mlp": "swiglu", "mlp_dim": 40, "num_kv_heads": 2, "tie_embeddings": False},
    "mistral": {"mlp": "swiglu", "mlp_dim": 40, "num_kv_heads": 2, "attention_window": (5,)},
    "qwen2": {
        "mlp": "swiglu",
        "mlp_dim": 40,
        "qkv_bias": True,
        "attention_window": (0, 5),
        "rotary_base": 500.0,
    },
    "qwen3": {"mlp": "swiglu", "qk_norm": True, "qk_norm_scale": "head", "head_dim": 16},
    "mixtral": {**_EXPERTS, "attention_window": (5,), "tie_embeddings": False},
    "qwen3_moe": {**_EXPERTS, "qk_norm": True, "qk_norm_scale": "head", "head_dim": 16},
    "olmoe": {
        **_EXPERTS,
        "qk_norm": True,
        "qk_norm_scale": "all",
        "router_normalize": False,
        "norm_epsilon": 1e-6,
    },
    "llama_attention_bias": {"mlp": "swiglu", "bias": True, "qkv_bias": True, "mlp_bias": False},
    "llama_mlp_bias": {"mlp": "swiglu", "bias": True, "out_bias": False, "tie_embeddings": False},
    "gpt_neox_without_attention_bias": {
        "norm": "layernorm",
        "bias": True,
        "out_bias": False,
        "mlp": "gelu_exact",
    },
    "llama_tied": {
        "mlp": "geglu",
        "bias": True,
        "qkv_bias": True,
        "head_dim": 16,
        "norm_epsilon": 1e-6,
    },
}


def small_model(name: str, **changes) -> ModelConfig:
    """Return the resolved settings of a small model: context 24, two layers of four heads."""
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4}
    config = ModelConfig(**{**sizes, **SETTINGS[name], **changes})
    config = config.resolve(VOCAB, 24)
    config.check()
    return config


@functools.cache
def single_device() -> Mesh:
    return make_mesh(MeshConfig(data=1))


def small_run(config: ModelConfig, mesh: Mesh | None = None) -> Run:
    """Return a run of random parameters, biases and scales too, on a mesh (default: one device)."""

    graph, shapes, _ = abstract_transformer(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.2, leaf.shape)
        return jax.device_put(values.astype(np.float32), jax.devices()[0])

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Run(
        folder=None,
        config={},
        step=0,
        mesh=mesh or single_device(),
        model_config=config,
        graph=graph,
        params=params,
        tokenizer=ByteTokenizer(),
        start_id=ByteTokenizer.eot_id,
    )


def data_folder() -> pathlib.Path:
    """Return the folder of real files, or skip the test."""
    if not os.environ.get("TINYLM_TEST_DATA"):
        pytest.skip("TINYLM_TEST_DATA is not set: the folder of real data files")
    return pathlib.Path(os.environ["TINYLM_TEST_DATA"])


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)
