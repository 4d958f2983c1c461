"""The proof that this machine's compiler makes of the train step what its operations say.

The step is compiled as the trainer compiles it, on the config's mesh, and run. Then its operations
are run one by one on one device: in their own types, and in float64, which is exact for all that
float32 can tell. Rounding explains as much as the single operations themselves are off the exact
step; the compiled step may be off a few times as far, since it adds up in another order. What is
compared are loss, gradient norm, gradients (as the optimizer's first moments hold them), second
moments, parameters, and the metrics of the step.

A wrong fusion needs certain shapes, which a config may not have: so the programs of known faults
are compiled, too.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.batch import BatchRows, HostBatch, batch_of_ids, stack_steps
from tinylm.core.mesh import MeshConfig, batch_shards, make_mesh
from tinylm.core.text import path_text
from tinylm.model.flops import train_flops_per_token
from tinylm.tools.op_by_op import operations_of
from tinylm.tools.prove import Proof
from tinylm.train.config import Config
from tinylm.train.state import TrainState, make_blueprint
from tinylm.train.step import make_train_steps

# An array of the compiled step may be this many times as far off as that of its single operations,
# and farther by some units in the last place of float32, in which it is kept and its kind added up.
# Seen over the configs that ship, on three meshes: at most 3.1 times in float32. In bfloat16, where
# gradients of biases are long sums of rounded terms, at most 12.5 times (with XLA's optimizations
# off; 7.4 times with them).
RATIO = {"float32": 8.0, "bfloat16": 16.0}
LAST_PLACES = 16
# A single number, as the loss, may by chance be exact where operations run one by one; this much is
# always allowed.
OF_NUMBERS = {"float32": 2e-6, "bfloat16": 2e-3}
# Single operations that are farther off than this are themselves wrong.
SOUND = {"float32": 1e-3, "bfloat16": 0.3}
# What a step may cost to be run in NumPy's float64 within seconds on two cores.
MOST_FLOPS = 1e10
# Before the step that is compared, so that moments, biases and scales are not what they begin as.
WARM_STEPS = 2
ROWS, LENGTH, VOCAB, HEADS, HEAD_DIM = 8, 128, 512, 4, 32


@dataclasses.dataclass
class Comparison:
    """How far an array of the compiled step, and of its single operations, is off the exact one."""

    kind: str
    name: str
    compiled: float
    single: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; False for what is not a number."""
        return self.compiled <= self.limit


def prove_compiler(config: Config) -> Proof:
    """Compare the compiled step of a config whose vocabulary is known with its operations one by
    one.
    """
    devices = batch_shards(make_mesh(config.mesh))
    config, scaled = scaled_down(config, devices)
    found = [*known_programs(), *compare_step(config)]
    rows = [("", "compiled, off the exact", "one by one, off the exact", "allowed", "")]
    for kind in dict.fromkeys(one.kind for one in found):
        worst = max((one for one in found if one.kind == kind), key=lambda one: _excess(one))
        rows.append(
            (
                kind,
                f"{worst.compiled:.1e}",
                f"{worst.single:.1e}",
                f"{worst.limit:.1e}",
                worst.name if worst.holds else f"{worst.name}: WRONG",
            )
        )
    size = f"scaled down to {', '.join(scaled)}" if scaled else "at its own size"
    return Proof(
        f"the compiled step of this config ({size}) does what its operations say, up to rounding",
        all(one.holds for one in found),
        rows,
    )


def _excess(one: Comparison) -> float:
    """Return how many times the limit the difference is; infinity for what is not a number."""
    return one.compiled / one.limit if math.isfinite(one.compiled) else math.inf


def known_programs() -> list[Comparison]:
    """Compile the programs that a version of jaxlib is known to get wrong (tinylm.core.platform) on
    this machine.
    """
    rows_NH = np.stack([np.arange(32_769.0), np.zeros(32_769), np.zeros(32_769)], axis=1)
    a_BTK = np.arange(65 * 31 * 5.0).reshape(65, 31, 5) % 7
    b_BK1 = np.arange(65 * 5.0).reshape(65, 5, 1) % 5

    def sum_of_squares(rows_NH: jax.Array) -> jax.Array:
        return jax.vmap(lambda row_H: jnp.sum((jnp.eye(3) @ row_H) ** 2))(rows_NH)

    def sum_of_columns(a_BTK: jax.Array, b_BK1: jax.Array) -> jax.Array:
        return jnp.sum(a_BTK @ jnp.broadcast_to(b_BK1, (65, 5, 8)), axis=2)

    programs: tuple[tuple[str, Callable, list[np.ndarray], np.ndarray], ...] = (
        (
            "sum of squares of a product (jax#39103)",
            sum_of_squares,
            [rows_NH],
            np.sum(rows_NH**2, axis=1),
        ),
        (
            "sum over a product with a broadcast operand",
            sum_of_columns,
            [a_BTK, b_BK1],
            8 * (a_BTK @ b_BK1)[..., 0],
        ),
    )
    found = []
    for name, function, arguments, exact in programs:
        narrow = [x.astype(np.float32) for x in arguments]
        apart = float(
            np.max(np.abs(np.asarray(jax.jit(function)(*narrow)) - exact)) / np.max(exact)
        )
        # Accelerators multiply in shorter floats by default.
        limit = 1e-6 if jax.default_backend() == "cpu" else 1e-2
        found.append(Comparison("known fault", name, apart, 0.0, limit))
    return found


def compare_step(config: Config) -> list[Comparison]:
    """Return how far each array of a resolved config's compiled step is off, after WARM_STEPS
    steps.
    """
    batches = [random_batch(config, seed) for seed in range(WARM_STEPS + 1)]
    before, compiled = _compiled_step(config, batches)
    single_config = config.editable_copy()
    single_config.model.attention = "xla"
    single_config.mesh = MeshConfig(data=1)
    mesh = make_mesh(single_config.mesh)
    with jax.set_mesh(mesh):
        steps = _train_steps(single_config, mesh)[1]
        placed = {name: x[None] for name, x in batches[-1].items()}
        operations = operations_of(
            lambda state, batch: steps(state, batch, 1, config.seed), before, placed
        )
        single = operations.run(before, placed)
        exact = operations.run(before, placed, wide=True)
    return compare(before, compiled, single, exact, config.model.compute_dtype)


def _train_steps(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, Callable]:
    """Return the blueprint of a config on a mesh, and its steps as the trainer makes them."""
    blueprint = make_blueprint(config, mesh)
    return blueprint, make_train_steps(blueprint)


def _compiled_step(config: Config, batches: list[dict[str, np.ndarray]]) -> tuple[TrainState, Any]:
    """Take a step for each batch on the config's mesh; return the state before the last one, and
    what that gave.
    """
    mesh = make_mesh(config.mesh)
    config.check_mesh(batch_shards(mesh))
    batch_rows = BatchRows(mesh, config.micro_batch_rows)
    with jax.set_mesh(mesh):
        blueprint, steps = _train_steps(config, mesh)
        state = blueprint.init(config.seed)
        for batch in batches:
            # The trainer's program takes as many batches as a dispatch has steps, and makes the
            # first of them here.
            placed = batch_rows.place(stack_steps([batch] * config.train.steps_per_dispatch))
            before = jax.device_get(state)
            state, metrics = steps(state, placed, 1, config.seed)
    return before, jax.device_get((state, {name: x[:1] for name, x in metrics.items()}))


def random_batch(config: Config, seed: int) -> HostBatch:
    """Return the micro-batches of a step: random tokens, of which one in eight is no target;
    packed, of two texts.
    """
    rng = np.random.default_rng(seed)
    shape = (config.train.accumulation_steps, config.micro_batch_rows, config.data.seq_len)
    ids = rng.integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    weights = (rng.random(shape) < 7 / 8).astype(np.float32)
    batch = batch_of_ids(ids, weights)
    if config.data.packing == "packed":
        starts = rng.integers(1, shape[2], (*shape[:2], 1))
        positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
        second = positions >= starts
        batch["segments"] = second.astype(np.int32) + 1
        batch["positions"] = np.where(second, positions - starts, positions).astype(np.int32)
    return batch


def compare(
    before: TrainState, compiled: Any, single: Any, exact: Any, compute_dtype: str
) -> list[Comparison]:
    """Return a comparison for each array of floats of (state, metrics).

    Differences count in parts of what the step changes in an array, or in parts of a metric. Where
    a gradient is zero but for rounding, as that of the bias of keys, they count in thousandths of
    the largest change of its kind.
    """
    epsilon = float(np.finfo(np.float32).eps)
    olds = [*jax.tree.leaves(before), *([0.0] * len(jax.tree.leaves(compiled[1])))]
    arrays = []
    for (path, new), one, true, old in zip(
        jax.tree_util.tree_leaves_with_path(compiled),
        jax.tree.leaves(single),
        jax.tree.leaves(exact),
        olds,
        strict=True,
    ):
        if np.issubdtype(np.asarray(new).dtype, np.floating) and np.all(np.isfinite(old)):
            name = path_text(path)
            new, one, true, old = (np.asarray(x, np.float64) for x in (new, one, true, old))
            arrays.append((_kind(name), name, new, one, true, float(np.max(np.abs(true - old)))))
    largest: dict[str, float] = {}
    for kind, *_, change in arrays:
        largest[kind] = max(largest.get(kind, 0.0), change)
    found = []
    for kind, name, new, one, true, change in arrays:
        unit = max(change, largest[kind] / 1000)
        if not unit:
            continue
        off_single = float(np.max(np.abs(one - true))) / unit
        places = LAST_PLACES * epsilon * max(float(np.max(np.abs(true))) / unit, 1.0)
        limit = RATIO[compute_dtype] * off_single + max(
            places, OF_NUMBERS[compute_dtype] if new.size == 1 else 0.0
        )
        if kind in ("loss", "gradient norm", "gradients"):
            limit = min(limit, SOUND[compute_dtype])
        found.append(
            Comparison(kind, name, float(np.max(np.abs(new - true))) / unit, off_single, limit)
        )
    return found


def _kind(name: str) -> str:
    """Return what an array of (state, metrics) is, in words, by its path."""
    parts = name.split("/")
    if "params" in parts:
        return "parameters"
    if "mu" in parts:
        return "gradients"
    if "nu" in parts:
        return "second moments"
    words = {"loss": "loss", "grad_norm": "gradient norm"}
    return words.get(parts[-1], "other")


def scaled_down(config: Config, shards: int) -> tuple[Config, list[str]]:
    """Return a resolved config that costs at most MOST_FLOPS a step, and the settings that were
    lowered for it.

    First go rows, then length, vocabulary, layers and width, each only where the step still costs
    too much; a micro- batch keeps a multiple of the `shards` that the mesh makes of it.
    """
    small = config.editable_copy()
    lowered: dict[str, Any] = {}
    for lower in (_fewer_rows, _shorter, _fewer_tokens, _fewer_layers, _narrower):
        tokens = small.data.batch_size * small.data.seq_len
        if tokens * train_flops_per_token(small.model, small.data.seq_len) <= MOST_FLOPS:
            break
        lowered |= lower(small, shards)
        for key, value in lowered.items():
            section, name = key.split(".")
            setattr(getattr(small, section), name, value)
    small = small.resolve(small.model.vocab_size)
    changed = [
        f"{key}={value}"
        for key, value in lowered.items()
        if value != getattr(getattr(config, key.split(".")[0]), key.split(".")[1])
    ]
    return small, changed


def _fewer_rows(config: Config, shards: int) -> dict[str, Any]:
    micro = config.micro_batch_rows
    rows = min(micro, shards * -(-ROWS // shards))
    steps = min(config.train.accumulation_steps, 2)
    return {"data.batch_size": rows * steps, "train.accumulation_steps": steps}


def _shorter(config: Config, _: int) -> dict[str, Any]:
    length = min(config.data.seq_len, LENGTH)
    windows = tuple(min(window, length // 2) for window in config.model.attention_window)
    return {
        "data.seq_len": length,
        "model.context": length,
        "model.attention_window": windows,
        "model.loss_chunks": math.gcd(config.model.loss_chunks, length),
    }


def _fewer_tokens(config: Config, _: int) -> dict[str, Any]:
    return {"model.vocab_size": min(config.model.vocab_size, VOCAB)}


def _fewer_layers(config: Config, _: int) -> dict[str, Any]:
    period = len(config.model.attention_window)
    return {"model.num_layers": min(config.model.num_layers, period * -(-2 // period))}


def _narrower(config: Config, _: int) -> dict[str, Any]:
    model = config.model
    heads = min(model.num_heads, HEADS)
    head_dim = min(model.head_dim, HEAD_DIM)
    embed = min(model.embed_dim, HEADS * HEAD_DIM)
    own_scale = model.attention_scale == model.head_dim**-0.5
    return {
        "model.embed_dim": embed,
        "model.num_heads": heads,
        "model.num_kv_heads": max(1, heads * model.num_kv_heads // model.num_heads),
        "model.head_dim": head_dim,
        "model.local_heads": -(-heads * model.local_heads // model.num_heads),
        "model.mlp_dim": 8 * max(1, embed * model.mlp_dim // model.embed_dim // 8),
        "model.attention_scale": head_dim**-0.5 if own_scale else model.attention_scale,
    }
