"""Models of karpathy/llama2.c in its legacy format (v0): seven sizes, then float32 weights, one
kind after another.

The weights are named as Llama's, so that Llama's table lays them out. The one difference is rotary
positions: llama2.c rotates neighbouring features of a head, we rotate feature i with i + half, so
rows of its query and key maps are put in that order; products of queries and keys don't see the
difference. Layout: llama2.c, `memory_map_weights` in run.c.
"""

import dataclasses
import math
import pathlib

import numpy as np

from tinylm.core.errors import UserError
from tinylm.interop.tensor_files import Tensors
from tinylm.model.config import ModelConfig

_SIZES = 7
_NEW_MAGIC = 0x616B3432


@dataclasses.dataclass(frozen=True)
class _Header:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int  # negative where the output matrix is its own
    seq_len: int


def open_llama2c(path: pathlib.Path) -> tuple[ModelConfig, Tensors]:
    """Return the resolved model settings and the memory-mapped weights by Llama's names."""
    header = _read_header(path)
    h, kv_dim, vocab = header, header.dim // header.heads * header.kv_heads, abs(header.vocab)
    config = ModelConfig(
        vocab_size=vocab,
        context=h.seq_len,
        embed_dim=h.dim,
        num_layers=h.layers,
        num_heads=h.heads,
        num_kv_heads=h.kv_heads,
        mlp_dim=h.hidden,
        position="rotary",
        norm="rmsnorm",
        norm_epsilon=1e-5,
        mlp="swiglu",
        tie_embeddings=h.vocab > 0,
    )
    config = config.resolve(vocab, h.seq_len)
    config.check()
    parts = {
        "embed_tokens": (vocab, h.dim),
        "input_layernorm": (h.layers, h.dim),
        "self_attn.q_proj": (h.layers, h.dim, h.dim),
        "self_attn.k_proj": (h.layers, kv_dim, h.dim),
        "self_attn.v_proj": (h.layers, kv_dim, h.dim),
        "self_attn.o_proj": (h.layers, h.dim, h.dim),
        "post_attention_layernorm": (h.layers, h.dim),
        "mlp.gate_proj": (h.layers, h.hidden, h.dim),
        "mlp.down_proj": (h.layers, h.dim, h.hidden),
        "mlp.up_proj": (h.layers, h.hidden, h.dim),
        "norm": (h.dim,),
        "rotary tables": (2, h.seq_len, config.head_dim // 2),
        "lm_head": (0 if h.vocab > 0 else vocab, h.dim),
    }
    return config, _named(_cut(path, parts), header)


def _read_header(path: pathlib.Path) -> _Header:
    try:
        with path.open("rb") as file:
            start = file.read(4 * _SIZES)
    except OSError as error:
        raise UserError(f"--from_llama2c={path} can't be read: {error.strerror}.") from error
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle of PyTorch, which can run any code when read; export it to a .bin "
            "first."
        )
    if len(start) < 4 * _SIZES:
        raise UserError(f"{path} is too short for a model of llama2.c.")
    numbers = np.frombuffer(start, "<i4").tolist()
    if numbers[0] == _NEW_MAGIC:
        raise UserError(
            f"{path} has llama2.c's newer format; tinylm reads the legacy one (export.py --version "
            "0)."
        )
    header = _Header(*numbers)
    sizes_are_sane = all(0 < n < 1 << 24 for n in (*numbers[:5], abs(header.vocab), header.seq_len))
    if not sizes_are_sane or header.dim % header.heads or header.heads % header.kv_heads:
        raise UserError(f"{path} is no model of llama2.c: its sizes would be {numbers}.")
    return header


def _cut(path: pathlib.Path, parts: dict[str, tuple[int, ...]]) -> Tensors:
    """Return each part as a view of the file, which must hold exactly these."""
    expected = 4 * (_SIZES + sum(map(math.prod, parts.values())))
    if path.stat().st_size != expected:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes; its sizes ask for {expected:,}: cut short "
            "or altered."
        )
    numbers, views, end = np.memmap(path, "<f4", mode="r", offset=4 * _SIZES), {}, 0
    for name, shape in parts.items():
        begin, end = end, end + math.prod(shape)
        views[name] = numbers[begin:end].reshape(shape)
    return views


def _named(parts: Tensors, header: _Header) -> Tensors:
    """Give the parts of each layer Llama's names."""
    named = {"model.embed_tokens.weight": parts["embed_tokens"], "model.norm.weight": parts["norm"]}
    if header.vocab < 0:
        named["lm_head.weight"] = parts["lm_head"]
    for name, part in parts.items():
        heads = {"self_attn.q_proj": header.heads, "self_attn.k_proj": header.kv_heads}.get(name)
        if name in ("embed_tokens", "norm", "rotary tables", "lm_head"):
            continue
        for layer, weight in enumerate(part):
            named[f"model.layers.{layer}.{name}.weight"] = (
                halves(weight, heads) if heads else weight
            )
    return named


def halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows [num_heads * H, D] from neighbouring rotary pairs (2i, 2i+1) to pairs of halves
    (i, i + H/2).
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
