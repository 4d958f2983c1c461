"""Traffic is read right from compiled programs: against formulas, and in each way in which
compilers write groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.core.mesh import MeshConfig, activation_sharding, make_mesh, replicated
from tinylm.tools.programs import read_collectives


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=4, model=2))


def test_a_collective_in_a_scan_counts_once_a_trip(mesh):
    rows = activation_sharding(mesh, ("batch", None), (8, 16))

    def sums(x):
        def body(carry, _):
            return jax.lax.with_sharding_constraint(jnp.sin(carry), replicated(mesh)) * carry, None

        return jax.lax.scan(body, x, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
    found = read_collectives(jax.jit(sums, out_shardings=rows).lower(x).compile().as_text(), mesh)
    total = sum(one.bytes_per_step for one in found)
    assert {one.axis for one in found} == {"data"}
    assert total % 5 == 0
    assert total >= 5 * 8 * 16 * 4 * 3 / 4


def test_an_all_reduce_sends_twice_its_array(mesh):
    def loss(w, x):
        return jnp.sum(jnp.dot(x, w) ** 2)

    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=replicated(mesh))
    x = jax.ShapeDtypeStruct(
        (8, 32), jnp.float32, sharding=activation_sharding(mesh, ("batch", None), (8, 32))
    )
    compiled = jax.jit(jax.grad(loss), out_shardings=replicated(mesh)).lower(w, x).compile()
    (one,) = read_collectives(compiled.as_text(), mesh)
    assert (one.kind, one.axis) == ("all-reduce", "data")
    assert one.bytes_per_step == 2 * 32 * 32 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "axis", "members"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "model", 2),
        ("replica_groups=[4,2]<=[8]", "model", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "data", 4),
        ("replica_groups=[1,8]<=[8]", "data+model", 8),
        ("replica_groups={}", "data+model", 8),
    ],
)
def test_groups_are_read_in_every_notation(mesh, groups, axis, members):
    gather = f"  ROOT %g = f32[100]{{0}} all-gather(%x), {groups}, dimensions={{0}}"
    (one,) = read_collectives(f"ENTRY %main (x: f32[2]) -> f32[8] {{\n{gather}\n}}", mesh)
    assert (one.kind, one.axis) == ("all-gather", axis)
    assert one.bytes_per_step == pytest.approx(400 * (members - 1) / members)


def test_pieces_of_one_channel_count_once(mesh):
    line = (
        "  %g.{} = (bf16[10]{{0}}, bf16[100]{{0}}) all-gather-start(%x), channel_id=7, "
        "replica_groups=[4,2]<=[8]\n"
    )
    text = "ENTRY %main (x: bf16[2]) -> bf16[8] {\n" + line.format(1) + line.format(2) + "}"
    (one,) = read_collectives(text, mesh)
    assert one.bytes_per_step == 200 * 1 / 2


def test_what_a_shard_map_sends_shares_a_channel_and_each_counts(mesh):
    """Gathers of equal matrices, in a loop that holds the body twice."""

    def layer(x, up, down):
        for matrix in (up, down):
            x = jnp.sin(x @ jax.lax.all_gather(matrix, "data", tiled=True))
        return x

    parts = jax.sharding.PartitionSpec("data")
    on_mesh = jax.shard_map(layer, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)

    def layers(x, up, down):
        return jax.lax.scan(lambda x, both: (on_mesh(x, *both), None), x, (up, down), unroll=2)[0]

    x = jnp.zeros((8, 16))
    matrices = jnp.zeros((4, 16, 16))
    (one,) = read_collectives(
        jax.jit(layers).lower(x, matrices, matrices).compile().as_text(), mesh
    )
    assert (one.kind, one.axis) == ("all-gather", "data")
    assert one.bytes_per_step == 4 * 2 * 16 * 16 * 4 * 3 / 4


def test_gathers_by_hand_that_a_compiler_cuts_into_fusions_count_once_each(mesh):
    """As TPUs' compiler writes those of one shape and name: some get a channel of their own, others
    a chain alone.
    """
    line = (
        "  %g = bf16[100]{{0}} all-gather(%p), channel_id={}, replica_groups=[4,2]<=[8], "
        'frontend_attributes={{chain_id="{}"}}, metadata={{op_name="step/shard_map/all_gather"}}'
    )
    parts, calls = [], []
    for channel, chain in ((2, 0), (1, 1), (1, 2)):
        for piece in ("starts", "moves", "waits"):
            name = f"{piece}.{chain}"
            parts += [f"%{name} (p: bf16[50]) -> bf16[100] {{", line.format(channel, chain), "}"]
            calls.append(f"  %f.{name} = bf16[100]{{0}} fusion(%x), kind=kCustom, calls=%{name}")
    text = "\n".join([*parts, "ENTRY %main (x: bf16[50]) -> bf16[100] {", *calls, "}"])
    (one,) = read_collectives(text, mesh)
    assert one.bytes_per_step == 3 * 200 * 1 / 2


def test_sums_by_hand_over_slices_count_though_their_parts_lose_their_names():
    """The compiler scatters and gathers within a slice, and says no more whose part a line is."""
    mesh = make_mesh(MeshConfig(replica=2, data=4))
    what = "channel_id=1, replica_groups={{0,1,2,3}}"
    lines = []
    for number in (1, 2):
        lines += [
            f"  %s.{number} = f32[25]{{0}} reduce-scatter(%x.{number}), {what}, dimensions={{0}}",
            f"  %g.{number} = f32[100]{{0}} all-gather(%y.{number}), {what}, dimensions={{0}}",
        ]
    lines.append(f"  %a = (f32[10]{{0}}, f32[]) all-reduce(%b, %c), {what}, to_apply=%add")
    text = "\n".join(["ENTRY %main (x: f32[2]) -> f32[8] {", *lines, "}"])
    sent = {one.kind: one.bytes_per_step for one in read_collectives(text, mesh)}
    assert sent == {
        "reduce-scatter": 2 * 400 * 3 / 4,
        "all-gather": 2 * 400 * 3 / 4,
        "all-reduce": 2 * 44 * 3 / 4,
    }


def test_what_slices_send_each_other_is_an_all_reduce_along_the_replicas():
    """On TPUs hosts add it up, and the program sends it to them."""
    mesh = make_mesh(MeshConfig(replica=4, data=2))
    line = (
        "  %send.1 = (f32[37,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %token), channel_id=4,"
        " is_host_transfer=true, frontend_attributes={"
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    program = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n{line}\n}}"
    (found,) = read_collectives(program, mesh)
    assert (found.kind, found.axis) == ("all-reduce", "replica")
    # Both are counted, though they have the number of one channel.
    assert found.bytes_per_step == 2 * 2 * 37 * 8 * 128 * 4 * 3 / 4


EXCHANGE = """%gather (p: bf16[10]) -> bf16[80] {
  %all = bf16[80]{0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%exchange (q: bf16[10]) -> bf16[80] {
  %there = bf16[60]{0} ragged-all-to-all(%q, %zero, %a, %b, %a, %b), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="real_rows_40_of_60/ragged_all_to_all"}
  %back = bf16[40]{0} ragged-all-to-all(%there, %zero, %a, %b, %a, %b), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="real_rows_40_of_40/ragged_all_to_all"}
}

ENTRY %main (x: bf16[10]) -> bf16[80] {
  %y = bf16[80]{0} conditional(%there_is_room, %x, %x), branch_computations={%gather, %exchange}
}"""


def test_of_an_exchange_of_rows_those_count_that_are_sent_where_loads_are_even(mesh):
    """The unused room for more rows doesn't count, nor does the branch for rows that don't fit."""
    (one,) = read_collectives(EXCHANGE, mesh)
    assert (one.kind, one.axis) == ("all-to-all", "data")
    assert one.bytes_per_step == 2 * 40 * 2 * 3 / 4


def test_a_permutation_lies_on_the_axis_of_its_pairs(mesh):
    text = (
        "ENTRY %main (x: f32[2]) -> f32[8] {\n"
        "  ROOT %p = f32[4]{0} collective-permute(%x), channel_id=1, "
        "source_target_pairs={{1,1},{0,2},{2,4}}\n}"
    )
    (one,) = read_collectives(text, mesh)
    assert (one.kind, one.axis, one.bytes_per_step) == (
        "collective-permute",
        "data",
        np.float32(16),
    )


LOOP = """%body (p: (bf16[10], u32[])) -> (bf16[10], u32[]) {
  %p = (bf16[10]{0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %step = u32[] constant(2)
  %shard = bf16[10]{0} get-tuple-element(%p), index=0
  %moved = bf16[10]{0} collective-permute(%shard), channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  %piece = bf16[40]{0} all-gather(%shard), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %next = u32[] add(%i, %step)
  ROOT %out = (bf16[10]{0}, u32[]) tuple(%moved, %next)
}

%condition (p.1: (bf16[10], u32[])) -> pred[] {
  %p.1 = (bf16[10]{0}, u32[]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=1
  %limit = u32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[10]) -> bf16[10] {
  %rest = bf16[40]{0} all-gather(%x), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %loop = (bf16[10]{0}, u32[]) while(%start), condition=%condition, body=%body
}"""


def test_a_windowed_product_sends_in_each_trip_of_a_counter_that_grows_by_two(mesh):
    """And a gather that starts outside of the loop and overlaps with it counts once."""
    gather, permute = read_collectives(LOOP, mesh)
    assert (permute.kind, permute.bytes_per_step) == ("collective-permute", 4 * 20)
    assert (gather.kind, gather.bytes_per_step) == ("all-gather", 80 * 3 / 4)


def test_an_all_reduce_in_a_fusion_that_keeps_a_slice_is_a_reduce_scatter(mesh):
    """Two of them count twice where both are by hand, which gives them the same channel."""
    fusion = """%all-reduce-scatter.{0} (input: bf16[40]) -> bf16[10] {{
  %sum = bf16[40]{{0}} all-reduce(%input), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %slice = bf16[10]{{0}} dynamic-slice(%sum, %place), dynamic_slice_sizes={{10}}
}}
"""
    call = "  %f.{0} = bf16[10]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.{0}\n"
    text = fusion.format(1) + fusion.format(2) + "ENTRY %main (x: bf16[40]) -> bf16[10] {\n"
    text += call.format(1) + call.format(2) + "}"
    (one,) = read_collectives(text, mesh)
    assert (one.kind, one.axis, one.bytes_per_step) == ("reduce-scatter", "data", 2 * 80 * 3 / 4)
