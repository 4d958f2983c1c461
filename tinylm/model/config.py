"""The model section of the config: one decoder-only transformer whose options cover the families we
train.

GPT-2, GPT-Neo, GPT-NeoX and Llama differ in a dozen choices (position, norm, mlp, biases, windows).
Each choice is a setting here, read once when the block is built, so the forward pass has no family
in it.
"""

import dataclasses
import math

from tinylm.core.errors import UserError
from tinylm.core.settings import Section, setting

VOCAB_MULTIPLE = 128
# The widest head that cuDNN's flash attention takes on every GPU that has it.
CUDNN_MOST_HEAD_DIM = 128
# The settings of how rotary positions stretch, each with the scalings that it is for.
SCALINGS_WITH = {
    "rotary_factor": ("linear", "llama3", "yarn"),
    "rotary_original_context": ("llama3", "yarn"),
    "rotary_slow_turns": ("llama3", "yarn"),
    "rotary_fast_turns": ("llama3", "yarn"),
    "rotary_attention_factor": ("yarn",),
}

# What decides how a model is trained, and not what its weights mean.
TRAINING_SETTINGS = (
    "dropout",
    "init_std",
    "compute_dtype",
    "z_loss",
    "router_balance_loss",
    "router_z_loss",
)
# What means nothing without model.num_experts.
EXPERT_SETTINGS = (
    "experts_per_token",
    "shared_experts",
    "expert_dim",
    "dense_layers",
    "router",
    "router_normalize",
    "router_bias_rate",
    "router_balance_loss",
    "router_z_loss",
)


@dataclasses.dataclass
class ModelConfig(Section, name="model"):
    """Sizes and options of the transformer. Sizes that are 0 follow from the others (see
    `resolve`).
    """

    vocab_size: int = setting(0, "tokens the model knows (0: the tokenizer's)", least=0)
    context: int = setting(
        0,
        "longest sequence of tokens (0: data.seq_len)",
        least=0,
        below=2**31,
        aliases=("max_position_embeddings", "n_positions", "n_ctx"),
    )
    embed_dim: int = setting(
        128,
        "width of the residual stream",
        least=1,
        aliases=("n_embd", "hidden_size", "d_model", "dim", "emb_dim", "base_emb_dim", "model_dim"),
    )
    num_layers: int = setting(
        4,
        "number of blocks",
        least=1,
        aliases=("n_layer", "n_layers", "num_hidden_layers", "base_num_decoder_layers", "depth"),
    )
    num_heads: int = setting(
        4,
        "query heads of a block",
        least=1,
        aliases=("n_head", "n_heads", "num_attention_heads", "base_num_query_heads"),
    )
    num_kv_heads: int = setting(
        0,
        "key and value heads (0: num_heads; fewer: grouped queries)",
        least=0,
        aliases=("n_kv_head", "n_kv_heads", "num_key_value_heads", "base_num_kv_heads"),
    )
    head_dim: int = setting(0, "size of a head (0: embed_dim / num_heads)", least=0)
    mlp_dim: int = setting(
        0,
        "hidden width of the mlp (0: 4 x embed_dim)",
        least=0,
        aliases=("n_inner", "intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "base_mlp_dim"),
    )
    position: str = setting(
        "rotary",
        "how positions enter: rotary, learned or none",
        choices=("rotary", "learned", "none"),
        aliases=("position_embedding_type",),
    )
    rotary_fraction: float = setting(
        1.0,
        "part of each head that rotates (GPT-NeoX: 0.25)",
        above=0,
        most=1,
        aliases=("rotary_pct", "partial_rotary_factor"),
    )
    rotary_base: float = setting(
        10_000.0,
        "wavelength base of rotary positions",
        above=0,
        aliases=("rope_theta", "rotary_emb_base", "rope_max_timescale"),
    )
    rotary_scaling: str = setting(
        "none",
        "how rotary positions stretch over longer texts: none, linear, llama3 or yarn",
        choices=("none", "linear", "llama3", "yarn"),
        aliases=("rope_scaling", "rope_type", "rope_parameters"),
    )
    rotary_factor: float = setting(
        1.0,
        "how many times longer texts become by rotary_scaling",
        least=1,
        aliases=("rope_factor", "rope_scaling_factor"),
    )
    rotary_original_context: int = setting(
        0,
        "context before llama3 or yarn stretched it (0: context / rotary_factor)",
        least=0,
        aliases=("original_max_position_embeddings",),
    )
    rotary_slow_turns: float = setting(
        1.0,
        "llama3, yarn: pairs with fewer turns in the original context are stretched whole",
        above=0,
        aliases=("low_freq_factor", "beta_slow"),
    )
    rotary_fast_turns: float = setting(
        0.0,
        "llama3, yarn: pairs with more turns there are left alone (0: 4 for llama3, 32 for yarn)",
        least=0,
        aliases=("high_freq_factor", "beta_fast"),
    )
    rotary_attention_factor: float = setting(
        0.0,
        "yarn: factor on rotated queries and keys (0: 1 + 0.1 ln rotary_factor)",
        least=0,
        aliases=("attention_factor", "mscale", "rope_mscale"),
    )
    norm: str = setting("rmsnorm", "layernorm or rmsnorm", choices=("layernorm", "rmsnorm"))
    norm_epsilon: float = setting(
        1e-5,
        "added to the variance in norms",
        least=0,
        aliases=(
            "rms_norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "normalization_layer_epsilon",
            "norm_eps",
        ),
    )
    qk_norm: bool = setting(
        False,
        "normalize queries and keys (RMS) before attention",
        aliases=("use_qk_norm",),
    )
    qk_norm_scale: str = setting(
        "none",
        "learned scales of qk_norm: none, head (one set for all heads, as Qwen3), or all (the "
        "heads are normalized together, as OLMoE)",
        choices=("none", "head", "all"),
    )
    mlp: str = setting(
        "gelu",
        "activation: gelu (tanh form), gelu_exact, relu2, or the gated swiglu, geglu",
        choices=("gelu", "gelu_exact", "relu2", "swiglu", "geglu"),
        aliases=("hidden_act", "activation_function", "mlp_activations"),
    )
    num_experts: int = setting(
        0,
        "mlps of a layer, of which a router picks some for each token (0: one mlp for all)",
        least=0,
        aliases=(
            "num_local_experts",
            "n_routed_experts",
            "num_routed_experts",
            "moe_num_experts",
            "num_moe_experts",
        ),
    )
    experts_per_token: int = setting(
        2,
        "experts that a token is sent to",
        least=1,
        aliases=("num_experts_per_tok", "moe_top_k", "moe_router_topk", "router_top_k"),
    )
    shared_experts: int = setting(
        0,
        "experts that every token is sent to as well, as one mlp of their width together",
        least=0,
        aliases=("n_shared_experts", "num_shared_experts"),
    )
    expert_dim: int = setting(
        0,
        "hidden width of an expert (0: mlp_dim)",
        least=0,
        aliases=("moe_intermediate_size", "moe_ffn_hidden_size", "base_moe_mlp_dim"),
    )
    dense_layers: int = setting(
        0,
        "first layers that keep one mlp for all tokens",
        least=0,
        aliases=("first_k_dense_replace", "first_num_dense_layers"),
    )
    router: str = setting(
        "softmax",
        "how logits become scores, in float32: softmax over all experts, or sigmoid of each",
        choices=("softmax", "sigmoid"),
        aliases=("scoring_func", "routed_score_func", "moe_router_score_function"),
    )
    router_normalize: bool = setting(
        True,
        "scale the scores of a token's experts so that they sum to 1",
        aliases=("norm_topk_prob",),
    )
    router_bias_rate: float = setting(
        0.001,
        "change a step of a bias that evens out the load of the experts (0: no bias)",
        least=0,
        aliases=("routed_bias_update_rate", "moe_router_bias_update_rate"),
    )
    router_balance_loss: float = setting(
        0.0,
        "weight of a loss that evens out the load of the experts (0: none)",
        least=0,
        aliases=(
            "router_aux_loss_coef",
            "aux_loss_alpha",
            "load_balance_loss_weight",
            "moe_aux_loss_coeff",
        ),
    )
    router_z_loss: float = setting(
        0.0,
        "weight of the squared log normalizer of the router's logits (ST-MoE: 1e-3)",
        least=0,
        aliases=("router_z_loss_coef", "moe_z_loss_coeff"),
    )
    expert_parallel: bool = setting(
        False,
        "send tokens to the devices that have their experts, rather than gather the experts (with "
        "mesh.fsdp, which splits them)",
        free=True,
        aliases=(
            "expert_parallel_size",
            "expert_model_parallel_size",
            "ici_expert_parallelism",
            "expert_parallel_degree",
        ),
    )
    # A convolution of one tap would only scale its input.
    conv_taps: int = setting(
        0,
        "taps of a short causal convolution before attention and mlp (0: none; Canon: 4)",
        least=2,
        also=(0,),
    )
    bias: bool = setting(False, "biases in norms, mlp and attention output")
    qkv_bias: bool = setting(
        False,
        "biases in query, key and value projections",
        aliases=("attention_bias", "use_qkv_bias"),
    )
    mlp_bias: bool = setting(
        True, "with bias: in the mlp too (Llama's attention_bias alone: False)"
    )
    out_bias: bool = setting(
        True, "with bias: in the attention output too (Llama's mlp_bias alone: False)"
    )
    parallel_residual: bool = setting(
        False,
        "attention and mlp read the same input (GPT-NeoX)",
        aliases=("use_parallel_residual",),
    )
    attention_window: tuple[int, ...] = setting(
        (0,),
        "window of each layer in turn, repeated; 0: all earlier tokens",
        least=0,
        aliases=("sliding_window", "window_size", "sliding_window_size", "attention_layers"),
    )
    local_heads: int = setting(
        0, "heads that see the window, the others see all (0: all heads)", least=0
    )
    attention_scale: float = setting(
        0.0,
        "factor on query-key products (0: 1/sqrt(head_dim); GPT-Neo: 1)",
        least=0,
        aliases=("query_pre_attn_scalar",),
    )
    # Logits are divided by a soft limit, so one that float32 rounds to 0 gives NaN.
    attention_softcap: float = setting(
        0.0,
        "soft limit on attention logits (0: none)",
        least=1e-6,
        also=(0,),
        aliases=("attn_logit_softcapping", "attn_logits_soft_cap"),
    )
    logit_softcap: float = setting(
        0.0,
        "soft limit on output logits (0: none)",
        least=1e-6,
        also=(0,),
        aliases=("final_logit_softcapping", "final_logits_soft_cap"),
    )
    embed_scale: float = setting(1.0, "factor on the token embeddings")
    residual_scale: float = setting(1.0, "factor on what each block adds to the residual stream")
    tie_embeddings: bool = setting(
        True,
        "output matrix = embedding matrix",
        aliases=("tie_word_embeddings", "logits_via_embedding"),
    )
    init_std: float = setting(
        0.02,
        "standard deviation of initial weights; outputs of a block: / sqrt(2 num_layers)",
        least=0,
        aliases=("initializer_range",),
    )
    dropout: float = setting(
        0.0,
        "probability of dropping, in embedding, attention and residual",
        least=0,
        most=0.99,
        aliases=("dropout_rate", "attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"),
    )
    compute_dtype: str = setting(
        "float32",
        "float32 or bfloat16; weights stay float32",
        choices=("float32", "bfloat16"),
        aliases=("dtype", "torch_dtype", "bf16", "mixed_precision"),
    )
    z_loss: float = setting(
        0.0,
        "weight of the squared log normalizer in the trained loss (PaLM, section 5: 1e-4)",
        least=0,
        aliases=("z_loss_multiplier", "z_loss_weight"),
    )
    attention: str = setting(
        "auto",
        "attention kernel: auto (by platform), xla, cudnn (GPU), splash (TPU)",
        free=True,
        choices=("auto", "xla", "cudnn", "splash"),
        aliases=("attn_implementation", "attention_kernel"),
    )
    context_attention: str = setting(
        "auto",
        "attention where mesh.context splits rows: ring, gather, or auto (the cheaper one)",
        free=True,
        choices=("auto", "ring", "gather"),
        aliases=("context_parallel_strategy", "context_parallel_rotate_method", "cp_comm_type"),
    )
    loss_chunks: int = setting(
        1,
        "pieces of a sequence whose logits are made one at a time, to save memory",
        free=True,
        least=1,
        aliases=("num_vocab_tiling",),
    )
    remat: str = setting(
        "none",
        "recompute in the backward pass: none, dots (all but matmuls), full",
        free=True,
        choices=("none", "dots", "full"),
        aliases=("gradient_checkpointing", "remat_policy", "activation_checkpointing"),
    )
    unroll: int = setting(
        1, "layers per iteration of the scan (0: all)", free=True, least=0, aliases=("scan_layers",)
    )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up, the same on every mesh, so that the state
        is too.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def compute_bytes(self) -> int:
        """The bytes of one number in the compute type."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def vocab_numbers(self) -> int:
        """The numbers of embedding and output matrix."""
        num_matrices = 1 if self.tie_embeddings else 2
        return num_matrices * self.padded_vocab * self.embed_dim

    @property
    def num_expert_layers(self) -> int:
        """The layers that have experts."""
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @property
    def output_std(self) -> float:
        """The std of initial maps that write to the residual stream (Radford et al. 2019, 2.3)."""
        return self.init_std / (2 * self.num_layers) ** 0.5

    @property
    def is_resolved(self) -> bool:
        """Whether every size is a number, so that a model can be built."""
        sizes = [self.vocab_size, self.context, self.num_kv_heads, self.head_dim, self.mlp_dim]
        if self.num_experts:
            sizes.append(self.expert_dim)
        return all(sizes) and self.attention_scale > 0

    def resolve(self, vocab_size: int, seq_len: int) -> "ModelConfig":
        """Return a frozen copy in which every size that was left 0 is a number."""
        resolved = self.editable_copy()
        resolved.vocab_size = self.vocab_size or vocab_size
        resolved.context = self.context or seq_len
        resolved.num_kv_heads = self.num_kv_heads or self.num_heads
        resolved.head_dim = self.head_dim or self.embed_dim // self.num_heads
        resolved.mlp_dim = self.mlp_dim or 4 * self.embed_dim
        if self.num_experts:
            resolved.expert_dim = self.expert_dim or resolved.mlp_dim
        resolved.attention_scale = self.attention_scale or resolved.head_dim**-0.5
        if self.rotary_scaling in ("llama3", "yarn"):
            original = max(round(resolved.context / self.rotary_factor), 1)
            usual_turns = 4.0 if self.rotary_scaling == "llama3" else 32.0
            resolved.rotary_original_context = self.rotary_original_context or original
            resolved.rotary_fast_turns = self.rotary_fast_turns or usual_turns
        if self.rotary_scaling == "yarn":
            usual_factor = 1 + 0.1 * math.log(self.rotary_factor)
            resolved.rotary_attention_factor = self.rotary_attention_factor or usual_factor
        resolved.freeze()
        return resolved

    def check(self) -> None:
        """Raise UserError for sizes and options that can't be built."""
        super().check()
        self._check_heads()
        self._check_rotary()
        self._check_kernel()
        self._check_experts()
        if not self.attention_window:
            raise UserError(
                "model.attention_window=() must hold at least one size; (0,) means no window."
            )
        if self.num_layers % len(self.attention_window):
            raise UserError(
                f"model.num_layers={self.num_layers} must be divisible by the "
                f"{len(self.attention_window)} entries of model.attention_window."
            )

    def _check_heads(self) -> None:
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise UserError(
                f"model.embed_dim={self.embed_dim} must be divisible by "
                f"model.num_heads={self.num_heads}; change one of them or set model.head_dim."
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} must be divisible by "
                f"model.num_kv_heads={self.num_kv_heads}."
            )
        if self.qk_norm_scale != "none" and not self.qk_norm:
            raise UserError(f"model.qk_norm_scale={self.qk_norm_scale} needs model.qk_norm=True.")
        if self.local_heads > self.num_heads:
            raise UserError(
                f"model.local_heads={self.local_heads} must be at most "
                f"model.num_heads={self.num_heads}."
            )
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        rotating = int(head_dim * self.rotary_fraction)
        if self.position == "rotary" and (rotating % 2 or not rotating):
            raise UserError(
                f"the rotating part of a head, {rotating} of {head_dim} by "
                f"model.rotary_fraction={self.rotary_fraction}, must be even and at least 2."
            )

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} must be at most "
                f"model.num_experts={self.num_experts}."
            )
        if self.dense_layers >= self.num_layers:
            raise UserError(
                f"model.dense_layers={self.dense_layers} must be below "
                f"model.num_layers={self.num_layers}, or no layer has experts; set "
                "model.num_experts=0 for such a model."
            )
        # Each kind of layer is a scan of its own over the period of the windows.
        if self.attention_window and self.dense_layers % len(self.attention_window):
            raise UserError(
                f"model.dense_layers={self.dense_layers} must be divisible by the "
                f"{len(self.attention_window)} entries of model.attention_window."
            )
        if self.bias and self.mlp_bias:
            raise UserError(
                "model.num_experts has no biases in its mlps; set model.mlp_bias=False, or "
                "model.bias=False."
            )

    def _check_rotary(self) -> None:
        """Raise UserError for scalings of rotary positions that can't be, or change nothing."""
        scaling = self.rotary_scaling
        if scaling != "none" and self.position != "rotary":
            raise UserError(
                f"model.rotary_scaling={scaling} needs model.position=rotary (here "
                f"{self.position})."
            )
        for name, kinds in SCALINGS_WITH.items():
            if scaling not in kinds:
                self.refuse(
                    [name],
                    f"is for model.rotary_scaling={' or '.join(kinds)} (here {scaling}); leave it "
                    "out, or change the scaling.",
                )
        if scaling == "yarn" and self.rotary_base <= 1:
            raise UserError(
                f"model.rotary_scaling=yarn needs a model.rotary_base above 1 (here "
                f"{self.rotary_base})."
            )
        if self.rotary_fast_turns and self.rotary_fast_turns <= self.rotary_slow_turns:
            raise UserError(
                f"model.rotary_fast_turns={self.rotary_fast_turns} must be above "
                f"model.rotary_slow_turns={self.rotary_slow_turns}."
            )

    def _check_kernel(self) -> None:
        """Raise UserError for an attention kernel that could not compute this model's attention."""
        kernel, head_dim = self.attention, self.head_dim or self.embed_dim // self.num_heads
        misfits = []
        if kernel == "cudnn" and self.compute_dtype != "bfloat16":
            misfits.append(f"model.compute_dtype=bfloat16 (here {self.compute_dtype})")
        if kernel == "cudnn" and (head_dim % 8 or head_dim > CUDNN_MOST_HEAD_DIM):
            misfits.append(
                f"a head size of at most {CUDNN_MOST_HEAD_DIM} that 8 divides (model.head_dim, "
                f"here {head_dim})"
            )
        if kernel == "cudnn" and self.attention_softcap:
            misfits.append(f"model.attention_softcap=0 (here {self.attention_softcap})")
        if kernel in ("cudnn", "splash") and self.dropout:
            misfits.append(f"model.dropout=0 (here {self.dropout})")
        if kernel in ("cudnn", "splash") and self.local_heads and any(self.attention_window):
            misfits.append(f"model.local_heads=0 (here {self.local_heads})")
        if misfits:
            raise UserError(
                f"model.attention={kernel} needs {' and '.join(misfits)}; or set "
                "model.attention=auto."
            )
