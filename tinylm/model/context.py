"""Attention over rows that the mesh splits by position.

Three forms, which give the same numbers:

- `ring`: blocks of keys and values go round the devices of a row while their products run (Liu et
  al. 2023, "Ring attention"). A device never holds more than two blocks. In the balanced order of
  `core.ring` each block after a device's own makes two products, of the same size on every device:

      late queries x early keys, always; and by which of the two devices comes first in the row,
      early queries x early keys, or late queries x late keys

  For the backward pass only q, k, v, o and the log-normalizers are kept: the blocks go round once
  more, with the gradients of each, which come home at the end. Letting JAX differentiate the loop
  would keep a block for each step, with `jax.checkpoint` on the steps too: that is the whole row.
- `gather`: each device gathers the keys and values of the row. It sends as much, in one piece, and
  makes 1.5 times the products, because early queries meet half of the row and late ones all of it;
  but on TPUs splash takes it (`splash_rows`), which makes no more products than the ring, and
  leaves the logits on the chip. XLA writes them to memory and reads them again, which takes some
  ten times as long as making them.
- `neighbours`, in place of both: where the window of all heads ends within the stretch before, that
  part of it alone is sent.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv
head, H head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.collectives import on_shards
from tinylm.core.log import say_once
from tinylm.core.ring import (
    ends_before,
    gather_ring,
    gather_row,
    parts_of_rows,
    pass_on,
    ring_place,
    ring_size,
)
from tinylm.model.blockwise import (
    Gradients,
    Keys,
    Queries,
    Sums,
    Weighing,
    as_cotangents,
    attend_in_blocks,
    attend_to,
    gradients_of,
    join_blocks,
    joined_keys,
    largest_divisor,
    make_answers,
    merge,
)
from tinylm.model.config import ModelConfig
from tinylm.model.kernels import (
    AttentionOptions,
    KernelChoice,
    heads_axes,
    with_own_kv_heads,
)
from tinylm.model.splash_rows import splash_over_gathered
from tinylm.model.visibility import Visibility

# A window that reaches beyond every row.
_NO_WINDOW = np.iinfo(np.int32).max


def choose_form(wanted: str, stretch: int, choice: KernelChoice) -> str:
    """Return how a layer attends over rows in the balanced order: ring, gather, splash (of what is
    gathered) or neighbours.

    Args:
      wanted: model.context_attention; auto takes the one with the least time, as said above.
      stretch: positions of a stretch, of which a device has two.
      choice: what else decides.
    """
    is_near = 0 < choice.window <= stretch + 1
    if is_near and not choice.two_kinds_of_heads:
        return "neighbours"
    if wanted != "ring" and choice.takes_splash(stretch):
        return "splash"
    return "ring" if wanted == "auto" else wanted


def planned_form(model: ModelConfig, window: int, stretch: int, platform: str) -> str:
    """Return the form that a layer of a model takes in training, on a platform."""
    choice = KernelChoice.in_training(model, window, platform)
    return choose_form(model.context_attention, stretch, choice)


def context_attention(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
    *,
    wanted: str,
    choice: KernelChoice,
) -> jax.Array:
    """Attend where the mesh splits positions; otherwise as `attention.attend`.

    Args:
      q_BNTH, k_BKSH, v_BKSH: queries, keys and values of the same positions.
      visibility: which keys a query sees.
      options: scale, soft cap and dropout of the weights.
      wanted: model.context_attention. Rows that are not in the balanced order are gathered.
      choice: what else decides the form.
    """
    num_heads, length = q_BNTH.shape[1:3]
    window = visibility.window
    order_T = visibility.order_T
    if order_T is None:
        form = "gather"
    else:
        form = choose_form(wanted, length // (2 * parts_of_rows(length)), choice)
    if choice.kernel in ("cudnn", "splash") and form != "splash":
        say_once(
            f"model.attention={choice.kernel} is off: rows that mesh.context splits attend by "
            f"{form} here, in XLA's own operations."
        )
    if form == "splash":
        return splash_over_gathered(q_BNTH, k_BKSH, v_BKSH, visibility, options)

    # What masks need to know of queries and keys, by the names in `Queries`.
    masks_need: dict[str, tuple[jax.Array, tuple]] = {}
    if order_T is None:
        order_T = jnp.arange(length, dtype=jnp.int32)
    masks_need["position_T"] = (order_T, ("positions",))
    if visibility.segments_BT is not None:
        segments_BT = visibility.segments_BT.astype(jnp.int32)
        masks_need["segments_BT"] = (segments_BT, ("batch", "positions"))
    if window:
        window_N = np.full(num_heads, window, np.int32)
        if visibility.local_heads:
            window_N[visibility.local_heads :] = _NO_WINDOW
        masks_need["window_KG"] = (jnp.asarray(window_N), ("heads",))
    dropout = options.dropout
    if dropout.active:
        masks_need["head_KG"] = (jnp.arange(num_heads), ("heads",))
        assert dropout.row_keys_B is not None, "active dropout has keys"
        key_words_B2 = jax.random.key_data(dropout.row_keys_B)
        masks_need["key_words_B2"] = (key_words_B2, ("batch", None))
    weighing = Weighing(
        softcap=options.softcap,
        threshold=dropout.threshold if dropout.active else 0,
        factor=dropout.factor,
        num_heads=num_heads,
        row_length=length,
    )

    def on_device(
        q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *needed: jax.Array
    ) -> jax.Array:
        B, N, T, H = q_BNTH.shape
        K = k_BKSH.shape[1]
        of: dict[str, Any] = dict(zip(masks_need, needed, strict=True))
        for name in ("window_KG", "head_KG"):
            if name in of:
                of[name] = of[name].reshape(K, N // K)
        queries = Queries(q_BNTH.reshape(B, K, N // K, T, H), **of)
        keys = Keys(k_BKSH, v_BKSH, queries.position_T, queries.segments_BT)
        if form == "neighbours":
            o_BKGTH = _with_neighbours(weighing, queries, keys, window)
        elif form == "ring":
            o_BKGTH = _ring(weighing, queries, keys)
        else:
            is_balanced = visibility.order_T is not None
            o_BKGTH = _gathered(weighing, queries, keys, is_balanced)
        return o_BKGTH.reshape(B, N, T, H)

    scaled_BNTH = (q_BNTH * options.scale).astype(q_BNTH.dtype)
    k_BKSH, v_BKSH, kv_heads = with_own_kv_heads(q_BNTH, k_BKSH, v_BKSH)
    return on_shards(
        on_device,
        (scaled_BNTH, heads_axes("heads")),
        (k_BKSH, heads_axes(kv_heads)),
        (v_BKSH, heads_axes(kv_heads)),
        *masks_need.values(),
    )


def _gathered(weighing: Weighing, queries: Queries, keys: Keys, is_balanced: bool) -> jax.Array:
    """Return o_BKGTH of this device's queries over the keys of all devices."""
    gather = gather_row if is_balanced else gather_ring
    # One gather of both; whole numbers are few.
    k_BKSH, v_BKSH = gather(jnp.stack([keys.k_BKSH, keys.v_BKSH]), 3)
    keys = keys.mapped(gather)._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH)
    if not is_balanced:
        return attend_in_blocks(weighing, queries, keys)
    early, late = _halves_of_queries(queries)
    # An early query sees nothing beyond the first half of the row.
    first_half, _ = _halves_of_keys(keys)
    o_early = attend_in_blocks(weighing, early, first_half)
    o_late = attend_in_blocks(weighing, late, keys)
    return jnp.concatenate([o_early, o_late], axis=3)


def _with_neighbours(weighing: Weighing, queries: Queries, keys: Keys, window: int) -> jax.Array:
    """Return o_BKGTH where no query sees further back than the stretch before its own."""
    reach = window - 1
    before = keys.mapped(lambda x, axis: ends_before(x, axis, reach))
    stretches = zip(
        _halves_of_queries(queries),
        _halves_of_keys(keys),
        _halves_of_keys(before),
        strict=True,
    )
    o_parts = []
    for own, own_keys, keys_before in stretches:
        # Before a row's first position come zeros, which are none of the row's.
        first = own_keys.position_S[0]
        position_S = first + jnp.arange(-reach, 0)
        keys_before = keys_before._replace(position_S=position_S)
        near = joined_keys(keys_before, own_keys)
        o_parts.append(_near_attention(weighing, own, near, window))
    return jnp.concatenate(o_parts, axis=3)


def _near_attention(weighing: Weighing, queries: Queries, keys: Keys, window: int) -> jax.Array:
    """Return o_BKGTH of queries over the keys from `window - 1` before the first of them on.

    Blocks of queries meet only the keys that some query of theirs sees.
    """
    length = len(queries.position_T)
    # A block of as many queries as the window is long meets twice as many keys.
    block = largest_divisor(length, max(window, 128))

    def attend_block(start: jax.Array | int) -> jax.Array:
        part = queries.cut(start, block)
        part_keys = keys.cut(start, window - 1 + block)
        return attend_in_blocks(weighing, part, part_keys)

    if block == length:
        return attend_block(0)
    starts = jnp.arange(0, length, block)
    return join_blocks(jax.lax.map(attend_block, starts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(weighing: Weighing, queries: Queries, keys: Keys) -> jax.Array:
    """Return o_BKGTH of this device's queries over the keys that go round."""
    return _ring_forward(weighing, queries, keys)[0]


def _ring_forward(weighing: Weighing, queries: Queries, keys: Keys) -> tuple[jax.Array, tuple]:
    """Return o_BKGTH, and what the backward pass needs."""
    early, late = _halves_of_queries(queries)
    # What is sent arrives while the own products run.
    arriving = pass_on(keys)
    own_early, _ = _halves_of_keys(keys)
    early_sums = attend_to(weighing, early, own_early)
    late_sums = attend_to(weighing, late, keys)

    def add_block(
        sums: tuple[Sums, Sums], keys: Keys, distance: jax.Array | int
    ) -> tuple[Sums, Sums]:
        """Add the block of the device that is `distance` places before this one."""
        early_sums, late_sums = sums
        early_keys, late_keys = _halves_of_keys(keys)
        more = attend_to(weighing, late, early_keys, all_earlier=True)
        late_sums = merge(late_sums, more)
        # Whether that device comes before this one in the row; the ring goes on from last to first.
        is_before = ring_place() >= distance
        chosen = _chosen(is_before, early, late)
        chosen_keys = _chosen(is_before, early_keys, late_keys)
        more = attend_to(weighing, chosen, chosen_keys, all_earlier=True)
        merged = merge(_chosen(is_before, early_sums, late_sums), more)
        early_sums = _chosen(is_before, merged, early_sums)
        late_sums = _chosen(is_before, late_sums, merged)
        return early_sums, late_sums

    def step(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
        sums, keys = carry
        arriving = pass_on(keys)
        sums = add_block(sums, keys, distance)
        return (sums, arriving), None

    last = ring_size() - 1
    carry = ((early_sums, late_sums), arriving)
    (sums, arriving), _ = jax.lax.scan(step, carry, jnp.arange(1, last))
    early_sums, late_sums = add_block(sums, arriving, last)
    o_parts = [early_sums.o_BKGTH, late_sums.o_BKGTH]
    log_z_parts = [early_sums.log_z_BKGT, late_sums.log_z_BKGT]
    o_BKGTH = jnp.concatenate(o_parts, axis=3).astype(queries.q_BKGTH.dtype)
    log_z_BKGT = jnp.concatenate(log_z_parts, axis=3)
    return o_BKGTH, (queries, keys, o_BKGTH, log_z_BKGT)


def _ring_backward(weighing: Weighing, kept: tuple, do_BKGTH: jax.Array) -> tuple[Queries, Keys]:
    """Send the blocks round once more, and after each the sums of its gradients."""
    queries, keys, o_BKGTH, log_z_BKGT = kept
    early, late = _halves_of_queries(queries)
    answers = make_answers(do_BKGTH, o_BKGTH, log_z_BKGT)
    half = len(queries.position_T) // 2
    of_early = answers.cut(0, half)
    of_late = answers.cut(half, half)

    arriving = pass_on(keys)
    own_early, _ = _halves_of_keys(keys)
    from_early = gradients_of(weighing, early, own_early, of_early)
    from_late = gradients_of(weighing, late, keys, of_late)
    dq = (from_early.dq_BKGTH, from_late.dq_BKGTH)
    own_dkv = (
        _added_to_early(from_late.dk_BKSH, from_early.dk_BKSH),
        _added_to_early(from_late.dv_BKSH, from_early.dv_BKSH),
    )

    def add_block(dq: tuple, keys: Keys, distance: jax.Array | int) -> tuple[tuple, tuple]:
        """Return dq with what a block adds to it, and the gradients of the block."""
        dq_early, dq_late = dq
        early_keys, late_keys = _halves_of_keys(keys)
        more = gradients_of(weighing, late, early_keys, of_late, all_earlier=True)
        dq_late = dq_late + more.dq_BKGTH
        is_before = ring_place() >= distance
        chosen: Gradients = gradients_of(
            weighing,
            _chosen(is_before, early, late),
            _chosen(is_before, early_keys, late_keys),
            _chosen(is_before, of_early, of_late),
            all_earlier=True,
        )
        dq_early = dq_early + jnp.where(is_before, chosen.dq_BKGTH, 0)
        dq_late = dq_late + jnp.where(is_before, 0, chosen.dq_BKGTH)

        def of_block(of_all: jax.Array, of_chosen: jax.Array) -> jax.Array:
            of_early_keys = of_all + jnp.where(is_before, of_chosen, 0)
            of_late_keys = jnp.where(is_before, 0, of_chosen)
            return jnp.concatenate([of_early_keys, of_late_keys], axis=2)

        dk_BKSH = of_block(more.dk_BKSH, chosen.dk_BKSH)
        dv_BKSH = of_block(more.dv_BKSH, chosen.dv_BKSH)
        return (dq_early, dq_late), (dk_BKSH, dv_BKSH)

    def step(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
        dq, keys, dkv = carry
        arriving = pass_on(keys)
        # The sums of this block so far, from the device before.
        dkv_so_far = pass_on(dkv)
        dq, dkv = add_block(dq, keys, distance)
        dkv = jax.tree.map(jnp.add, dkv_so_far, dkv)
        return (dq, arriving, dkv), None

    last = ring_size() - 1
    if last > 1:
        following = pass_on(arriving)
        dq, dkv = add_block(dq, arriving, 1)
        carry = (dq, following, dkv)
        (dq, arriving, dkv), _ = jax.lax.scan(step, carry, jnp.arange(2, last))
        dkv_so_far = pass_on(dkv)
        dq, dkv = add_block(dq, arriving, last)
        dkv = jax.tree.map(jnp.add, dkv_so_far, dkv)
    else:
        dq, dkv = add_block(dq, arriving, last)
    # The block of the last step is that of the next device.
    dk_BKSH, dv_BKSH = jax.tree.map(jnp.add, own_dkv, pass_on(dkv))
    dq_BKGTH = jnp.concatenate(dq, axis=3)
    return as_cotangents(queries, keys, Gradients(dq_BKGTH, dk_BKSH, dv_BKSH))


_ring.defvjp(_ring_forward, _ring_backward)


def _halves_of_queries(queries: Queries) -> tuple[Queries, Queries]:
    """Return those of the early and of the late stretch."""
    half = len(queries.position_T) // 2
    early = queries.cut(0, half)
    late = queries.cut(half, half)
    return early, late


def _halves_of_keys(keys: Keys) -> tuple[Keys, Keys]:
    """Return those of the early and of the late stretch."""
    half = len(keys.position_S) // 2
    early = keys.cut(0, half)
    late = keys.cut(half, half)
    return early, late


def _chosen(is_first: jax.Array, first: Any, second: Any) -> Any:
    """Return the one or the other of two trees of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)


def _added_to_early(x_BKSH: jax.Array, early_BKSH: jax.Array) -> jax.Array:
    """Return `x` with an array of half its length added to its first half."""
    half = early_BKSH.shape[2]
    return x_BKSH.at[:, :, :half].add(early_BKSH)
