"""The same numbers as `transformers` in torch: logits, padding, five optimizer steps, exports.

Needs torch and transformers (the `parity` extra); without them these tests are skipped.
"""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from helpers import train
from small import data_folder, random_tokens, small_model, small_run
from vocabularies import write_gpt2, write_llama2c

from tinylm.core.mesh import MeshConfig
from tinylm.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, read_vocabulary
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.interop import models, weights
from tinylm.interop.families import FAMILIES
from tinylm.interop.hf_model import read_model
from tinylm.interop.tensor_files import open_folder
from tinylm.interop.tokenizer_files import write_tokenizer
from tinylm.model.transformer import abstract_transformer
from tinylm.train import state as train_state

torch = pytest.importorskip("torch", reason="torch is not installed (the parity extra)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (the parity extra)"
)
safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason="safetensors is not installed (the hf extra)"
)

ONE = MeshConfig(data=1)
VOCAB, CONTEXT = 259, 24
SHARED = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2}
MODERN = {
    **SHARED,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
NEO = {
    **SHARED,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 32,
    "num_heads": 4,
    "window_size": 5,
}
GPT2 = {**SHARED, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
REFERENCES = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2_untied": lambda: transformers.GPT2Config(
        **GPT2, tie_word_embeddings=False, activation_function="gelu"
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **NEO, num_layers=4, attention_types=[[["global", "local"], 2]]
    ),
    # Heads of 16, a quarter of which has two frequencies: one alone would be 1 whatever the base.
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{**MODERN, "num_attention_heads": 2}),
    "gpt_neox_serial": lambda: transformers.GPTNeoXConfig(
        **MODERN,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    ),
    "gpt_neox_without_attention_bias": lambda: transformers.GPTNeoXConfig(
        **MODERN, attention_bias=False
    ),
    "llama": lambda: transformers.LlamaConfig(**MODERN, num_key_value_heads=2),
    "llama_attention_bias": lambda: transformers.LlamaConfig(**MODERN, attention_bias=True),
    "llama_mlp_bias": lambda: transformers.LlamaConfig(**MODERN, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(
        **MODERN, num_key_value_heads=2, sliding_window=None
    ),
    "mistral_window": lambda: transformers.MistralConfig(
        **MODERN, num_key_value_heads=2, sliding_window=5
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **MODERN, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **MODERN,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**MODERN, num_key_value_heads=2, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(
        **MODERN, num_key_value_heads=2, num_local_experts=4, sliding_window=5
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **MODERN, **EXPERTS, head_dim=16, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**MODERN, **EXPERTS, pad_token_id=None),
    "llama_biased": lambda: transformers.LlamaConfig(
        **MODERN, attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A function of a name: (torch's model with random weights, the same imported by us)."""
    made, folders = {}, {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            config = REFERENCES[name]()
            for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
                if hasattr(config, key):
                    setattr(config, key, 0.0)
            theirs = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            ).eval()
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            ByteTokenizer().save(folder)
            folders[name] = folder
            made[name] = theirs, models.import_hf(str(folder), mesh_config=ONE)
        return made[name]

    get.folders = folders
    return get


def logits_of(theirs, tokens, **inputs):
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long(), **inputs).logits.numpy()


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_agree_at_odd_lengths_and_beyond_the_window(name, pairs):
    theirs, ours = pairs(name)
    for length in (1, 7, 23):
        tokens = random_tokens(2, length)
        reference = logits_of(theirs, tokens)
        assert np.abs(reference).max() > 1
        np.testing.assert_allclose(
            models._logits(ours.model, ours.params, tokens), reference, atol=1e-4, rtol=0
        )


# Rotary settings as old and new versions of transformers write them, alone and against each other.
ROPES = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rotary_emb_base": 500, "rotary_pct": 0.5},
    {"rotary_emb_base": 500, "rope_theta": 7.0, "partial_rotary_factor": 0.75},
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    {
        "rope_parameters": {"rope_theta": 500.0},
        "rope_theta": 7.0,
        "rotary_emb_base": 7,
        "rotary_pct": 0.75,
    },
    {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_theta": 9.0}, "rope_parameters": {"rope_theta": 500.0}},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_scaling": None, "rope_parameters": None, "rope_theta": 500.0},
]


def edited(source, target, **changes):
    """Copy a model's folder and change its config.json; None takes a key out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral", "qwen2"])
def test_rotary_settings_are_read_from_where_transformers_reads_them(name, pairs, tmp_path):
    """By the frequencies that transformers computes from the same config.json."""
    pairs(name)
    for i, rope in enumerate(ROPES):
        folder = edited(pairs.folders[name], tmp_path / str(i), **{"rope_parameters": None, **rope})
        wanted = getattr(
            loaded(folder), "gpt_neox" if name == "gpt_neox" else "model"
        ).rotary_emb.inv_freq.numpy()
        model = read_model(folder).model
        size = int(model.head_dim * model.rotary_fraction)
        ours = model.rotary_base ** (-np.arange(0, size, 2) / size)
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, err_msg=str(rope))


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, blended": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8,
        "beta_slow": 0.5,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
    },
    "yarn, bare": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["gpt_neox_serial", "llama", "mistral", "qwen2"])
def test_scaled_rotary_positions_agree(name, scaling, pairs, tmp_path):
    pairs(name)
    rope = {"rope_theta": 500.0, **SCALINGS[scaling]}
    if name.startswith("gpt_neox"):
        rope["partial_rotary_factor"] = 1.0
    changes = {"max_position_embeddings": 64}
    folder = edited(
        pairs.folders[name], tmp_path / "hf", **changes, rope_parameters=None, rope_scaling=rope
    )
    ours = assert_same_logits(folder)
    assert ours.model.rotary_scaling in scaling
    # A model that ignored the scaling would give other logits.
    plain = dataclasses.replace(ours.model, rotary_scaling="none")
    tokens = random_tokens(2, 23)
    difference = models._logits(plain, ours.params, tokens) - logits_of(loaded(folder), tokens)
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_logits_agree_where_a_part_of_each_head_would_rotate(name, pairs, tmp_path):
    """GPT-NeoX follows `partial_rotary_factor`; Llama ignores it, wherever it stands."""
    pairs(name)
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    folder = edited(pairs.folders[name], tmp_path / "hf", rope_parameters=rope)
    assert_same_logits(folder)


def assert_same_logits(folder):
    theirs, ours = loaded(folder), models.import_hf(str(folder), mesh_config=ONE)
    tokens = random_tokens(2, 23)
    np.testing.assert_allclose(
        models._logits(ours.model, ours.params, tokens),
        logits_of(theirs, tokens),
        atol=1e-4,
        rtol=0,
    )
    return ours


@pytest.mark.parametrize("name", ["gpt2_untied", "gpt_neox", "llama"])
def test_two_matrices_that_differ_are_not_tied(name, pairs, tmp_path):
    pairs(name)
    ours = assert_same_logits(
        edited(pairs.folders[name], tmp_path / "hf", tie_word_embeddings=True)
    )
    assert not ours.model.tie_embeddings


def test_a_file_that_has_the_output_matrix_alone_fills_both(pairs, tmp_path):
    theirs, _ = pairs("llama_biased")
    folder = edited(pairs.folders["llama_biased"], tmp_path / "hf")
    tensors = {name: np.array(tensor) for name, tensor in open_folder(folder).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert assert_same_logits(folder).model.tie_embeddings
    np.testing.assert_array_equal(tensors["lm_head.weight"], theirs.lm_head.weight.detach().numpy())


def test_of_several_files_the_one_is_read_that_transformers_reads(pairs, tmp_path):
    pairs("llama")
    folder = edited(pairs.folders["llama"], tmp_path / "hf")
    tensors = {name: np.zeros_like(tensor) for name, tensor in open_folder(folder).items()}
    safetensors_numpy.save_file(
        tensors, folder / "consolidated.safetensors", metadata={"format": "pt"}
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "consolidated.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = assert_same_logits(folder)
    assert ours.left_out == ("consolidated.safetensors: a file that transformers does not read",)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_any_of_several_ends_of_text_stops_both(file, pairs, tmp_path):
    """The third token that greedy decoding writes becomes an end of text."""
    theirs, _ = pairs("llama")
    prompt = torch.arange(5)[None]
    written = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=256)[
        0, 5:
    ].tolist()
    third = next(i for i in range(2, 8) if written[i] not in (*written[:i], 256))
    folder = edited(pairs.folders["llama"], tmp_path / "hf")
    ends = {"eos_token_id": [256, written[third]]}
    settings = json.loads((folder / file).read_text()) | ends
    (folder / file).write_text(json.dumps(settings))
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    found = loaded(folder).generate(prompt, max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    assert found == written[: third + 1]
    ours = models.import_hf(str(folder), mesh_config=ONE)
    assert ours.end_ids == (written[third],)
    decoder = Decoder(abstract_transformer(ours.model)[0], CONTEXT, 256, 257, ours.end_ids)
    with jax.set_mesh(ours.mesh):
        ids = decoder.write(ours.params, [prompt[0].tolist()], max_tokens=8, sampler=Sampler(0.0))[
            0
        ]
    assert ids == written[:third]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_agree_with_padding(name, side, pairs):
    """Two rows of 11 and 6 tokens: padding is another segment to us, a mask to them."""
    theirs, ours = pairs(name)
    tokens, lengths = random_tokens(2, 11), np.array([[11], [6]])
    places = np.arange(11)
    real = places < lengths if side == "right" else places >= 11 - lengths
    positions = np.clip(np.cumsum(real, axis=1) - 1, 0, None)
    mask, where = torch.from_numpy(real.astype(np.int64)), torch.from_numpy(positions)
    reference = logits_of(theirs, tokens, attention_mask=mask, position_ids=where)
    plain = train_state.abstract_transformer(ours.model)[0]

    @jax.jit
    def forward(params):
        model = models.nnx.merge(plain, params)
        return model(tokens, segments_BT=real.astype(np.int32), positions_BT=positions)

    logits = np.asarray(forward(ours.params))[..., :VOCAB]
    np.testing.assert_allclose(logits[real], reference[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox", "llama"])
def test_five_optimizer_steps_agree(name, pairs, monkeypatch):
    """AdamW with clipping, decay on matrices alone, on the same five batches."""
    theirs, ours = pairs(name)
    rows = [random_tokens(4, CONTEXT, seed) for seed in range(5)]
    batches = [
        {
            "tokens": ids[None, :, :-1],
            "targets": ids[None, :, 1:],
            "weights": np.ones((1, 4, CONTEXT - 1), np.float32),
        }
        for ids in rows
    ]
    monkeypatch.setattr(train_state, "init_parameters", lambda config, seed: ours.params)
    settings = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "beta2": 0.95,
        "weight_decay": 0.1,
    }
    losses, _, _ = train(ONE, ours.model, batches, name="adamw", clip_norm=1.0, **settings)

    reference = []
    model = transformers.AutoModelForCausalLM.from_config(
        theirs.config, attn_implementation="eager"
    )
    model.load_state_dict(theirs.state_dict())
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for ids in rows:
        ids = torch.from_numpy(ids).long()
        logits = model.train()(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        reference.append(loss.item())
    assert reference[0] != reference[4]
    np.testing.assert_allclose(losses, reference, atol=1e-4, rtol=0)


LINEAR = {"rotary_scaling": "linear", "rotary_factor": 2.5}
LLAMA3 = {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original_context": 16}
YARN = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_slow_turns": 0.5}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),
        ("gpt_neo", {}),
        ("gpt_neox", {}),
        ("gpt_neox", YARN),
        ("gpt_neox_without_attention_bias", {}),
        ("llama", {}),
        ("llama", LINEAR),
        ("llama", LLAMA3),
        ("llama", YARN),
        ("llama_attention_bias", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", YARN),
        ("qwen3", {}),
        ("qwen3", LLAMA3),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("olmoe", {}),
    ],
)
def test_what_we_export_loads_there(name, changes, tmp_path):
    """The export's own check compares with transformers; here every tensor of theirs is filled."""
    run = small_run(small_model(name, **changes))
    checked = models.export_hf(run, str(tmp_path / "hf"))
    assert checked["transformers"] < 1e-4
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = weights.their_shapes(FAMILIES[checked["family"]], run.model_config)
    assert sum(map(math.prod, written.values())) == sum(p.numel() for p in model.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.eos_token_id, tokenizer.encode("Once é\n")) == (
        256,
        list("Once é\n".encode()),
    )


def tokenizers_to_export():
    """Yield names, and functions that make a tokenizer from files in a folder."""
    yield "byte", lambda _: ByteTokenizer()
    yield "char", lambda _: CharTokenizer.of(["Once upon a time,\n there wasé."])
    yield "bpe", lambda _: BpeTokenizer.train(["Once upon a time, there was a time. " * 9], 280)
    yield "gpt2", lambda folder: read_vocabulary(f"gpt2:{write_gpt2(folder)}")
    yield "real gpt2", lambda _: read_vocabulary(f"gpt2:{data_folder() / 'gpt2_bpe'}")
    yield "llama2c", lambda folder: read_vocabulary(f"llama2c:{write_llama2c(folder / 'own.bin')}")
    real_llama2c = "stories260k/tok512.bin"
    yield "real llama2c", lambda _: read_vocabulary(f"llama2c:{data_folder() / real_llama2c}")


@pytest.mark.parametrize(
    ("name", "make"),
    list(tokenizers_to_export()),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokenizers_give_the_same_ids_there(name, make, tmp_path):
    tokenizer = make(tmp_path)
    text = "Once upon a time,\n there was a time."
    written = tmp_path / "written"
    written.mkdir()
    write_tokenizer(tokenizer, written, 24)
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot_id
