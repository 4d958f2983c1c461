"""The model section of the config: one decoder-only transformer whose options cover the families we train.

GPT-2, GPT-Neo, GPT-NeoX and Llama differ in a dozen choices (position, norm, mlp, biases, windows). Each choice is a
setting here, read once when the block is built, so the forward pass has no family in it.
"""

import dataclasses

from tinylm.core.errors import UserError
from tinylm.core.settings import setting

VOCAB_MULTIPLE = 128

_CHOICES = {
    "position": ("rotary", "learned", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "gelu_exact", "relu2", "swiglu", "geglu"),
    "compute_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "xla", "cudnn", "splash"),
}


@dataclasses.dataclass
class ModelConfig:
    """Sizes and options of the transformer. Sizes that are 0 follow from the others (see `resolve`)."""

    vocab_size: int = setting(0, "tokens the model knows (0: the tokenizer's)")
    context: int = setting(0, "longest sequence of tokens (0: data.seq_len)")
    embed_dim: int = setting(128, "width of the residual stream")
    num_layers: int = setting(4, "number of blocks")
    num_heads: int = setting(4, "query heads of a block")
    num_kv_heads: int = setting(0, "key and value heads (0: num_heads; fewer: grouped queries)")
    head_dim: int = setting(0, "size of a head (0: embed_dim / num_heads)")
    mlp_dim: int = setting(0, "hidden width of the mlp (0: 4 x embed_dim)")
    position: str = setting("rotary", "how positions enter: rotary, learned or none")
    rotary_fraction: float = setting(1.0, "part of each head that rotates (GPT-NeoX: 0.25)")
    rotary_base: float = setting(10_000.0, "wavelength base of rotary positions")
    norm: str = setting("rmsnorm", "layernorm or rmsnorm")
    norm_epsilon: float = setting(1e-5, "added to the variance in norms")
    qk_norm: bool = setting(False, "normalize queries and keys (parameter-free RMS) before attention")
    mlp: str = setting("gelu", "activation: gelu (tanh form), gelu_exact, relu2, or the gated swiglu, geglu")
    conv_taps: int = setting(0, "taps of a short causal convolution before attention and mlp (0: none; Canon: 4)")
    bias: bool = setting(False, "biases in norms, mlp and attention output")
    qkv_bias: bool = setting(False, "biases in query, key and value projections")
    parallel_residual: bool = setting(False, "attention and mlp read the same input (GPT-NeoX)")
    attention_window: tuple[int, ...] = setting((0,), "window of each layer in turn, repeated; 0: all earlier tokens")
    local_heads: int = setting(0, "heads that see the window, the others see all (0: all heads)")
    attention_scale: float = setting(0.0, "factor on query-key products (0: 1/sqrt(head_dim); GPT-Neo: 1)")
    attention_softcap: float = setting(0.0, "soft limit on attention logits (0: none)")
    logit_softcap: float = setting(0.0, "soft limit on output logits (0: none)")
    embed_scale: float = setting(1.0, "factor on the token embeddings")
    residual_scale: float = setting(1.0, "factor on what each block adds to the residual stream")
    tie_embeddings: bool = setting(True, "output matrix = embedding matrix")
    init_std: float = setting(0.02, "standard deviation of initial weights; outputs of a block: / sqrt(2 num_layers)")
    dropout: float = setting(0.0, "probability of dropping, in embedding, attention and residual")
    compute_dtype: str = setting("float32", "float32 or bfloat16; weights stay float32")
    z_loss: float = setting(0.0, "weight of the squared log normalizer in the trained loss (PaLM, section 5: 1e-4)")
    attention: str = setting("auto", "attention kernel: auto (by platform), xla, cudnn (GPU), splash (TPU)", free=True)
    loss_chunks: int = setting(1, "pieces of a sequence whose logits are made one at a time, to save memory", free=True)
    remat: str = setting("none", "recompute in the backward pass: none, dots (all but matmuls), full", free=True)
    unroll: int = setting(1, "layers per iteration of the scan (0: all)", free=True)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up, the same on every mesh, so that the state is too."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def resolve(self, vocab_size: int, seq_len: int) -> None:
        """Write numbers over every size that was left 0."""
        self.vocab_size = self.vocab_size or vocab_size
        self.context = self.context or seq_len
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.embed_dim // self.num_heads
        self.mlp_dim = self.mlp_dim or 4 * self.embed_dim
        self.attention_scale = self.attention_scale or self.head_dim**-0.5

    def check(self) -> None:
        """Raise UserError for sizes and options that can't be built."""
        for name in ("embed_dim", "num_layers", "num_heads", "loss_chunks"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        for name in (
            "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "context", "unroll", "init_std", "z_loss", "conv_taps",
            "norm_epsilon", "attention_scale", "attention_softcap", "logit_softcap",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 0.")
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f"model.rotary_fraction={self.rotary_fraction} must be above 0 and at most 1.")
        if not self.rotary_base > 0:
            raise UserError(f"model.rotary_base={self.rotary_base} must be above 0.")
        self._check_heads()
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1.")
        if not self.attention_window or any(not isinstance(w, int) or w < 0 for w in self.attention_window):
            raise UserError(f"model.attention_window={self.attention_window} must hold sizes of 0 or more.")
        if self.num_layers % len(self.attention_window):
            raise UserError(
                f"model.num_layers={self.num_layers} must be divisible by the {len(self.attention_window)} entries of "
                "model.attention_window."
            )

    def _check_heads(self) -> None:
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise UserError(
                f"model.embed_dim={self.embed_dim} must be divisible by model.num_heads={self.num_heads}; "
                "change one of them or set model.head_dim."
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} must be divisible by model.num_kv_heads={self.num_kv_heads}."
            )
        if not 0 <= self.local_heads <= self.num_heads:
            raise UserError(f"model.local_heads={self.local_heads} must be between 0 and {self.num_heads} (num_heads).")
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        if self.position == "rotary" and int(head_dim * self.rotary_fraction) % 2:
            raise UserError(f"the rotating part of a head ({head_dim} x model.rotary_fraction) must be even.")
