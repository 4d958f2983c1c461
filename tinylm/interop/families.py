"""The model families of Hugging Face that tinylm can be: one table each (their name, our path, the
transform).

{} in a name is the layer. A line whose path a model doesn't have (a bias, an output matrix that is
tied) is skipped, so one table serves every variant of a family. `family_configs` maps the
config.json of each both ways.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tinylm.interop import family_configs as configs
from tinylm.interop import layouts as to
from tinylm.interop.layouts import Layout
from tinylm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: their name ({} is the layer), our paths that it holds, the transform."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: its names, its table, its config both ways.

    `ignored` says of tensors that hold no weight, by the end of their names, why they are left out;
    `renamed` are names that some versions of transformers give to tensors of the table.
    """

    model_type: str
    architecture: str
    prefix: str  # of all names but the output matrix's; some published files leave it out
    rows: tuple[Row, ...]
    ignored: Mapping[str, str]
    names: configs.Names  # the family's own name of a setting of ours
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


def _rows(*lines: tuple[str, str | tuple[str, ...], Layout]) -> tuple[Row, ...]:
    return tuple(
        Row(theirs, (ours,) if isinstance(ours, str) else ours, layout)
        for theirs, ours, layout in lines
    )


def _norms(prefix: str, names: dict[str, str]) -> list[tuple[str, str, Layout]]:
    """Lines of norms {their name: our path}."""
    ends = (("weight", "scale"), ("bias", "bias"))
    return [
        (f"{prefix}{t}.{end}", f"{o}/{ours}", to.SAME)
        for t, o in names.items()
        for end, ours in ends
    ]


def _linears(prefix: str, names: dict[str, tuple[str, Layout]]) -> list[tuple[str, str, Layout]]:
    """Lines of linear maps {their name: (our path, transform of the kernel)} with their biases."""
    lines = []
    for theirs, (ours, layout) in names.items():
        lines += [
            (f"{prefix}{theirs}.weight", f"{ours}/kernel", layout),
            (f"{prefix}{theirs}.bias", f"{ours}/bias", to.FLAT),
        ]
    return lines


def _fused(name: str, layout: Layout) -> list[tuple[str, tuple[str, ...], Layout]]:
    """Lines of one map that makes queries, keys and values."""
    paths = [f"blocks/attention/{part}" for part in ("query", "key", "value")]
    return [
        (f"{name}.weight", tuple(f"{path}/kernel" for path in paths), layout),
        (f"{name}.bias", tuple(f"{path}/bias" for path in paths), layout),
    ]


_ATTENTION = "blocks/attention"
_GPT_TOP = (
    ("transformer.wte.weight", "embedding", to.SAME),
    ("transformer.wpe.weight", "positions", to.SAME),
    *_norms("transformer.", {"ln_f": "norm"}),
    ("lm_head.weight", "head", to.OUTPUT_FIRST),
)
_GPT_NORMS = _norms(
    "transformer.h.{}.", {"ln_1": "blocks/attention_norm", "ln_2": "blocks/mlp_norm"}
)
_IGNORED = {
    ".attn.bias": "causal mask, which is computed",
    ".attn.masked_bias": "constant of a causal mask",
    ".attention.bias": "causal mask, which is computed",
    ".attention.masked_bias": "constant of a causal mask",
    ".rotary_emb.inv_freq": "rotary frequencies, which follow from config.json",
}

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    _rows(
        *_GPT_TOP,
        *_GPT_NORMS,
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
    _IGNORED,
    configs.GPT2_NAMES,
    configs.read_gpt2,
    configs.write_gpt2,
)

GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "transformer.",
    _rows(
        *_GPT_TOP,
        *_GPT_NORMS,
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
    _IGNORED,
    configs.GPT_NEO_NAMES,
    configs.read_gpt_neo,
    configs.write_gpt_neo,
)

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    _rows(
        ("gpt_neox.embed_in.weight", "embedding", to.SAME),
        *_norms("gpt_neox.", {"final_layer_norm": "norm"}),
        ("embed_out.weight", "head", to.OUTPUT_FIRST),
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
    _IGNORED,
    configs.GPT_NEOX_NAMES,
    configs.read_gpt_neox,
    configs.write_gpt_neox,
    {"lm_head.weight": "embed_out.weight"},
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "model.",
    _rows(
        ("model.embed_tokens.weight", "embedding", to.SAME),
        *_norms("model.", {"norm": "norm"}),
        ("lm_head.weight", "head", to.OUTPUT_FIRST),
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
    _IGNORED,
    configs.LLAMA_NAMES,
    configs.read_llama,
    configs.write_llama,
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=configs.read_mistral,
    write_config=configs.write_mistral,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=configs.read_qwen2,
    write_config=configs.write_qwen2,
)

FAMILIES = {
    family.model_type: family for family in (GPT2, GPT_NEO, GPT_NEOX, LLAMA, MISTRAL, QWEN2)
}
