"""Hugging Face folders without Hugging Face: layouts, round trips, meshes, and what is refused."""

import dataclasses
import json
import pathlib
import resource
import shutil
import struct

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import call_command
from small import SETTINGS, VOCAB, small_model, small_run

from tinylm.config import Config, DataConfig
from tinylm.core.errors import StorageError, UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.settings import differing_settings, to_dict
from tinylm.data.tokenizers import (
    BpeTokenizer,
    JsonTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_file_hashes,
)
from tinylm.inference.decode import Decoder
from tinylm.interop import models, tensor_files, weights
from tinylm.interop.families import FAMILIES
from tinylm.interop.hf_model import read_model
from tinylm.interop.tokenizer_files import data_tokenizer, tokenizer_json
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import open_run
from tinylm.tools.score import score_stories
from tinylm.view.attention import attention_of

ONE = MeshConfig(data=1)


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    """These tests hold where it is missing; test_parity.py compares with it."""
    monkeypatch.setattr(models, "transformers_logits", lambda folder, tokens: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of a variant's name: its run and the folder it was exported to."""
    made = {}

    def export(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "hf"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(models, "transformers_logits", lambda folder, tokens: None)
                run = small_run(small_model(name))
                models.export_hf(run, str(folder))
            made[name] = run, folder
        return made[name]

    return export


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_same_weights(ours, theirs, config):
    """Equal bit for bit, but for the rows that pad the vocabulary, which come back as zeros."""
    shapes = weights.unpadded_shapes(config)
    for path, wanted in flat(ours).items():
        real = tuple(slice(n) for n in shapes[path])
        np.testing.assert_array_equal(flat(theirs)[path][real], wanted[real], err_msg=path)
        padding = np.array(flat(theirs)[path])
        padding[real] = 0
        assert not padding.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_export_and_import_give_the_same_bits(name, exported):
    run, folder = exported(name)
    again = models.import_hf(str(folder), mesh_config=ONE)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    assert kind == max((family for family in FAMILIES if name.startswith(family)), key=len)
    assert_same_weights(run.params, again.params, run.model_config)
    assert again.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert differing_settings(again.model, run.model_config) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_the_library_reads_what_we_wrote(name, exported):
    numpy_io = pytest.importorskip("safetensors.numpy")
    _, folder = exported(name)
    theirs = numpy_io.load_file(folder / "model.safetensors")
    ours = tensor_files.open_folder(folder)
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in ours)


def test_an_export_holds_no_padding(exported):
    run, folder = exported("gpt2")
    assert run.params["embedding"].shape[0] == 384
    assert tensor_files.open_folder(folder)["transformer.wte.weight"].shape == (VOCAB, 32)


def test_layouts_by_their_definition(exported):
    """Where each family puts feature h of head n of layer 1, written out."""
    D, N, H, n, h = 32, 4, 8, 2, 5
    for name, read in {
        "gpt2": lambda t: (
            t["transformer.h.1.attn.c_attn.weight"][:, D + n * H + h],
            t["transformer.h.1.attn.c_attn.bias"][2 * D + n * H + h],
            t["transformer.h.1.attn.c_proj.weight"][n * H + h, :],
        ),
        "gpt_neox": lambda t: (
            t["gpt_neox.layers.1.attention.query_key_value.weight"][(n * 3 + 1) * H + h, :],
            t["gpt_neox.layers.1.attention.query_key_value.bias"][(n * 3 + 2) * H + h],
            t["gpt_neox.layers.1.attention.dense.weight"][:, n * H + h],
        ),
    }.items():
        run, folder = exported(name)
        attention = run.params["blocks"]["attention"]
        key, value_bias, out = read(tensor_files.open_folder(folder))
        np.testing.assert_array_equal(key, attention["key"]["kernel"][1, :, n, h])
        assert value_bias == attention["value"]["bias"][1, n, h]
        np.testing.assert_array_equal(out, attention["out"]["kernel"][1, n, h, :])
    run, folder = exported("llama")
    tensors, blocks = tensor_files.open_folder(folder), run.params["blocks"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.v_proj.weight"][H + h],
        blocks["attention"]["value"]["kernel"][1, :, 1, h],
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.up_proj.weight"].T, blocks["mlp"]["up"]["kernel"][0]
    )
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, run.params["head"][:, :VOCAB])
    assert N * H == D


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_a_mesh_gets_parts_not_copies(name, exported):
    run, folder = exported(name)
    again = models.import_hf(str(folder), mesh_config=MeshConfig(data=4, model=2, fsdp=True))
    assert_same_weights(run.params, again.params, run.model_config)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(again.params))
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(again.params))
    assert local < 1.2 * whole / 8


def test_a_run_on_a_mesh_is_exported_like_one_on_a_device(exported, tmp_path):
    _, folder = exported("gpt2")
    mesh_config = MeshConfig(data=2, model=2, fsdp=True)
    imported = models.import_hf(str(folder), mesh_config=mesh_config)
    run = small_run(small_model("gpt2"), make_mesh(mesh_config))
    run.params = imported.params
    models.export_hf(run, str(tmp_path / "again"))
    written = [(place / "model.safetensors").read_bytes() for place in (folder, tmp_path / "again")]
    assert written[0] == written[1]


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of an exported model that a test may spoil."""

    def make(name="gpt2"):
        shutil.copytree(exported(name)[1], tmp_path / name)
        return tmp_path / name

    return make


def rewrite(folder: pathlib.Path, change, dtype="F32", file="model.safetensors"):
    """Write the tensors of a folder again after `change(tensors)`, in the format by its letter."""
    tensors = {name: np.array(tensor) for name, tensor in tensor_files.open_folder(folder).items()}
    tensors = change(tensors) or tensors
    header, body = {}, b""
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": tensor.shape,
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    text = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_names_without_prefix_and_buffers_are_read(copy, exported):
    """As OpenAI's gpt2 is published.

    Without "transformer.", with the causal mask as a tensor, and with the tied matrix twice.
    """
    folder = copy()

    def bare(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return tensors | {
            "h.0.attn.bias": np.ones((1, 1, 2, 2), np.float32),
            "lm_head.weight": tensors["wte.weight"],
        }

    rewrite(folder, bare)
    run = exported("gpt2")[0]
    assert_same_weights(
        run.params, models.import_hf(str(folder), mesh_config=ONE).params, run.model_config
    )


def test_half_precision_is_read(copy, exported):
    folder, run = copy(), exported("gpt2")[0]
    rewrite(
        folder,
        lambda tensors: {name: x.astype(np.float16) for name, x in tensors.items()},
        dtype="F16",
    )
    again = flat(models.import_hf(str(folder), mesh_config=ONE).params)
    for path, wanted in flat(run.params).items():
        assert again[path].dtype == np.float32
        if path != "embedding":
            np.testing.assert_array_equal(
                again[path], np.asarray(wanted).astype(np.float16).astype(np.float32)
            )


def split_in_two(folder):
    tensors = {name: np.array(x) for name, x in tensor_files.open_folder(folder).items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        rewrite(folder, lambda _: {name: tensors[name] for name in part}, file=file)
    (folder / "model.safetensors").unlink()
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_a_sharded_folder_is_read(copy, exported, monkeypatch):
    folder, run = copy(), exported("gpt2")[0]
    original = tensor_files.open_folder(folder)
    monkeypatch.setattr(tensor_files, "open_folder", lambda _: original)
    split_in_two(folder)
    monkeypatch.undo()
    params = models.import_hf(str(folder), mesh_config=ONE).params
    assert_same_weights(run.params, params, run.model_config)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b"]
)
def test_an_index_names_files_in_its_own_folder_alone(copy, name):
    folder = copy()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="must lie in the folder of its index"):
        models.import_hf(str(folder))


def test_an_index_that_names_what_is_not_there(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"strange": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names strange in other.safetensors, which isn't there"):
        models.import_hf(str(folder))


def drop(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


SPOILT = {
    "missing": (drop("transformer.h.1.ln_1.bias"), r"lack transformer.h.1.ln_1.bias"),
    "extra": (
        lambda t: t | {"transformer.h.2.ln_1.bias": t["transformer.h.1.ln_1.bias"]},
        r"have transformer.h.2.ln_1.bias, which config.json doesn't ask for",
    ),
    "shape": (
        lambda t: t | {"transformer.h.0.mlp.c_fc.weight": np.zeros((32, 64), np.float32)},
        r"transformer.h.0.mlp.c_fc.weight has shape \(32, 64\); config.json asks for \(32, 128\)",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_weights_that_do_not_fit_are_named(copy, case):
    folder, (change, wanted) = copy(), SPOILT[case]
    rewrite(folder, change)
    with pytest.raises(UserError, match=wanted) as caught:
        models.import_hf(str(folder), mesh_config=ONE)
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_refused(copy):
    folder = copy()
    rewrite(folder, lambda t: {name: x.astype(np.int8) for name, x in t.items()}, dtype="I8")
    with pytest.raises(UserError, match="holds no floating-point numbers"):
        models.import_hf(str(folder), mesh_config=ONE)


CONFIGS = {
    "family": (
        "gpt2",
        {"model_type": "t5"},
        r"model_type='t5'; tinylm reads gpt2, gpt_neo, gpt_neox, llama, mistral, qwen2",
    ),
    "activation": ("gpt2", {"activation_function": "mish"}, "activation_function='mish'.*gelu_new"),
    "scaling": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True",
    ),
    "rope": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor=None; llama needs a number",
    ),
    "size": ("gpt2", {"n_embd": None}, "lacks n_embd"),
    "vocabulary": (
        "gpt2",
        {"vocab_size": 100},
        "the tokenizer has 257 ids and the model's vocabulary 100",
    ),
    "kind": (
        "gpt_neo",
        {"attention_layers": ["global", "sparse"]},
        "sparse.*reads lists of global and local",
    ),
}


WRONG = ["12", "x", None, True, 1.5, 0, -1, 10**30, float("nan"), [], {}, [[1]]]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2"])
def test_values_of_any_kind_in_a_config_are_read_or_refused(copy, name):
    folder = copy(name)
    config = json.loads((folder / "config.json").read_text())
    more = [
        "rope_parameters",
        "rope_scaling",
        "num_key_value_heads",
        "attention_layers",
        "partial_rotary_factor",
        "attention_bias",
        "sliding_window",
        "layer_types",
        "eos_token_id",
    ]
    for key in [*config, *more]:
        for value in WRONG:
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                model = read_model(folder).model
            except UserError as error:
                assert "\n" not in str(error)
            else:
                sizes = [
                    getattr(model, size)
                    for size in ("vocab_size", "context", "embed_dim", "head_dim", "mlp_dim")
                ]
                assert all(type(size) is int and 0 < size < 1 << 31 for size in sizes), (key, value)


HUGE = 100_000_000
# More than the weights hold, in a config.json of a few hundred bytes. Building any of these takes
# minutes or more.
HOSTILE = {
    "layers of gpt2": (
        "gpt2",
        {"n_layer": HUGE},
        r"n_layer=100000000, and the weights hold 2 layers",
    ),
    "layers of gpt_neo": (
        "gpt_neo",
        {"num_layers": HUGE},
        r"num_layers=100000000, and the weights hold 2 layers",
    ),
    "layers by another name": (
        "gpt2",
        {"n_layer": None, "num_hidden_layers": HUGE},
        r"the weights hold 2 layers",
    ),
    "layers of llama": (
        "llama",
        {"num_hidden_layers": HUGE},
        r"num_hidden_layers=100000000, and the weights hold 2",
    ),
    "pattern": (
        "gpt_neo",
        {"attention_layers": None, "attention_types": [[["global", "local"], HUGE]]},
        r"attention_types of 200000000 layers and num_layers=2",
    ),
    "both": (
        "gpt_neo",
        {"attention_layers": None, "attention_types": [[["global"], HUGE]], "num_layers": HUGE},
        r"the weights hold 2 layers",
    ),
    "long pattern": (
        "qwen2",
        {"layer_types": ["full_attention"] * 3},
        r"layer_types of 3 layers; there are 2",
    ),
    "width": (
        "llama",
        {"hidden_size": 2**31 - 4},
        r"hidden_size=2147483644, and no dimension.*is above 259",
    ),
    "mlp": (
        "llama",
        {"intermediate_size": 2**31 - 1},
        r"intermediate_size=2147483647, and no dimension",
    ),
    "heads": (
        "llama",
        {"num_attention_heads": 2**30, "head_dim": 2**30},
        r"num_attention_heads x head_dim=\d+, and",
    ),
    "vocabulary": ("gpt2", {"vocab_size": 2**31 - 1}, r"vocab_size=2147483647, and no dimension"),
    "positions": ("gpt2", {"n_positions": 2**31 - 1}, r"n_positions=2147483647, and no dimension"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_sizes_are_checked_against_the_weights_before_anything_is_built(copy, case, monkeypatch):
    name, changes, wanted = HOSTILE[case]
    folder = copy(name)
    edit_config(folder, **changes)
    built = []
    monkeypatch.setattr(weights, "abstract_transformer", built.append)
    with pytest.raises(UserError, match=wanted) as caught:
        models.import_hf(str(folder), mesh_config=ONE)
    assert "\n" not in str(caught.value)
    assert not built


# What a family has that no setting of ours expresses, or that can't be, in the words of its own
# config.json.
OWN_WORDS = {
    "heads": (
        "llama",
        {"num_attention_heads": 5, "head_dim": None},
        r"hidden_size=32 must be divisible by num_atte",
    ),
    "grouped": (
        "mistral",
        {"num_key_value_heads": 3},
        r"num_attention_heads=4 must be divisible by num_key_",
    ),
    "default": (
        "mistral",
        {"num_key_value_heads": ...},
        r"heads=4 must be divisible by num_key_value_heads=8",
    ),
    "number": ("llama", {"rms_norm_eps": "small"}, r"rms_norm_eps='small'"),
    "size": ("gpt2", {"n_embd": 1.5}, r"n_embd=1.5; gpt2 needs a whole number"),
    "flag": (
        "llama",
        {"attention_bias": "yes"},
        r"attention_bias='yes'; llama needs true or false",
    ),
    "window": ("mistral", {"sliding_window": 0}, r"sliding_window=0; mistral needs a whole number"),
    "no window": (
        "qwen2",
        {"use_sliding_window": False},
        r"sliding_window=None; qwen2 needs a whole number",
    ),
    "dynamic": (
        "qwen2",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        r"rope_scaling with rope_type='dynamic'; tinylm reads .* linear, llama3, yarn",
    ),
    "longrope": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
        r"rope_parameters with rope_type='longrope'",
    ),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, r"factor=None; llama needs"),
    "shrinking": ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor=0.5"),
    "no blend": (
        "mistral",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1}},
        r"beta_fast=1.0, which must be above beta_slow=1.0",
    ),
    "untruncated": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
        r"yarn with truncate=false",
    ),
    "flat": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
        r"rope_theta above 1",
    ),
    "by layer": (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        r"for each kind of layer",
    ),
    "relative": (
        "llama",
        {"model_type": "smollm3"},
        r"model_type='smollm3'.*reads gpt2,.*no_rope_layers",
    ),
    "base": ("llama", {"rope_theta": -1.0}, r"rope_theta=-1.0; llama needs a number above 0"),
    "part": ("gpt_neox", {"rotary_pct": 1.5}, r"rotary_pct=1.5 must be above 0 and at most 1"),
}


@pytest.mark.parametrize("case", OWN_WORDS)
def test_refusals_are_in_the_words_of_the_family(copy, case):
    name, changes, wanted = OWN_WORDS[case]
    folder = copy(name)
    gone = [key for key, value in changes.items() if value is ...]
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: x for key, x in config.items() if key not in gone})
    )
    with pytest.raises(UserError, match=wanted) as caught:
        models.import_hf(str(folder), mesh_config=ONE)
    assert "\n" not in str(caught.value)
    assert "model." not in str(caught.value).replace("model.safetensors", "")


def test_what_is_left_out_is_named_with_its_reason(copy):
    folder = copy()

    def add(tensors):
        masks = {
            f"transformer.h.{i}.attn.bias": np.ones((1, 1, 2, 2), np.float32) for i in range(2)
        }
        return tensors | masks | {"lm_head.weight": tensors["transformer.wte.weight"]}

    rewrite(folder, add)
    (folder / "adapter.safetensors").write_bytes(b"never read")
    assert models.import_hf(str(folder), mesh_config=ONE).left_out == (
        "transformer.h.*.attn.bias (2): causal mask, which is computed",
        "lm_head.weight: the same numbers as transformer.wte.weight, as config.json says",
        "adapter.safetensors: a file that transformers does not read",
    )


def test_a_tied_matrix_that_differs_is_a_matrix_of_its_own(copy):
    folder = copy()
    rewrite(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    imported = models.import_hf(str(folder), mesh_config=ONE)
    assert not imported.model.tie_embeddings
    head_EV, embedding_VE = (np.asarray(imported.params[name]) for name in ("head", "embedding"))
    np.testing.assert_array_equal(head_EV.T[:VOCAB], embedding_VE[:VOCAB] + 1)


def test_the_output_matrix_of_gpt_neox_has_two_names(copy, exported):
    folder = copy("gpt_neox")
    rewrite(folder, lambda t: {name.replace("embed_out", "lm_head"): x for name, x in t.items()})
    run = exported("gpt_neox")[0]
    assert_same_weights(
        run.params, models.import_hf(str(folder), mesh_config=ONE).params, run.model_config
    )


def test_a_folder_of_an_adapter_is_refused(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\).*merge it"):
        models.import_hf(str(folder))


def test_files_among_which_none_is_the_model_are_refused(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 .safetensors files, but no model.safetensors"):
        models.import_hf(str(folder))


def test_all_ends_of_text_are_read_and_kept(copy, tmp_path):
    """Ends for which the tokenizer has no id are left out."""
    folder = copy("llama")
    edit_config(folder, eos_token_id=[256, 9])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [11, 256, 258, "x", -1]})
    )
    imported = models.import_hf(str(folder), mesh_config=ONE)
    assert (imported.tokenizer.eot_id, imported.end_ids) == (256, (9, 11))
    run = dataclasses.replace(small_run(small_model("llama")), end_ids=imported.end_ids)
    models.export_hf(run, str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [
        256,
        9,
        11,
    ]


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_we_cannot_follow_are_refused(copy, case):
    name, changes, wanted = CONFIGS[case]
    folder = copy(name)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=wanted) as caught:
        models.import_hf(str(folder))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_the_reason(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pickled weights alone \(pytorch_model.bin\).*can run any code"
    ):
        models.import_hf(str(folder))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "its header would be 1,099,511,627,776 bytes"),
        (struct.pack("<Q", 5) + b"hello", "its header is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is not an object"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is not JSON"),
        (b"abc", "is not a safetensors file"),
        (b"", "can't be read as safetensors"),
    ],
)
def test_a_file_that_lies_about_itself_is_refused(copy, content, wanted):
    folder = copy()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=wanted):
        models.import_hf(str(folder))


@pytest.mark.parametrize("offsets", [[0, 64], [0, 1 << 40], [-4, 0], [8, 4], "x"])
def test_a_tensor_must_lie_inside_its_file(tmp_path, offsets):
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(UserError, match=r"cut short or altered|describes w wrongly"):
        tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize("kind", ["F32", "I64"])
@pytest.mark.parametrize(
    "shape", [["a"], [-1], [True], [2**62] * 2, [0, 2**63], [1] * 70, [1.0], 5, "1", "", {}, None]
)
def test_a_shape_that_no_tensor_has_is_refused(tmp_path, kind, shape):
    text = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(UserError, match=r"cut short or altered|describes w wrongly"):
        tensor_files.open_folder(tmp_path)


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep.json can't be read"):
        tensor_files.read_json(tmp_path / "deep.json")
    with pytest.raises(UserError, match="is not a folder"):
        models.import_hf(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.json can't be read"):
        models.import_hf(str(tmp_path))
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        tensor_files.open_folder(tmp_path)


def test_an_end_of_text_that_the_file_had_no_token_for_is_in_the_exported_one():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as hf_models

    inner = Tokenizer(hf_models.WordLevel({"[UNK]": 0, "once": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = JsonTokenizer(inner.to_str().encode())
    assert (tokenizer.eot_id, tokenizer.eot_name) == (2, "")
    exported = Tokenizer.from_str(tokenizer_json(tokenizer).decode())
    assert exported.token_to_id("<|endoftext|>") == 2
    assert exported.encode("once upon").ids == [1, 0]


def test_a_folder_without_tokenizer_asks_for_one(copy):
    folder = copy()
    for name in ("tokenizer.json", "tinylm_tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer.json.*set --tokenizer=FILE"):
        models.import_hf(str(folder))


def test_nothing_is_exported_that_does_not_read_back(tmp_path, monkeypatch):
    run, honest = small_run(small_model("gpt2")), weights.export_tensors
    monkeypatch.setattr(
        weights,
        "export_tensors",
        lambda *args: (
            (name, x + 1e-3 * (name.endswith("wpe.weight"))) for name, x in honest(*args)
        ),
    )
    with pytest.raises(UserError, match="nothing was exported: logits of what was written differ"):
        models.export_hf(run, str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


def test_transformers_must_agree_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        models, "transformers_logits", lambda folder, tokens: np.zeros((*tokens.shape, VOCAB))
    )
    with pytest.raises(UserError, match="nothing was exported: transformers' logits differ"):
        models.export_hf(small_run(small_model("gpt2")), str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_into_the_empty_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.export_hf(small_run(small_model("gpt2")), ".")
    assert sorted(map(str, pathlib.Path().iterdir())) == sorted(
        path.name for path in tmp_path.iterdir()
    )
    assert read_model(pathlib.Path()).family.model_type == "gpt2"


@pytest.mark.parametrize("place", ["file/hf", "/proc/hf", "full"])
def test_an_export_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
    try:
        with pytest.raises(StorageError, match=f"--to_hf={tmp_path / place} can't be written: "):
            models.export_hf(small_run(small_model("gpt2")), str(tmp_path / place))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        models.export_hf(small_run(small_model("gpt2")), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        (
            "llama",
            {"qk_norm": True},
            r"the nearest, llama, would need model.qk_norm=False \(here True\)",
        ),
        (
            "gpt2",
            {"mlp": "swiglu"},
            r"the nearest, gpt2, would need model.mlp='gelu' \(here 'swiglu'\)",
        ),
        ("gpt2", {"head_dim": 4}, r"model.head_dim=8 \(here 4\)"),
        (
            "llama",
            {"local_heads": 2, "attention_window": (4,)},
            r"mistral, would need model.local_heads=0 \(here 2\)",
        ),
    ],
)
def test_a_model_of_no_family_is_told_what_stands_in_the_way(name, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        models.fitting_family(small_model(name, **changes))


@pytest.mark.parametrize("named", [256, [256, 3]])
def test_the_end_of_text_is_the_one_that_the_config_names(copy, tmp_path, named):
    folder = copy()
    (folder / "tinylm_tokenizer.json").unlink()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|fin|>"))
    edit_config(folder, eos_token_id=named)
    found = models.import_hf(str(folder)).tokenizer
    assert (found.eot_id, found.vocab_size) == (256, 257)
    found.save(tmp_path / "saved")
    again = [
        load_tokenizer(tmp_path / "saved"),
        build_tokenizer(f"hf:{tmp_path}/saved/tokenizer.json", 0, list),
    ]
    assert {one.fingerprint for one in again} == {found.fingerprint}
    assert tokenizer_file_hashes(f"hf:{file}") != tokenizer_file_hashes(
        f"hf:{tmp_path}/saved/tokenizer.json"
    )
    edit_config(folder, eos_token_id="none", bos_token_id=True)
    assert models.import_hf(str(folder)).start_id == 257


def test_an_imported_run_is_scored_with_its_own_tokenizer_wherever_it_is(tmp_path):
    run = small_run(small_model("llama"))
    run.tokenizer = BpeTokenizer.train(["Once upon a time"], 259)
    run.start_id = run.tokenizer.eot_id
    models.export_hf(run, str(tmp_path / "hf"))
    imported, first = models.import_hf(str(tmp_path / "hf")), RunFolder(str(tmp_path / "first"))
    spec = data_tokenizer(imported.tokenizer, first.tokenizer)
    data = DataConfig(source="tales:50", tokenizer=spec, seq_len=16, batch_size=8)
    config = to_dict(Config(data=data, model=imported.model))
    models.write_run(
        first, {"config": config, "versions": {"mesh": {}}, "imported_from": "there"}, imported
    )
    (tmp_path / "first").rename(tmp_path / "moved")
    flags = ["--source=tales:50", "--json", "--max_batches=1"]
    done = call_command("tinylm.evaluate", f"--workdir={tmp_path / 'moved'}", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 8 * 16


def test_stories_begin_as_the_texts_of_the_run_do(monkeypatch):
    run, seen = small_run(small_model("llama")), []
    run.start_id = 7
    monkeypatch.setattr(
        Decoder, "stream", lambda self, params, prompts, **_: seen.extend(prompts) or []
    )
    assert score_stories(run, None, "")["ended"] == 1
    assert {prompt[0] for prompt in seen} == {7}
    others = dataclasses.replace(run, start_id=8)
    assert not np.array_equal(attention_of(run, "ab")[1], attention_of(others, "ab")[1])


@pytest.mark.parametrize("changes", [{"z_loss": 1e-4}, {"dropout": 0.1}, {"init_std": 0.1}])
def test_what_logits_do_not_depend_on_does_not_stand_in_the_way(changes):
    assert models.fitting_family(small_model("llama", **changes)).model_type == "llama"


def test_an_imported_run_opens(copy, tmp_path):
    imported = models.import_hf(str(copy()))
    folder = RunFolder(str(tmp_path / "run"))
    record = {
        "config": to_dict(Config(model=imported.model)),
        "versions": {"mesh": {}},
        "imported_from": "there",
    }
    models.write_run(folder, record | {"end_ids": [9]}, imported)
    run = open_run(str(tmp_path / "run"))
    assert run.end_ids == (9,)
    assert (run.step, run.model_config, run.tokenizer.eot_id) == (0, imported.model, 256)
    assert all(map(np.array_equal, jax.tree.leaves(run.params), jax.tree.leaves(imported.params)))
