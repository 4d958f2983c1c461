"""A model of Hugging Face as it lies in a folder: settings, tensors and tokenizer, checked against
each other.

Nothing is built here. The header of the weights says what is there, so sizes of a config.json are
compared with it before anything grows with them: 250 bytes can ask for 100 million layers. Where
the file and its config.json disagree about a tied output matrix, the file counts, as it does in
transformers (`tie_weights`).
"""

import dataclasses
import pathlib
import re
from typing import Any

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

_ROWS = 4096  # of two matrices that are compared at a time


@dataclasses.dataclass(frozen=True)
class HfModel:
    """An opened folder. Texts begin with `start_id`; any of `end_ids` ends one, as the tokenizer's
    own end does.
    """

    family: Family
    model: ModelConfig
    tensors: Tensors
    tokenizer: Tokenizer
    start_id: int
    end_ids: tuple[int, ...]
    left_out: tuple[
        str, ...
    ]  # a line for each kind of tensor or file that is not read: names, and why

    def params(self, mesh: Mesh, fsdp: bool) -> dict:
        """Return our parameters, laid out on `mesh`."""
        return weights.import_params(self.tensors, self.family, self.model, mesh, fsdp)


def open_hf(folder: str, setting: str, tokenizer: str = "") -> HfModel:
    """Open a local folder, which `setting` named; `tokenizer` is a file, where the folder has none.

    Raises UserError for what is missing, doesn't fit together, or no setting of ours expresses.
    """
    place = pathlib.Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(
            f"{setting} is no folder; download the model first (tinylm fetches nothing by itself)."
        )
    family, model, tensors, left_out = read_model(place)
    config = read_json(place / "config.json")
    ends = _special_ids(config, "eos_token_id", model.vocab_size)
    if (place / "generation_config.json").exists():
        generation = read_json(place / "generation_config.json")
        ends += _special_ids(generation, "eos_token_id", model.vocab_size)
    found = find_tokenizer(place, tokenizer, ends[0] if ends else None)
    check_vocabulary(found, model.vocab_size)
    starts = _special_ids(config, "bos_token_id", found.vocab_size)
    more_ends = {end for end in ends if end < found.vocab_size} - {found.eot_id}
    return HfModel(
        family,
        model,
        tensors,
        found,
        starts[0] if starts else found.eot_id,
        tuple(sorted(more_ends)),
        left_out,
    )


def _special_ids(config: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    """Return the ids below `vocab_size` that a JSON object gives for `key`: one, or several in a
    list.
    """
    found = config.get(key)
    several = found if isinstance(found, list) else [found]
    return [one for one in several if type(one) is int and 0 <= one < vocab_size]


def read_model(folder: pathlib.Path) -> tuple[Family, ModelConfig, Tensors, tuple[str, ...]]:
    """Return family, resolved settings, tensors by the family's names, and a line for each kind of
    what is left out.
    """
    config = read_json(folder / "config.json")
    family = _family_of(config)
    tensors, left_out = _without_ignored(
        weights.with_family_names(open_folder(folder), family), family
    )
    _check_numbers(tensors)
    _check_num_layers(config, family, tensors)
    model = read_settings(config, family)
    _check_largest(model, family, tensors)
    model, left_out_of_pair = _settle_output(tensors, family, model)
    left_out |= left_out_of_pair
    lines = _grouped(left_out)
    lines += [f"{name}: a file that transformers does not read" for name in unread_files(folder)]
    return family, model, tensors, tuple(lines)


def _without_ignored(tensors: Tensors, family: Family) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors that hold weights, and why each of the others is left out."""
    kept, left_out = {}, {}
    for name, tensor in tensors.items():
        reasons = [why for end, why in family.ignored.items() if name.endswith(end)]
        if reasons:
            left_out[name] = reasons[0]
        else:
            kept[name] = tensor
    return kept, left_out


def _check_numbers(tensors: Tensors) -> None:
    """Raise UserError for a tensor of a type that isn't read, which `open_file` gives as False
    without its numbers.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == bool:
            raise UserError(
                f"{name} holds no floating-point numbers (quantized?); tinylm reads F32, F16, BF16 "
                "and F64."
            )


def _family_of(config: dict[str, Any]) -> Family:
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    line = f"config.json has model_type={kind!r}; tinylm reads {', '.join(FAMILIES)}"
    if isinstance(kind, str) and kind in RELATIVES:
        raise UserError(
            f"{line}, and has no setting for what {kind} has besides: {RELATIVES[kind]}."
        )
    raise UserError(f"{line}{nearest(str(kind), FAMILIES)}.")


def read_settings(config: dict[str, Any], family: Family) -> ModelConfig:
    """Return the resolved and checked settings of a config.json; refusals use the family's own
    words.
    """
    try:
        model = family.read_config(config)
        model.check()
    except UserError as error:
        fault = in_their_words(str(error), family)
        if fault.startswith("config.json"):
            raise UserError(fault) from error
        # What to set instead, behind a semicolon, is no advice for a file of others.
        raise UserError(f"config.json: {fault.partition(';')[0].rstrip('.')}.") from error
    except Exception as error:  # what a value of a wrong kind leads to
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
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    sizes = {name: getattr(model, name) for name in ("vocab_size", "embed_dim", "mlp_dim")}
    sizes["num_heads"] = model.num_heads * model.head_dim
    sizes["num_kv_heads"] = model.num_kv_heads * model.head_dim
    if model.position == "learned":
        sizes["context"] = model.context
    for name, size in sizes.items():
        if size > largest:
            shown = family.names.get(name, name)
            shown += (
                f" x {family.names.get('head_dim', 'the size of a head')}"
                if "heads" in name
                else ""
            )
            raise UserError(
                f"config.json has {shown}={size}, and no dimension of any tensor of the weights is "
                f"above {largest}."
            )


def _settle_output(
    tensors: Tensors, family: Family, model: ModelConfig
) -> tuple[ModelConfig, dict[str, str]]:
    """Make tensors and settings agree about the output matrix; return the settings, and what of it
    is left out.

    A file may hold both matrices of a tied pair, or either. Two that differ are no pair, whatever
    config.json says.
    """
    embedding, head = family.name_of("embedding"), family.name_of("head")
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
    """Say whether two matrices, which may be larger than the memory, are equal; read a few rows at
    a time.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    starts = range(0, len(one), _ROWS)
    return all(
        np.array_equal(one[start : start + _ROWS], other[start : start + _ROWS]) for start in starts
    )


def _grouped(left_out: dict[str, str]) -> list[str]:
    """Return a line for all tensors of a name but for the layer, and the reason."""
    groups: dict[tuple[str, str], int] = {}
    for name, why in left_out.items():
        group = re.sub(r"\.\d+\.", ".*.", name), why
        groups[group] = groups.get(group, 0) + 1
    return [
        f"{name} ({count}): {why}" if count > 1 else f"{name}: {why}"
        for (name, why), count in groups.items()
    ]
