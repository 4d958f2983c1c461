"""Formulas of memory and traffic agree with compiled programs, over the options of a model.

`tests/model/test_flops.py` holds the formula of FLOPs in the same way. A new field of the model's
section must get a case here, or a line that says why the formulas needn't know it.
"""

import dataclasses
from typing import NamedTuple

import jax
import pytest

from tinylm.core.mesh import MeshConfig, batch_shards, make_mesh
from tinylm.data.config import DataConfig
from tinylm.model.config import ModelConfig
from tinylm.tools.plan import by_formula, compile_step, per_device_bytes
from tinylm.tools.programs import read_collectives
from tinylm.tools.search import activation_bytes
from tinylm.train.config import Config
from tinylm.train.state import make_blueprint

ROWS, LENGTH = 8, 64
DEFAULT = {
    "vocab_size": 256,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mlp_dim": 256,
}
# Each case changes what it names by so much that a formula without it leaves its bounds.
CASES = {
    "default": {},
    "vocabulary": {"vocab_size": 1000, "tie_embeddings": False},
    "gated": {"mlp": "swiglu", "mlp_dim": 512},
    "heads": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64},
    "wide and deep": {"embed_dim": 256, "num_layers": 4},
    "pieces of logits": {"vocab_size": 2048, "loss_chunks": 16},
    "parallel": {"parallel_residual": True},
    "convolved": {"conv_taps": 4, "embed_dim": 128, "mlp_dim": 64},
    "experts": {"num_experts": 4, "experts_per_token": 3, "expert_dim": 192},
    "mixed": {"num_experts": 4, "shared_experts": 2, "dense_layers": 1, "expert_dim": 192},
    "dots": {"remat": "dots"},
    "dots of experts": {
        "num_experts": 4,
        "experts_per_token": 3,
        "expert_dim": 192,
        "remat": "dots",
    },
    "full": {"remat": "full"},
}
# Compiled only with `-m slow`.
SLOW = (
    "vocabulary",
    "wide and deep",
    "pieces of logits",
    "parallel",
    "convolved",
    "mixed",
    "dots",
    "dots of experts",
)
# Fields of the model that the formulas needn't know, and why.
UNKNOWN = {
    "context": "the rows that are trained on have data.seq_len tokens",
    "compute_dtype": "CPUs compute bfloat16 in float32, so their programs can't be compared",
    "attention": "what a kernel saves differs by platform; formulas count XLA's",
    "context_attention": "a choice for meshes that split rows, which test_context_plan compiles",
    "attention_window": "blocks of windows save less on long rows, by platform",
    "local_heads": "as attention_window",
    "expert_parallel": "tests/test_plan.py compares what it sends with the formula",
    "unroll": "a choice of how to compile",
    "dropout": "its masks, a third more on a CPU, are not counted",
    **dict.fromkeys(
        ("bias", "qkv_bias", "mlp_bias", "out_bias", "norm", "position"),
        "parameters, which are counted by their shapes; their activations are few",
    ),
    **dict.fromkeys(
        (
            "qk_norm",
            "qk_norm_scale",
            "router",
            "router_normalize",
            "attention_softcap",
            "logit_softcap",
        ),
        "changes arrays that are counted, element by element",
    ),
    **dict.fromkeys(
        (
            "rotary_fraction",
            "rotary_base",
            "rotary_scaling",
            "rotary_factor",
            "rotary_original_context",
            "rotary_slow_turns",
            "rotary_fast_turns",
            "rotary_attention_factor",
            "norm_epsilon",
            "attention_scale",
            "embed_scale",
            "residual_scale",
            "init_std",
            "z_loss",
            "router_bias_rate",
            "router_balance_loss",
            "router_z_loss",
        ),
        "a number in computations of the same shapes",
    ),
}


class Measured(NamedTuple):
    """What a compiled step takes, as multiples of what formulas say."""

    activations: float
    traffic: float  # along the axis that has several devices


def measure(case: str, mesh_config: MeshConfig, unroll: int) -> Measured:
    """Compile the step of a case, with so many layers an iteration of the scan (0: all)."""
    model = ModelConfig(**{**DEFAULT, **CASES[case], "unroll": unroll})
    data = DataConfig(seq_len=LENGTH, batch_size=ROWS)
    config = Config(model=model, mesh=mesh_config, data=data).resolve(model.vocab_size)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        compiled = compile_step(config, blueprint, mesh)

    kept_bytes = per_device_bytes(compiled.memory_analysis(), blueprint)["activations"]
    row_bytes = activation_bytes(config.model, mesh_config.model, LENGTH)
    rows_per_device = ROWS // batch_shards(mesh)

    collectives = read_collectives(compiled.as_text(), mesh)
    needed = by_formula(config, blueprint.abstract, mesh).collectives
    assert {one.axis for one in collectives} == {one.axis for one in needed}
    sent_bytes = 0.0
    for one in collectives:
        # What other compilers write as a reduce-scatter is an all-reduce and a slice here, and an
        # all-reduce sends twice as much.
        part = 0.5 if one.kind == "all-reduce" else 1.0
        sent_bytes += part * one.bytes_per_step
    needed_bytes = sum(one.bytes_per_step for one in needed)
    return Measured(kept_bytes / (row_bytes * rows_per_device), sent_bytes / needed_bytes)


def marked(cases: tuple[str, ...]) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in cases]


def test_every_field_of_the_model_has_a_case_or_a_reason():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    with_case = {field for changes in CASES.values() for field in changes}
    assert with_case | set(UNKNOWN) == fields
    assert not with_case & set(UNKNOWN)


@pytest.mark.parametrize("case", marked(tuple(CASES)))
def test_activations_and_traffic_of_the_tensor_axis(case):
    """The CPU's compiler keeps up to 1.5 times what the formula counts.

    It keeps the gathered inputs of products as well as their parts, gates before and after their
    activation, and of a piece of the logits four arrays where the formula counts two. It sends up
    to 1.4 times the least: it gathers inputs again for the backward pass, and adds up the gradients
    of two maps of one input by themselves. Where a layer is computed again, jaxlib 0.10 keeps 1.10
    times what the formula counts and jaxlib 0.12 1.25 times.
    """
    # Without recomputation layers are unrolled, since of a scanned layer each operation's result is
    # kept. With it they are scanned, since in one unrolled program the compiler drops it.
    recomputes = "remat" in CASES[case]
    measured = measure(case, MeshConfig(data=1, model=2), unroll=1 if recomputes else 0)
    lowest, highest = (0.85, 1.3) if recomputes else (0.95, 1.55)
    assert lowest < measured.activations < highest
    # Attention and mlp of one input could share their collectives, and here they don't.
    shares = 2 if case == "parallel" else 1
    assert 0.95 < measured.traffic / shares < 1.42


@pytest.mark.parametrize("case", marked(("default", "vocabulary", "wide and deep", "full")))
def test_traffic_of_fsdp(case):
    """The CPU's compiler sends what the formula says, and moves some features by itself.

    Two things it can leave out. It looks up an embedding that isn't the output matrix, too, by
    columns, and gathers it never. And what it gathers for recomputing a layer serves the layer's
    gradients as well, so that it gathers twice where the formula says three times.
    """
    lowest, highest = {"vocabulary": (0.6, 0.75), "full": (0.75, 0.85)}.get(case, (0.95, 1.1))
    measured = measure(case, MeshConfig(data=2, fsdp=True), unroll=1)
    assert lowest < measured.traffic < highest
