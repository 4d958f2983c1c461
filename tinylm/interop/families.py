"""The model families of Hugging Face that tinylm can be, each as a table from their names to ours.

A line of a table says which tensor of theirs holds which parameters of ours, and how:

    model.layers.{}.self_attn.q_proj.weight   blocks/attention/query/kernel   OUTPUT_FIRST

The first {} is the number of the layer, the second that of the expert. A line whose path a model
doesn't have (a bias, an output matrix that is tied) is skipped, so one table serves every variant
of a family. `layouts` has the transforms, `weights` follows this line from file to device, and
`family_configs` maps the config.json of each family both ways.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tinylm.interop import family_configs as configs
from tinylm.interop import layouts as to
from tinylm.interop.layouts import Layout
from tinylm.model.config import ModelConfig

_ATTENTION = "blocks/attention"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      theirs: the name of their tensor, where {} is the layer, and the next one the expert.
      ours: the paths of our parameters that it holds; several where it is fused.
      layout: how it holds them.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout

    @property
    def num_stacked(self) -> int:
        """How many of the first dimensions of ours a tensor of theirs is one entry of."""
        return self.theirs.count("{}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family: its names, its table, its config both ways.

    Attributes:
      model_type: its name in a config.json.
      architecture: the class of transformers that loads it.
      prefix: of the names of all tensors but the output matrix's; some published files leave it
        out.
      rows: the table.
      ignored: why tensors that hold no weights are left out, by the end of their names.
      names: the family's own name of each setting of ours.
      read_config: from the content of a config.json to our settings.
      write_config: the other way.
      renamed: names that some versions of transformers give to tensors of the table.
    """

    model_type: str
    architecture: str
    prefix: str
    rows: tuple[Row, ...]
    ignored: Mapping[str, str]
    names: configs.Names
    read_config: Callable[[dict[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def name_of(self, path: str) -> str:
        """Return the name of the one tensor that holds a parameter of ours by itself."""
        [name] = [row.theirs for row in self.rows if row.ours == (path,)]
        return name

    @property
    def layer_prefix(self) -> str:
        """What stands before the number of a layer in the names of its tensors."""
        return next(row.theirs.partition("{}")[0] for row in self.rows if "{}" in row.theirs)


def _norms(prefix: str, names: dict[str, str]) -> list[Row]:
    """Return the lines of norms, a scale and a bias each.

    Args:
      prefix: of their names.
      names: our path by their name.
    """
    rows = []
    for theirs, ours in names.items():
        rows.append(Row(f"{prefix}{theirs}.weight", (f"{ours}/scale",), to.SAME))
        rows.append(Row(f"{prefix}{theirs}.bias", (f"{ours}/bias",), to.SAME))
    return rows


def _linears(prefix: str, names: dict[str, tuple[str, Layout]]) -> list[Row]:
    """Return the lines of linear maps, a kernel and a bias each.

    Args:
      prefix: of their names.
      names: our path and the transform of the kernel by their name.
    """
    rows = []
    for theirs, (ours, layout) in names.items():
        rows.append(Row(f"{prefix}{theirs}.weight", (f"{ours}/kernel",), layout))
        rows.append(Row(f"{prefix}{theirs}.bias", (f"{ours}/bias",), to.FLAT))
    return rows


def _fused(name: str, layout: Layout) -> list[Row]:
    """Return the lines of one map that makes queries, keys and values."""
    paths = [f"{_ATTENTION}/{part}" for part in ("query", "key", "value")]
    kernels = tuple(f"{path}/kernel" for path in paths)
    biases = tuple(f"{path}/bias" for path in paths)
    return [Row(f"{name}.weight", kernels, layout), Row(f"{name}.bias", biases, layout)]


# GPT-2 and GPT-Neo share all names but those of the maps in a layer.
_GPT_ROWS = (
    Row("transformer.wte.weight", ("embedding",), to.SAME),
    Row("transformer.wpe.weight", ("positions",), to.SAME),
    *_norms("transformer.", {"ln_f": "norm"}),
    Row("lm_head.weight", ("head",), to.OUTPUT_FIRST),
    *_norms("transformer.h.{}.", {"ln_1": "blocks/attention_norm", "ln_2": "blocks/mlp_norm"}),
)
_IGNORED = {
    ".attn.bias": "causal mask, which is computed",
    ".attn.masked_bias": "constant of a causal mask",
    ".attention.bias": "causal mask, which is computed",
    ".attention.masked_bias": "constant of a causal mask",
    ".rotary_emb.inv_freq": "rotary frequencies, which follow from config.json",
}

# Queries, keys and values come from one matrix, and all matrices have the inputs first.
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    rows=(
        *_GPT_ROWS,
        *_fused("transformer.h.{}.attn.c_attn", to.THIRDS),
        *_linears(
            "transformer.h.{}.",
            {
                "attn.c_proj": (f"{_ATTENTION}/out", to.INPUT_FIRST_2),
                "mlp.c_fc": ("blocks/mlp/up", to.INPUT_FIRST),
                "mlp.c_proj": ("blocks/mlp/down", to.INPUT_FIRST),
            },
        ),
    ),
    ignored=_IGNORED,
    names=configs.GPT2_NAMES,
    read_config=configs.read_gpt2,
    write_config=configs.write_gpt2,
)

# GPT-2 with a matrix each for queries, keys and values, which have no biases, and with windows of
# attention. Its attention is not scaled by the size of a head.
GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    rows=(
        *_GPT_ROWS,
        *_linears(
            "transformer.h.{}.",
            {
                "attn.attention.q_proj": (f"{_ATTENTION}/query", to.OUTPUT_FIRST),
                "attn.attention.k_proj": (f"{_ATTENTION}/key", to.OUTPUT_FIRST),
                "attn.attention.v_proj": (f"{_ATTENTION}/value", to.OUTPUT_FIRST),
                "attn.attention.out_proj": (f"{_ATTENTION}/out", to.OUTPUT_FIRST_2),
                "mlp.c_fc": ("blocks/mlp/up", to.OUTPUT_FIRST),
                "mlp.c_proj": ("blocks/mlp/down", to.OUTPUT_FIRST),
            },
        ),
    ),
    ignored=_IGNORED,
    names=configs.GPT_NEO_NAMES,
    read_config=configs.read_gpt_neo,
    write_config=configs.write_gpt_neo,
)

# Rotary positions for a part of each head, and a block whose two halves may read the same input.
# The matrix of queries, keys and values goes head by head.
GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    rows=(
        Row("gpt_neox.embed_in.weight", ("embedding",), to.SAME),
        *_norms("gpt_neox.", {"final_layer_norm": "norm"}),
        Row("embed_out.weight", ("head",), to.OUTPUT_FIRST),
        *_norms(
            "gpt_neox.layers.{}.",
            {
                "input_layernorm": "blocks/attention_norm",
                "post_attention_layernorm": "blocks/mlp_norm",
            },
        ),
        *_fused("gpt_neox.layers.{}.attention.query_key_value", to.BY_HEAD),
        *_linears(
            "gpt_neox.layers.{}.",
            {
                "attention.dense": (f"{_ATTENTION}/out", to.OUTPUT_FIRST_2),
                "mlp.dense_h_to_4h": ("blocks/mlp/up", to.OUTPUT_FIRST),
                "mlp.dense_4h_to_h": ("blocks/mlp/down", to.OUTPUT_FIRST),
            },
        ),
    ),
    ignored=_IGNORED,
    names=configs.GPT_NEOX_NAMES,
    read_config=configs.read_gpt_neox,
    write_config=configs.write_gpt_neox,
    renamed={"lm_head.weight": "embed_out.weight"},
)

# Norms without mean and bias, a gated mlp, and fewer heads of keys and values than of queries.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    rows=(
        Row("model.embed_tokens.weight", ("embedding",), to.SAME),
        *_norms("model.", {"norm": "norm"}),
        Row("lm_head.weight", ("head",), to.OUTPUT_FIRST),
        *_norms(
            "model.layers.{}.",
            {
                "input_layernorm": "blocks/attention_norm",
                "post_attention_layernorm": "blocks/mlp_norm",
            },
        ),
        *_linears(
            "model.layers.{}.",
            {
                "self_attn.q_proj": (f"{_ATTENTION}/query", to.OUTPUT_FIRST),
                "self_attn.k_proj": (f"{_ATTENTION}/key", to.OUTPUT_FIRST),
                "self_attn.v_proj": (f"{_ATTENTION}/value", to.OUTPUT_FIRST),
                "self_attn.o_proj": (f"{_ATTENTION}/out", to.OUTPUT_FIRST_2),
                "mlp.gate_proj": ("blocks/mlp/gate", to.OUTPUT_FIRST),
                "mlp.up_proj": ("blocks/mlp/up", to.OUTPUT_FIRST),
                "mlp.down_proj": ("blocks/mlp/down", to.OUTPUT_FIRST),
            },
        ),
    ),
    ignored=_IGNORED,
    names=configs.LLAMA_NAMES,
    read_config=configs.read_llama,
    write_config=configs.write_llama,
)

# The tensors are Llama's; what differs is in config.json: one window of attention for all layers.
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=configs.read_mistral,
    write_config=configs.write_mistral,
)

# Again Llama's tensors, with biases of queries, keys and values, and a window in some layers.
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=configs.read_qwen2,
    write_config=configs.write_qwen2,
)


def _experts(router: str, experts: str, names: tuple[str, str, str]) -> list[Row]:
    """Return the lines of a router and its experts.

    Args:
      router: the name of its map, without `.weight`.
      experts: what stands before the names of an expert's maps.
      names: those of gate, up and down.
    """
    rows = [Row(f"{router}.weight", ("blocks/mlp/router/kernel",), to.OUTPUT_FIRST)]
    for theirs, ours in zip(names, ("gate", "up", "down"), strict=True):
        rows.append(Row(f"{experts}{theirs}.weight", (f"blocks/mlp/{ours}",), to.OUTPUT_FIRST))
    return rows


_QK_NORMS = tuple(
    Row(f"model.layers.{{}}.self_attn.{theirs}.weight", (f"{_ATTENTION}/{ours}/scale",), to.FLAT)
    for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm"))
)
_LLAMA_EXPERTS = tuple(
    _experts(
        "model.layers.{}.mlp.gate",
        "model.layers.{}.mlp.experts.{}.",
        ("gate_proj", "up_proj", "down_proj"),
    )
)

# Qwen2 without biases, and with a norm of each head's queries and keys.
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*LLAMA.rows, *_QK_NORMS),
    read_config=configs.read_qwen3,
    write_config=configs.write_qwen2,
)

# Mistral with experts in the place of the mlp.
MIXTRAL = dataclasses.replace(
    LLAMA,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(
        *LLAMA.rows,
        *_experts(
            "model.layers.{}.block_sparse_moe.gate",
            "model.layers.{}.block_sparse_moe.experts.{}.",
            ("w1", "w3", "w2"),
        ),
    ),
    names=configs.MIXTRAL_NAMES,
    read_config=configs.read_mixtral,
    write_config=configs.write_mixtral,
)

# Llama's attention with a norm of each head's queries and keys, and experts.
QWEN3_MOE = dataclasses.replace(
    LLAMA,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(*LLAMA.rows, *_QK_NORMS, *_LLAMA_EXPERTS),
    names=configs.QWEN3_MOE_NAMES,
    read_config=configs.read_qwen3_moe,
    write_config=configs.write_qwen3_moe,
)

# Likewise, with a norm of all heads' queries together, and of all keys.
OLMOE = dataclasses.replace(
    LLAMA,
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    rows=(*LLAMA.rows, *_QK_NORMS, *_LLAMA_EXPERTS),
    names=configs.OLMOE_NAMES,
    read_config=configs.read_olmoe,
    write_config=configs.write_olmoe,
)

FAMILIES = {
    family.model_type: family
    for family in (
        GPT2,
        GPT_NEO,
        GPT_NEOX,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        OLMOE,
    )
}
