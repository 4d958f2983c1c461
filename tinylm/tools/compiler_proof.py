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
from typing import Any, NamedTuple

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
# What a config that costs more is scaled down to: rows of a micro-batch, tokens of a row, and sizes
# of the model.
ROWS, LENGTH, VOCAB, HEADS, HEAD_DIM = 8, 128, 512, 4, 32


@dataclasses.dataclass
class Comparison:
    """How far an array of the compiled step, and of its single operations, is off the exact one.

    All three figures are parts of the same unit, as `compare` chooses it.
    """

    kind: str  # what the array is, in words
    name: str  # its path
    compiled: float
    single: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; False for what is not a number."""
        return self.compiled <= self.limit


def prove_compiler(config: Config) -> Proof:
    """Compare the compiled step with its operations one by one.

    Args:
      config: resolved; its step is scaled down where it costs too much.
    """
    shards = batch_shards(make_mesh(config.mesh))
    config, lowered = scaled_down(config, shards)
    found = [*known_programs(), *compare_step(config)]

    rows: list[tuple[str, ...]] = [
        ("", "compiled, off the exact", "one by one, off the exact", "allowed", "")
    ]
    for kind in dict.fromkeys(one.kind for one in found):
        worst = max((one for one in found if one.kind == kind), key=_excess)
        name = worst.name
        if not worst.holds:
            name += ": WRONG"
        figures = (worst.compiled, worst.single, worst.limit)
        rows.append((kind, *(f"{figure:.1e}" for figure in figures), name))

    size = "at its own size"
    if lowered:
        size = f"scaled down to {', '.join(lowered)}"
    claim = (
        f"the compiled step of this config ({size}) does what its operations say, up to rounding"
    )
    return Proof(claim, all(one.holds for one in found), rows)


def _excess(one: Comparison) -> float:
    """Return how many times the limit the difference is; infinity for what is not a number."""
    if not math.isfinite(one.compiled):
        return math.inf
    return one.compiled / one.limit


class _KnownProgram(NamedTuple):
    """A program that some compiler gets wrong, and what it gives in truth."""

    name: str
    function: Callable
    arguments: list[np.ndarray]
    exact: np.ndarray


def known_programs() -> list[Comparison]:
    """Compile the programs that a version of jaxlib is known to get wrong, and run them here.

    tinylm.core.platform has these versions, and the flags that go around the faults.
    """
    rows_NH = np.stack([np.arange(32_769.0), np.zeros(32_769), np.zeros(32_769)], axis=1)
    a_BTK = np.arange(65 * 31 * 5.0).reshape(65, 31, 5) % 7
    b_BK1 = np.arange(65 * 5.0).reshape(65, 5, 1) % 5

    def sum_of_squares(rows_NH: jax.Array) -> jax.Array:
        return jax.vmap(lambda row_H: jnp.sum((jnp.eye(3) @ row_H) ** 2))(rows_NH)

    def sum_of_columns(a_BTK: jax.Array, b_BK1: jax.Array) -> jax.Array:
        return jnp.sum(a_BTK @ jnp.broadcast_to(b_BK1, (65, 5, 8)), axis=2)

    programs = (
        _KnownProgram(
            "sum of squares of a product (jax#39103)",
            sum_of_squares,
            [rows_NH],
            np.sum(rows_NH**2, axis=1),
        ),
        _KnownProgram(
            "sum over a product with a broadcast operand",
            sum_of_columns,
            [a_BTK, b_BK1],
            8 * (a_BTK @ b_BK1)[..., 0],
        ),
    )
    # Accelerators multiply in shorter floats by default.
    limit = 1e-6 if jax.default_backend() == "cpu" else 1e-2
    found = []
    for program in programs:
        narrow = [x.astype(np.float32) for x in program.arguments]
        result = np.asarray(jax.jit(program.function)(*narrow))
        apart = np.max(np.abs(result - program.exact)) / np.max(program.exact)
        found.append(Comparison("known fault", program.name, float(apart), 0.0, limit))
    return found


def compare_step(config: Config) -> list[Comparison]:
    """Return how far each array of the compiled step is off, after WARM_STEPS steps.

    Args:
      config: resolved; the compiled step is that of its mesh.
    """
    batches = [random_batch(config, seed) for seed in range(WARM_STEPS + 1)]
    before, compiled = _compiled_step(config, batches)

    single_config = config.editable_copy()
    # The kernels of accelerators are single operations, which could not be run in float64.
    single_config.model.attention = "xla"
    single_config.mesh = MeshConfig(data=1)
    single_config.freeze()
    mesh = make_mesh(single_config.mesh)
    with jax.set_mesh(mesh):
        train_steps = make_train_steps(make_blueprint(single_config, mesh))

        def step(state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
            return train_steps(state, batch, 1, config.seed, len(batches))

        dispatch = stack_steps([batches[-1]])
        operations = operations_of(step, before, dispatch)
        single = operations.run(before, dispatch)
        exact = operations.run(before, dispatch, wide=True)
    # Accelerators multiply float32, too, in shorter floats: TF32 or bfloat16.
    on_cpu = jax.default_backend() == "cpu"
    products_in = config.model.compute_dtype if on_cpu else "bfloat16"
    return compare(before, compiled, single, exact, products_in)


def _compiled_step(
    config: Config, batches: list[HostBatch]
) -> tuple[TrainState, tuple[TrainState, dict[str, np.ndarray]]]:
    """Take a step for each batch on the config's mesh.

    Returns:
      The state before the last one, and what the last one gave: state and metrics, all on the host.
    """
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh)
    batch_rows = BatchRows(mesh, config.micro_batch_rows)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        train_steps = make_train_steps(blueprint)
        state = blueprint.init(config.seed)
        for batch in batches:
            # The trainer's program takes as many batches as a dispatch has steps, and makes the
            # first of them here.
            dispatch = stack_steps([batch] * config.train.steps_per_dispatch)
            placed = batch_rows.place(dispatch)
            # Dispatching gives the state away.
            before = jax.device_get(state)
            # Only of the last step, and of those to be logged, are all metrics computed.
            state, metrics = train_steps(state, placed, 1, config.seed, len(batches))
    first_metrics = {name: metric[:1] for name, metric in metrics.items()}
    return before, jax.device_get((state, first_metrics))


def random_batch(config: Config, seed: int) -> HostBatch:
    """Return the micro-batches of a step: random tokens, of which one in eight is not a target.

    A packed row holds two texts.
    """
    rng = np.random.default_rng(seed)
    num_rows = config.micro_batch_rows
    seq_len = config.data.seq_len
    shape = (config.train.accumulation_steps, num_rows, seq_len)
    ids_shape = (config.train.accumulation_steps, num_rows, seq_len + 1)
    ids = rng.integers(0, config.model.vocab_size, ids_shape)
    is_target = rng.random(shape) < 7 / 8
    batch = batch_of_ids(ids.astype(np.int32), is_target.astype(np.float32))
    if config.data.packing == "packed":
        starts_shape = (config.train.accumulation_steps, num_rows, 1)
        starts_of_second = rng.integers(1, seq_len, starts_shape)
        positions = np.arange(seq_len)
        is_second = positions >= starts_of_second
        positions = np.where(is_second, positions - starts_of_second, positions)
        batch["segments"] = is_second.astype(np.int32) + 1
        batch["positions"] = positions.astype(np.int32)
    return batch


class _Change(NamedTuple):
    """An array before and after a step, in float64."""

    name: str
    kind: str
    compiled: np.ndarray
    single: np.ndarray
    exact: np.ndarray
    size: float  # of the largest change that the exact step makes in it


def compare(
    before: TrainState, compiled: Any, single: Any, exact: Any, products_in: str
) -> list[Comparison]:
    """Return a comparison for each array of floats of (state, metrics).

    Differences count in parts of what the step changes in an array, or in parts of a metric. Where
    a gradient is zero but for rounding, as that of the bias of keys, they count in thousandths of
    the largest change of its kind.

    Args:
      before: the state before the step.
      compiled: (state, metrics) of the compiled step.
      single: those of its operations one by one.
      exact: the same in float64.
      products_in: the type of floats that are multiplied, by which the limits go.
    """
    # Metrics change from 0.
    num_metrics = len(jax.tree.leaves(compiled[1]))
    olds = [*jax.tree.leaves(before), *([0.0] * num_metrics)]
    singles = jax.tree.leaves(single)
    exacts = jax.tree.leaves(exact)
    changes = []
    for place, (path, new) in enumerate(jax.tree_util.tree_leaves_with_path(compiled)):
        old = olds[place]
        if not np.issubdtype(np.asarray(new).dtype, np.floating) or not np.all(np.isfinite(old)):
            continue
        name = path_text(path)
        exact_64 = np.asarray(exacts[place], np.float64)
        change = _Change(
            name=name,
            kind=_kind(name),
            compiled=np.asarray(new, np.float64),
            single=np.asarray(singles[place], np.float64),
            exact=exact_64,
            size=_largest(exact_64 - np.asarray(old, np.float64)),
        )
        changes.append(change)

    largest_of_kind: dict[str, float] = {}
    for change in changes:
        so_far = largest_of_kind.get(change.kind, 0.0)
        largest_of_kind[change.kind] = max(so_far, change.size)

    epsilon = float(np.finfo(np.float32).eps)
    found = []
    for change in changes:
        unit = max(change.size, largest_of_kind[change.kind] / 1000)
        if not unit:
            continue
        off_compiled = _largest(change.compiled - change.exact) / unit
        off_single = _largest(change.single - change.exact) / unit
        # A change smaller than the array itself is known to the array's last places alone.
        always = LAST_PLACES * epsilon * max(_largest(change.exact) / unit, 1.0)
        if change.compiled.size == 1:
            always = max(always, OF_NUMBERS[products_in])
        limit = RATIO[products_in] * off_single + always
        if change.kind in ("loss", "gradient norm", "gradients"):
            limit = min(limit, SOUND[products_in])
        found.append(Comparison(change.kind, change.name, off_compiled, off_single, limit))
    return found


def _largest(x: np.ndarray) -> float:
    """Return the largest magnitude in an array."""
    return float(np.max(np.abs(x)))


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
    """Return a resolved config that costs at most MOST_FLOPS a step, and what was lowered for it.

    First go rows, then length, vocabulary, layers and width, each only where the step still costs
    too much.

    Args:
      config: resolved.
      shards: parts that the mesh makes of a micro-batch, which keeps a multiple of them.

    Returns:
      The config, and the settings that it differs in, as texts `model.num_layers=2`.
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
    changed = []
    for key, value in lowered.items():
        section, name = key.split(".")
        if value != getattr(getattr(config, section), name):
            changed.append(f"{key}={value}")
    return small.resolve(small.model.vocab_size), changed


def _fewer_rows(config: Config, shards: int) -> dict[str, Any]:
    micro = config.micro_batch_rows
    rows = min(micro, shards * math.ceil(ROWS / shards))
    micro_batches = min(config.train.accumulation_steps, 2)
    return {
        "data.batch_size": rows * micro_batches,
        "train.accumulation_steps": micro_batches,
    }


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
    # Two layers at least, and a whole number of periods.
    period = len(config.model.attention_window)
    num_layers = period * math.ceil(2 / period)
    return {"model.num_layers": min(config.model.num_layers, num_layers)}


def _narrower(config: Config, _: int) -> dict[str, Any]:
    model = config.model
    heads = min(model.num_heads, HEADS)
    head_dim = min(model.head_dim, HEAD_DIM)
    embed = min(model.embed_dim, HEADS * HEAD_DIM)
    attention_scale = model.attention_scale
    if attention_scale == model.head_dim**-0.5:
        attention_scale = head_dim**-0.5
    eights_of_mlp = embed * model.mlp_dim // model.embed_dim // 8
    return {
        "model.embed_dim": embed,
        "model.num_heads": heads,
        "model.num_kv_heads": max(1, heads * model.num_kv_heads // model.num_heads),
        "model.head_dim": head_dim,
        "model.local_heads": math.ceil(heads * model.local_heads / model.num_heads),
        "model.mlp_dim": 8 * max(1, eights_of_mlp),
        "model.attention_scale": attention_scale,
    }
