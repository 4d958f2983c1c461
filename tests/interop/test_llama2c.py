"""llama2.c's files: a small one by the definition of its model, and stories260K byte for byte."""

import functools
import json
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import call_command
from small import data_folder
from vocabularies import write_llama2c

from tinylm.config import Config
from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig
from tinylm.inference.config import SampleConfig
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.inference.text import write_texts
from tinylm.interop import models
from tinylm.interop.llama2c import open_llama2c
from tinylm.interop.tokenizer_files import tokenizer_json
from tinylm.model.transformer import abstract_transformer
from tinylm.run.open_run import Run
from tinylm.train.evaluator import Evaluator

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 16, 24, 2, 4, 2, 300, 12
HEAD, KV_DIM = DIM // HEADS, DIM // HEADS * KV_HEADS
PARTS = {
    "tok": (VOCAB, DIM),
    "att_norm": (LAYERS, DIM),
    "wq": (LAYERS, DIM, DIM),
    "wk": (LAYERS, KV_DIM, DIM),
    "wv": (LAYERS, KV_DIM, DIM),
    "wo": (LAYERS, DIM, DIM),
    "ffn_norm": (LAYERS, DIM),
    "w1": (LAYERS, HIDDEN, DIM),
    "w2": (LAYERS, DIM, HIDDEN),
    "w3": (LAYERS, HIDDEN, DIM),
    "norm": (DIM,),
    "freq": (2, SEQ, HEAD // 2),
    "wcls": (VOCAB, DIM),
}


def write_model(path, vocab=VOCAB):
    """Write random weights; a negative vocab says that the output matrix is its own."""
    rng = np.random.default_rng(0)
    parts = {
        name: rng.normal(0, 0.4, shape).astype("<f4")
        for name, shape in PARTS.items()
        if name != "wcls" or vocab < 0
    }
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, SEQ)
    path.write_bytes(header + b"".join(part.tobytes() for part in parts.values()))
    return parts


def reference_logits(p, tokens):
    """The model as run.c computes it.

    Neighbouring features rotate, and matrices are [outputs, inputs].
    """

    def norm(x, w):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * w

    def rotate(x):
        angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
        pairs = x.reshape(len(x), -1, HEAD // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(len(x), -1, HEAD)

    x, T = p["tok"][tokens].astype(np.float64), len(tokens)
    for i in range(LAYERS):
        h = norm(x, p["att_norm"][i])
        q, k = rotate(h @ p["wq"][i].T), rotate(h @ p["wk"][i].T)
        v = (h @ p["wv"][i].T).reshape(T, KV_HEADS, HEAD)
        k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / HEAD**0.5
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", weights, v).reshape(T, DIM) @ p["wo"][i].T
        h = norm(x, p["ffn_norm"][i])
        gate = h @ p["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["w3"][i].T)) @ p["w2"][i].T
    return norm(x, p["norm"]) @ p.get("wcls", p["tok"]).T


@pytest.fixture
def small(tmp_path):
    write_llama2c(tmp_path / "tokenizer.bin", VOCAB)
    return tmp_path / "model.bin", str(tmp_path / "tokenizer.bin")


@pytest.mark.parametrize("vocab", [VOCAB, -VOCAB])
def test_an_imported_model_computes_what_llama2c_does(small, vocab):
    path, tokenizer = small
    parts = write_model(path, vocab)
    imported = models.import_llama2c(str(path), tokenizer, MeshConfig(data=1))
    tokens = np.random.default_rng(1).integers(0, VOCAB, SEQ)
    ours = models._logits(imported.model, imported.params, tokens[None])[0]
    np.testing.assert_allclose(ours, reference_logits(parts, tokens), atol=2e-4)


def test_its_tokenizer_as_tokenizer_json_gives_the_same_ids(small):
    import tokenizers

    path, tokenizer = small
    write_model(path)
    ours = models.import_llama2c(str(path), tokenizer, MeshConfig(data=1)).tokenizer
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json(ours).decode())
    for text in ("the cat acted", "cat", "über\n the", "a  b", ""):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_the_command_makes_a_run(small, tmp_path):
    path, tokenizer = small
    write_model(path)
    arguments = [
        f"--from_llama2c={path}",
        f"--tokenizer={tokenizer}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = call_command("tinylm.convert", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == VOCAB
    assert (tmp_path / "run" / "checkpoints" / "0").exists()
    again = call_command("tinylm.convert", *arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds a run already" in again.stderr


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"PK\x03\x04" + bytes(40), "is a pickle of PyTorch"),
        (b"\x80\x02" + bytes(40), "is a pickle of PyTorch"),
        (b"abc", "is too short"),
        (struct.pack("<7i", 0x616B3432, 1, 2, 3, 4, 5, 6), "newer format"),
        (struct.pack("<7i", 16, 24, 2, 3, 2, 300, 12), "its sizes would be"),
        (
            struct.pack("<7i", 16, 24, 2, 4, 2, 300, 12) + bytes(8),
            "has 36 bytes; its sizes ask for",
        ),
    ],
)
def test_files_that_are_not_such_a_model_are_refused(tmp_path, content, wanted):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=wanted) as caught:
        open_llama2c(path)
    assert "\n" not in str(caught.value)


def test_files_and_tokenizers_that_are_missing_are_named(small, tmp_path):
    path, tokenizer = small
    with pytest.raises(UserError, match=r"model.bin can't be read"):
        models.import_llama2c(str(path), tokenizer)
    write_model(path)
    with pytest.raises(UserError, match="needs --tokenizer=FILE"):
        models.import_llama2c(str(path), "")
    with pytest.raises(UserError, match=r"must be a \.json .*\.model"):
        models.import_llama2c(str(path), str(tmp_path / "x.txt"))


@pytest.mark.parametrize("vocab", [VOCAB + 5, VOCAB - 5])
def test_a_tokenizer_of_another_size_is_refused(small, vocab):
    """A model of llama2.c has a tokenizer of just its size; another one writes other words."""
    path, tokenizer = small
    numbers = struct.pack("<7i", 4, 4, 1, 1, 1, vocab, 2)
    path.write_bytes(numbers + bytes(4 * (vocab * 4 + 4 + 4 * 16 + 4 + 3 * 16 + 4 + 2 * 2 * 2)))
    with pytest.raises(
        UserError, match=rf"has {VOCAB} ids and the model {vocab}; name the one that"
    ):
        models.import_llama2c(str(path), tokenizer)


@pytest.fixture(scope="module")
def stories():
    """A function of a mesh: stories260K on it."""
    folder = data_folder() / "stories260k"

    @functools.cache
    def on(data, model):
        mesh_config = MeshConfig(data=data, model=model, fsdp=True)
        return models.import_llama2c(
            str(folder / "stories260K.bin"), str(folder / "tok512.bin"), mesh_config
        )

    return on, (folder / "expected_greedy_200.txt").read_text()


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2)])
def test_stories260k_writes_what_llama2c_writes(stories, data, model):
    on, expected = stories
    imported, end = on(data, model), 1
    graph = abstract_transformer(imported.model)[0]
    decoder = Decoder(graph, imported.model.context, end, imported.tokenizer.vocab_size)
    with jax.set_mesh(imported.mesh):
        ids = decoder.write(imported.params, [[end]], max_tokens=200, sampler=Sampler(0.0))[0]
    assert imported.tokenizer.decode(ids) == expected


def test_stories260k_goes_on_after_a_prompt_with_its_space(stories):
    on, expected = stories
    imported, shown = on(1, 1), []
    graph = abstract_transformer(imported.model)[0]
    run = Run(
        folder=None,
        config={},
        step=0,
        mesh=imported.mesh,
        model_config=imported.model,
        graph=graph,
        params=imported.params,
        tokenizer=imported.tokenizer,
        start_id=1,
    )
    for stop in ([], ["time"]):
        text = write_texts(
            run, ["Once upon"], max_tokens=20, sampler=Sampler(0.0), stop=stop, show=shown.append
        )[0]
        assert expected.startswith(text.prompt + text.completion)
        assert text.completion.startswith(" a time" if not stop else " a ")
    assert "".join(shown).endswith(text.completion)


def test_samples_keep_the_space_after_their_prompt(small):
    path, tokenizer = small
    write_model(path)
    read = models.import_llama2c(str(path), tokenizer, MeshConfig(data=1)).tokenizer
    evaluator = object.__new__(Evaluator)
    evaluator.config = Config(sample=SampleConfig(prompts=("the",)))
    evaluator.data = types.SimpleNamespace(tokenizer=read)
    evaluator.prompts = [[read.eot_id, *read.encode("the")]]
    evaluator.decoder = types.SimpleNamespace(write=lambda *_, **__: [read.encode("cat")])
    assert evaluator.samples({}) == ["the cat"]


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2)])
def test_stories260k_writes_the_same_without_a_cache(stories, data, model):
    on, expected = stories
    imported = on(data, model)
    graph = abstract_transformer(imported.model)[0]

    # Greedy writing gives the text in which each token is the argmax after those before it.
    ids = [1, *imported.tokenizer.encode(expected)]
    assert len(ids) == 201 and imported.tokenizer.decode(ids[1:]) == expected
    with jax.set_mesh(imported.mesh):
        logits_BTV = jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray([ids[:-1]])))(
            imported.params
        )
    assert np.argmax(logits_BTV[0], axis=-1).tolist() == ids[1:]
