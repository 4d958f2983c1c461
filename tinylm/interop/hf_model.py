"""A model of Hugging Face in its folder: settings, tensors and tokenizer, checked together.

Nothing is built here. The header of the weights says what is there, so sizes of a config.json are
compared with it before anything grows with them: 250 bytes can ask for 100 million layers. Where
the file and its config.json disagree about a tied output matrix, the file counts, as it does in
transformers (`tie_weights`).
"""

import collections
import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.core.settings import nearest
from tinylm.data.tokenizers import Tokenizer
from tinylm.interop import weights
from tinylm.interop.families import FAMILIES, Family
from tinylm.interop.family_configs import RELATIVES, first_of
from tinylm.interop.tensor_files import Tensors, open_folder, read_json, unread_files
from tinylm.interop.tokenizer_files import check_vocabulary, find_tokenizer
from tinylm.model.config import ModelConfig

# Rows of two matrices that are compared at a time.
_ROWS = 4096


class ReadModel(NamedTuple):
    """What config.json and the weights of a folder say together.

    Attributes:
      family: of the model.
      model: its settings, resolved.
      tensors: by the names of the family's table, memory-mapped.
      left_out: a line for each kind of tensor or file that is not read: names, and why.
    """

    family: Family
    model: ModelConfig
    tensors: Tensors
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """An opened folder.

    Attributes:
      family, model, tensors, left_out: as in `ReadModel`.
      tokenizer: of its texts.
      start_id: the token that a text begins with.
      end_ids: the tokens that end a text, besides the tokenizer's own end.
    """

    family: Family
    model: ModelConfig
    tensors: Tensors
    left_out: tuple[str, ...]
    tokenizer: Tokenizer
    start_id: int
    end_ids: tuple[int, ...]

    def params(self, mesh: Mesh, fsdp: bool) -> dict:
        """Return our parameters, laid out on `mesh`."""
        return weights.import_params(self.tensors, self.family, self.model, mesh, fsdp)


def open_hf(folder: str, setting: str, tokenizer: str = "") -> HfModel:
    """Open a local folder.

    Args:
      folder: with config.json and model.safetensors.
      setting: the flag or setting that named it, for errors.
      tokenizer: a file, where the folder has none.

    Raises:
      UserError: for what is missing, doesn't fit together, or no setting of ours expresses.
    """
    place = pathlib.Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(
            f"{setting} is not a folder; download the model first (tinylm fetches nothing by "
            "itself)."
        )
    read = read_model(place)
    vocab_size = read.model.vocab_size
    config = read_json(place / "config.json")
    ends = _special_ids(config, "eos_token_id", vocab_size)
    # transformers stops at the ends of either file.
    if (place / "generation_config.json").exists():
        generation = read_json(place / "generation_config.json")
        ends += _special_ids(generation, "eos_token_id", vocab_size)
    found = find_tokenizer(place, tokenizer, ends[0] if ends else None)
    check_vocabulary(found, vocab_size)
    starts = _special_ids(config, "bos_token_id", found.vocab_size)
    # The model may have rows for more ids than the tokenizer has.
    more_ends = {end for end in ends if end < found.vocab_size} - {found.eot_id}
    return HfModel(
        family=read.family,
        model=read.model,
        tensors=read.tensors,
        left_out=read.left_out,
        tokenizer=found,
        start_id=starts[0] if starts else found.eot_id,
        end_ids=tuple(sorted(more_ends)),
    )


def _special_ids(config: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    """Return the ids below `vocab_size` that a JSON object has for `key`: one, or a list."""
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return [one for one in values if type(one) is int and 0 <= one < vocab_size]


def read_model(folder: pathlib.Path) -> ReadModel:
    """Read and check config.json and the weights of a folder."""
    config = read_json(folder / "config.json")
    family = _family_of(config)
    named = weights.with_family_names(open_folder(folder), family)
    tensors, left_out = _without_ignored(named, family)
    _check_numbers(tensors)
    _check_num_layers(config, family, tensors)
    model = read_settings(config, family)
    _check_largest(model, family, tensors)
    model, left_out_of_pair = _settle_output(tensors, family, model)
    lines = _grouped({**left_out, **left_out_of_pair})
    for name in unread_files(folder):
        lines.append(f"{name}: a file that transformers does not read")
    return ReadModel(family, model, tensors, tuple(lines))


def _without_ignored(tensors: Tensors, family: Family) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors that hold weights, and why each of the others is left out."""
    kept: Tensors = {}
    left_out: dict[str, str] = {}
    for name, tensor in tensors.items():
        reasons = [why for end, why in family.ignored.items() if name.endswith(end)]
        if reasons:
            left_out[name] = reasons[0]
        else:
            kept[name] = tensor
    return kept, left_out


def _check_numbers(tensors: Tensors) -> None:
    """Raise UserError for a tensor of a type that isn't read, which `open_file` gives as False."""
    for name, tensor in tensors.items():
        if tensor.dtype == bool:
            raise UserError(
                f"{name} holds no floating-point numbers (quantized?); tinylm reads F32, F16, BF16 "
                "and F64."
            )


def _family_of(config: dict[str, Any]) -> Family:
    """Return the family that a config.json names; raise UserError where we have none for it."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    line = f"config.json has model_type={kind!r}; tinylm reads {', '.join(FAMILIES)}"
    if isinstance(kind, str) and kind in RELATIVES:
        raise UserError(f"{line}, and has no setting for what {kind} adds: {RELATIVES[kind]}.")
    raise UserError(f"{line}{nearest(str(kind), FAMILIES)}.")


def read_settings(config: dict[str, Any], family: Family) -> ModelConfig:
    """Return the resolved and checked settings of a config.json.

    Raises UserError in the family's own words for its settings.
    """
    try:
        model = family.read_config(config)
        model.check()
    except UserError as error:
        fault = in_their_words(str(error), family)
        if fault.startswith("config.json"):
            raise UserError(fault) from error
        # Behind a semicolon is what to set instead, which nobody can do in a file of others.
        raise UserError(f"config.json: {fault.partition(';')[0].rstrip('.')}.") from error
    except Exception as error:
        # A value of a wrong kind, where no check of ours looked for it, can lead to any error.
        raise UserError(
            f"config.json has a value of a wrong kind ({type(error).__name__}: {error})."
        ) from error
    return model.resolve(model.vocab_size, model.context)


def in_their_words(line: str, family: Family) -> str:
    """Return a line about settings of ours with the family's own names of them."""
    return re.sub(r"\bmodel\.(\w+)", lambda found: family.names.get(found[1], found[0]), line)


def _check_num_layers(config: dict[str, Any], family: Family, tensors: Tensors) -> None:
    """Raise UserError where a config.json asks for more layers than the weights hold."""
    wanted = first_of(config, family.names["num_layers"])
    numbers = {name.removeprefix(family.layer_prefix).partition(".")[0] for name in tensors}
    there = sum(number.isdecimal() for number in numbers)
    if type(wanted) is int and wanted > there:
        raise UserError(
            f"config.json has {family.names['num_layers']}={wanted}, and the weights hold {there} "
            "layers."
        )


def _check_largest(model: ModelConfig, family: Family, tensors: Tensors) -> None:
    """Raise UserError for a size that is larger than any dimension of any tensor."""
    largest = 0
    for tensor in tensors.values():
        largest = max(largest, *tensor.shape, 0)
    names = family.names
    head_dim = names.get("head_dim", "the size of a head")
    sizes = {
        names["vocab_size"]: model.vocab_size,
        names["embed_dim"]: model.embed_dim,
        # Where all layers have experts, no tensor has the width of other mlps.
        names.get("expert_dim", names["mlp_dim"]): model.expert_dim or model.mlp_dim,
        names.get("num_experts", "num_experts"): model.num_experts,
        f"{names['num_heads']} x {head_dim}": model.num_heads * model.head_dim,
        f"{names.get('num_kv_heads', 'num_kv_heads')} x {head_dim}": (
            model.num_kv_heads * model.head_dim
        ),
    }
    if model.position == "learned":
        sizes[names["context"]] = model.context
    for name, size in sizes.items():
        if size > largest:
            raise UserError(
                f"config.json has {name}={size}, and no dimension of any tensor of the weights is "
                f"above {largest}."
            )


def _settle_output(
    tensors: Tensors, family: Family, model: ModelConfig
) -> tuple[ModelConfig, dict[str, str]]:
    """Make tensors and settings agree about the output matrix.

    A file may hold both matrices of a tied pair, or either of them. Two that differ are not a pair,
    whatever config.json says.

    Args:
      tensors: changed to what the settings ask for.
      family: has the names of both.
      model: the settings, as config.json has them.

    Returns:
      The settings, and why a matrix is left out by its name.
    """
    embedding = family.name_of("embedding")
    head = family.name_of("head")
    if not model.tie_embeddings or head not in tensors:
        return model, {}
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return model, {}
    if same_numbers(tensors[embedding], tensors[head]):
        del tensors[head]
        return model, {head: f"the same numbers as {embedding}, as config.json says"}
    untied = dataclasses.replace(model, tie_embeddings=False)
    untied.freeze()
    return untied, {}


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether two matrices [rows, columns] are equal.

    They may be larger than the memory, so a few rows are read at a time.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for start in range(0, len(one), _ROWS):
        rows = slice(start, start + _ROWS)
        if not np.array_equal(one[rows], other[rows]):
            return False
    return True


def _grouped(left_out: dict[str, str]) -> list[str]:
    """Return a line for all tensors that differ in the number of the layer alone, and why."""
    groups: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, why in left_out.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        groups[pattern, why] += 1
    lines = []
    for (pattern, why), count in groups.items():
        if count > 1:
            pattern = f"{pattern} ({count})"
        lines.append(f"{pattern}: {why}")
    return lines
