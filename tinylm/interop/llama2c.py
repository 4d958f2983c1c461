"""Models of karpathy/llama2.c in its legacy format (v0).

A file is seven sizes and then float32 weights, one kind after another, each for all layers. The
weights get Llama's names here, so that Llama's table lays them out.

The one difference to Llama is in the rotary positions. Llama2.c rotates neighbouring features of a
head, and we rotate feature i with feature i + half. So rows of its query and key maps are put in
that order; as both are, the products of queries and keys stay what they were:

    theirs   0a 0b 1a 1b 2a 2b 3a 3b     a head of 8 features, of which ia and ib rotate together
    ours     0a 1a 2a 3a 0b 1b 2b 3b

Layout: llama2.c, `memory_map_weights` in run.c.
"""

import dataclasses
import math
import pathlib

import numpy as np

from tinylm.core.errors import UserError
from tinylm.interop.tensor_files import Tensors
from tinylm.model.config import ModelConfig

_NUM_SIZES = 7
# The newer formats begin with this number, "ak42".
_NEW_MAGIC = 0x616B3432
# A size of this many, or more, is not a model's.
_SIZE_LIMIT = 1 << 24


@dataclasses.dataclass(frozen=True)
class _Header:
    """The sizes at the beginning of a file, in its order."""

    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    # Negative where the output matrix is not that of the embedding.
    signed_vocab: int
    context: int

    @property
    def vocab_size(self) -> int:
        return abs(self.signed_vocab)

    @property
    def is_tied(self) -> bool:
        return self.signed_vocab > 0


def open_llama2c(path: pathlib.Path) -> tuple[ModelConfig, Tensors]:
    """Return the resolved model settings and the memory-mapped weights by Llama's names.

    Raises UserError for a file that can't be read, or is not such a model.
    """
    header = _read_header(path)
    config = ModelConfig(
        vocab_size=header.vocab_size,
        context=header.context,
        embed_dim=header.embed_dim,
        num_layers=header.num_layers,
        num_heads=header.num_heads,
        num_kv_heads=header.num_kv_heads,
        mlp_dim=header.mlp_dim,
        position="rotary",
        norm="rmsnorm",
        norm_epsilon=1e-5,
        mlp="swiglu",
        tie_embeddings=header.is_tied,
    )
    config = config.resolve(header.vocab_size, header.context)
    config.check()
    return config, _with_llama_names(_cut(path, header), header)


def _read_header(path: pathlib.Path) -> _Header:
    try:
        with path.open("rb") as file:
            start = file.read(4 * _NUM_SIZES)
    except OSError as error:
        raise UserError(f"--from_llama2c={path} can't be read: {error.strerror}.") from error
    # A zip file (as torch.save makes) or a pickle.
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle of PyTorch, which can run any code when read; export it to a .bin "
            "first."
        )
    if len(start) < 4 * _NUM_SIZES:
        raise UserError(f"{path} is too short for a model of llama2.c.")
    numbers = np.frombuffer(start, "<i4").tolist()
    if numbers[0] == _NEW_MAGIC:
        raise UserError(
            f"{path} has llama2.c's newer format; tinylm reads the legacy one (export.py --version "
            "0)."
        )
    header = _Header(*numbers)
    sizes = dataclasses.replace(header, signed_vocab=header.vocab_size)
    sizes_are_sane = all(0 < n < _SIZE_LIMIT for n in dataclasses.astuple(sizes))
    if (
        not sizes_are_sane
        or header.embed_dim % header.num_heads != 0
        or header.num_heads % header.num_kv_heads != 0
    ):
        raise UserError(f"{path} is not a model of llama2.c: its sizes would be {numbers}.")
    return header


def _cut(path: pathlib.Path, header: _Header) -> Tensors:
    """Return each kind of weights as a view of the file, which must hold exactly these."""
    layers = header.num_layers
    embed = header.embed_dim
    head_dim = embed // header.num_heads
    kv_dim = head_dim * header.num_kv_heads
    # Matrices are [outputs, inputs], as Llama's.
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (header.vocab_size, embed),
        "input_layernorm": (layers, embed),
        "self_attn.q_proj": (layers, embed, embed),
        "self_attn.k_proj": (layers, kv_dim, embed),
        "self_attn.v_proj": (layers, kv_dim, embed),
        "self_attn.o_proj": (layers, embed, embed),
        "post_attention_layernorm": (layers, embed),
        "mlp.gate_proj": (layers, header.mlp_dim, embed),
        "mlp.down_proj": (layers, embed, header.mlp_dim),
        "mlp.up_proj": (layers, header.mlp_dim, embed),
        "norm": (embed,),
        "rotary tables": (2, header.context, head_dim // 2),
    }
    if not header.is_tied:
        shapes["lm_head"] = (header.vocab_size, embed)

    expected = 4 * (_NUM_SIZES + sum(math.prod(shape) for shape in shapes.values()))
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path} has {found:,} bytes; its sizes ask for {expected:,}: cut short or altered."
        )
    numbers = np.memmap(path, "<f4", mode="r", offset=4 * _NUM_SIZES)
    parts = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape)
        parts[name] = numbers[begin:end].reshape(shape)
        begin = end
    return parts


def _with_llama_names(parts: Tensors, header: _Header) -> Tensors:
    """Give the weights Llama's names, those of each layer one for each, without rotary tables."""
    named = {}
    for name, part in parts.items():
        if name == "rotary tables":
            continue
        if name == "lm_head":
            named["lm_head.weight"] = part
            continue
        if name in ("embed_tokens", "norm"):
            named[f"model.{name}.weight"] = part
            continue
        for layer, weight in enumerate(part):
            if name == "self_attn.q_proj":
                weight = halves(weight, header.num_heads)
            elif name == "self_attn.k_proj":
                weight = halves(weight, header.num_kv_heads)
            named[f"model.layers.{layer}.{name}.weight"] = weight
    return named


def halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head from neighbouring rotary pairs to pairs of halves.

    Args:
      weight: [num_heads * head_dim, embed], where rows 2i and 2i + 1 of a head rotate together.
      num_heads: how many heads it makes.

    Returns:
      The same shape, where rows i and i + head_dim / 2 of a head rotate together.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
