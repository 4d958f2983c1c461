"""What hides behind products is read right from a schedule, in each way in which TPU programs write
asynchronous collectives.

In all cases the link sends 1,000 bytes a second and products take 1,000 FLOPs a second. A gather of
`bf16[40]` over the data axis of 4 sends 60 bytes, in 60 ms; a product of 2 x 5 and 5 x 3 has 60
FLOPs, and takes 60 ms, too.
"""

import pytest

from tinylm.core.chips import Chip
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.tools.overlap import hidden_bytes, is_schedule

CHIP = Chip(peak_flops=1e3, memory_bytes=0, memory_bytes_per_sec=0, link_bytes_per_sec=1e3)
GROUPS = "channel_id={0}, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}"
SHARDS = """  %x = bf16[10]{0} parameter(0)
  %a = f32[2,5]{1,0} parameter(1)
  %b = f32[5,3]{1,0} parameter(2)
"""
DOT = (
    "  %y.{} = f32[2,3]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
)
START = "  %g.{0} = (bf16[10]{{0}}, bf16[40]{{0}}) all-gather-start(%x), " + GROUPS
DONE = "  %d.{0} = bf16[40]{{0}} all-gather-done(%g.{0})"
SYNCHRONOUS = "  %g.{0} = bf16[40]{{0}} all-gather(%x), " + GROUPS
# A generic operation that starts a computation with the collective in it.
WRAPPED_START = "  %g.1 = ((bf16[10]), bf16[40], u32[]) async-start(%x), calls=%wrapped"
WRAPPED_DONE = "  %d.1 = bf16[40]{0} async-done(%g.1)"
CALLED_START = "  %g.1 = ((bf16[10]), bf16[40], u32[]) call-start(%x), to_apply=%wrapped"
CALLED_DONE = "  %d.1 = bf16[40]{0} call-done(%g.1)"
# Fusions that share a channel: one starts, one moves a part while it computes, one waits.
FUSED_START = "  %s = (bf16[10]{0}, bf16[40]{0}, u32[]) fusion(%x), kind=kCustom, calls=%starts"
FUSED_PART = "  %f = f32[2,3]{1,0} fusion(%x, %a, %b), calls=%async_collective_fusion.1"
FUSED_DONE = "  %d.1 = bf16[40]{0} fusion(%s), kind=kCustom, calls=%waits"
CALLED = {
    "wrapped": SYNCHRONOUS.format(1),
    "starts": SYNCHRONOUS.format(1)
    + "\n  ROOT %c = (bf16[10], bf16[40]) custom-call(%g.1), custom_call_target="
    + '"AsyncCollectiveStart"',
    "async_collective_fusion.1": SYNCHRONOUS.format(1) + "\n" + DOT.format(1),
    "waits": SYNCHRONOUS.format(1)
    + '\n  ROOT %c = bf16[40] custom-call(%x, %g.1), custom_call_target="AsyncCollectiveDone"',
}


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=4, model=2))


def program(*lines: str, **called: str) -> str:
    """Return a program of these lines, with the computations that they may call."""
    parts = ["HloModule jit_f, is_scheduled=true"]
    for name, body in {**CALLED, **called}.items():
        parts += [f"%{name} (x: bf16[10]) -> bf16[40] {{", SHARDS + body, "}"]
    parts += ["ENTRY %main (x: bf16[10]) -> bf16[40] {", SHARDS + "\n".join(lines), "}"]
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("lines", "hidden"),
    [
        ([START.format(1), DOT.format(1), DONE.format(1)], 60),
        ([START.format(1), DONE.format(1), DOT.format(1)], 0),
        # It is waited for elsewhere, or never.
        ([START.format(1), DOT.format(1)], 0),
        ([SYNCHRONOUS.format(1), DOT.format(1)], 0),
        # One that isn't asynchronous takes none of the time of a product.
        ([SYNCHRONOUS.format(2), START.format(1), DOT.format(1), DONE.format(1)], 60),
        # Two products hide no more than there is.
        ([START.format(1), DOT.format(1), DOT.format(2), DONE.format(1)], 60),
        # The link takes one after the other: of two gathers one product hides one.
        (
            [START.format(1), START.format(2), DOT.format(1), DONE.format(1), DONE.format(2)],
            60,
        ),
        ([WRAPPED_START, DOT.format(1), WRAPPED_DONE], 60),
        ([WRAPPED_START, WRAPPED_DONE, DOT.format(1)], 0),
        ([CALLED_START, DOT.format(1), CALLED_DONE], 60),
        ([FUSED_START, DOT.format(1), FUSED_DONE], 60),
        ([FUSED_START, FUSED_PART, FUSED_DONE], 60),
        ([FUSED_START, FUSED_DONE, DOT.format(1)], 0),
    ],
)
def test_what_runs_between_start_and_wait_hides_a_collective(mesh, lines, hidden):
    text = program(*lines)
    assert is_schedule(text)
    assert sum(hidden_bytes(text, mesh, CHIP).values()) == pytest.approx(hidden)


def test_a_loop_hides_with_all_its_trips_and_less_what_it_hides_by_itself(mesh):
    """The body's product takes 3 x 60 ms; its own gather of 60 ms is hidden in each trip, and
    leaves nothing for the one around the loop.
    """
    loop = '  %w = (bf16[10]) while(%x), condition=%cond, body=%body, "known_trip_count":{"n":"3"}'
    around = [START.format(1), loop, DONE.format(1)]
    busy = "\n".join([START.format(2), DOT.format(1), DONE.format(2)])
    (sent,) = hidden_bytes(program(*around, body=DOT.format(1)), mesh, CHIP).values()
    assert sent == pytest.approx(60)
    (sent,) = hidden_bytes(program(*around, body=busy), mesh, CHIP).values()
    assert sent == pytest.approx(3 * 60)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[2,3]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 60),
        # Three products of 2 x 5 and 5 x 4, as places of a window most of which lie in padding.
        (
            "f32[2,3,4]{2,1,0} convolution(%p, %q), "
            "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0oi->b0f",
            3 * 2 * 2 * 5 * 4,
        ),
    ],
)
def test_a_convolution_counts_what_is_not_padding(mesh, line, flops):
    text = program(
        START.format(1),
        "  %p = f32[1,2,5]{2,1,0} parameter(3)",
        "  %q = f32[3,4,5]{2,1,0} parameter(4)",
        f"  %y = {line}",
        DONE.format(1),
    )
    slow = Chip(peak_flops=1e4, memory_bytes=0, memory_bytes_per_sec=0, link_bytes_per_sec=1e3)
    (sent,) = hidden_bytes(text, mesh, slow).values()
    assert sent == pytest.approx(flops / 10)
