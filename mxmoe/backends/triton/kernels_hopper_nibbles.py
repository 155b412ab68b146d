# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
Runs of 4-bit weights against 8-bit rows, within `kernels_hopper.divided_gemm`.

Y^T = W X^T, so that decoded weights go to the matrix unit from registers. A tile is 128 channels, with a gate 64 of
each matrix, times 16 to 128 rows; either warpgroup has 32 of the channels of both halves, eight rows of one and eight
of the other in turn, so that gate and up meet in one thread. A step is one unit of 128 channels of k; with a scale per
group its sums are scaled while the other warpgroup multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxmoe.backends.triton.decode import E4M3_STEP, HIGH_NIBBLES, INT8_STEP, SUBNORMALS
from mxmoe.backends.triton.kernels_hopper_ring import (
    COLUMNS,
    FIRST,
    GATED,
    GROUP,
    HEIGHT,
    LOW_BOX,
    STAGES,
    TALL_BOX,
    K,
    N,
    addresses,
    fetch,
    find,
    next_buffer,
    store_channels,
    take,
)

HALF = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 64]
    )
)
"""Codes of 32 channels: who holds a row of gate's operand, thread and register, holds the same row of up's."""
LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]], [[0, 4], [0, 8], [0, 64], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [16, 128]
    )
)
"""The same, two channels a line."""
HALF_ROW = gl.constexpr(gl.SliceLayout(1, HALF.value))
"""A number for each of their channels."""


@gluon.jit
def rows_in(big: gl.tensor, xd: gl.tensor, BOX: gl.constexpr, S: gl.constexpr) -> gl.tensor:
    """The ring's rows as boxes of BOX rows, 128 of them to a buffer."""
    return big._reinterpret(xd.dtype, [S[STAGES] * (128 // BOX), BOX, 128], xd.layout)


@gluon.jit
def codes_in(small: gl.tensor, wd: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """The ring's codes, two blocks of 64 channels to a buffer; two channels are a line of 128 bytes."""
    return small._reinterpret(gl.uint8, [S[STAGES] * 2, 32, 128], wd.layout)


@gluon.jit
def load_nibbles(
    xd: gl.tensor, wd: gl.tensor, sd: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple,
    first: gl.tensor, count: gl.tensor, shift: gl.tensor, before: gl.tensor, tile: gl.tensor, turn: gl.tensor,
    s: gl.tensor, phase: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fill the ring: in each step a unit of two blocks of weights, its scales, and its rows, from `shift` on."""
    base_ptr, _, band_ptr, bands, walk_ptr = tables
    small, big, ss, full, empty = ring
    UNITS: gl.constexpr = (S[K] + 127) // 128
    BLOCKS: gl.constexpr = (S[N] + 63) // 64
    BYTES: gl.constexpr = S[HEIGHT] * 128 + 2 * 64 * 64 + (256 if S[GROUP] else 0)
    BOX: gl.constexpr = TALL_BOX if S[HEIGHT] >= TALL_BOX else LOW_BOX
    COPIES: gl.constexpr = S[HEIGHT] // BOX
    xs = rows_in(big, xd, BOX, S)
    ws = codes_in(small, wd, S)
    last = count * S[COLUMNS]
    expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
    at, beside = addresses(base_ptr, expert, 0, S)
    scale_at, scale_beside = addresses(base_ptr, expert, 1, S)
    while tile < last:
        tile = fetch(walk_ptr, post, turn) - before
        turn += 1
        from_row = row - shift
        b0 = column * (1 if S[GATED] else 2)
        b1 = b0 if S[GATED] else gl.minimum(b0 + 1, BLOCKS - 1)
        w0 = (at // 128).to(gl.int32) + b0 * (UNITS * 32)
        w1 = (beside // 128).to(gl.int32) + b1 * (UNITS * 32)
        s0 = (scale_at // 128).to(gl.int32) + b0 * UNITS
        s1 = (scale_beside // 128).to(gl.int32) + b1 * UNITS
        expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
        at, beside = addresses(base_ptr, expert, 0, S)
        scale_at, scale_beside = addresses(base_ptr, expert, 1, S)
        for unit in range(UNITS):
            barrier = full.index(S[FIRST] + s)
            mbarrier.wait(empty.index(S[FIRST] + s), phase)
            mbarrier.expect(barrier, BYTES)
            tma.async_copy_global_to_shared(wd, [w0 + unit * 32, 0], barrier, ws.index(2 * s))
            tma.async_copy_global_to_shared(wd, [w1 + unit * 32, 0], barrier, ws.index(2 * s + 1))
            if S[GROUP]:
                tma.async_copy_global_to_shared(sd, [s0 + unit, 0], barrier, ss.index(2 * s))
                tma.async_copy_global_to_shared(sd, [s1 + unit, 0], barrier, ss.index(2 * s + 1))
            for i in gl.static_range(COPIES):
                to = xs.index(s * (128 // BOX) + i)
                tma.async_copy_global_to_shared(xd, [from_row + i * BOX, unit * 128], barrier, to)
            s, phase = next_buffer(s, phase, S)
    return tile, turn, s, phase


@gluon.jit
def in_turn(a: gl.tensor, b: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """[32, ..] of both halves -> [64, ..], eight rows of each in turn; no number leaves its thread."""
    if len(a.shape) == 1:
        both = gl.reshape(gl.permute(gl.reshape(gl.join(a, b), (4, 8, 2)), (0, 2, 1)), (64,))
    else:
        both = gl.reshape(gl.permute(gl.reshape(gl.join(a, b), (4, 8, 128, 2)), (0, 3, 1, 2)), (64, 128))
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def codes_of(ws: gl.tensor, block: gl.tensor, WG: gl.constexpr) -> gl.tensor:
    """Bytes of a warpgroup's codes [32, 64] in a block."""
    lines = ws.index(block).slice(16 * WG, 16).load(LINES)
    return gl.convert_layout(gl.reshape(lines, (32, 64)), HALF, assert_trivial=True)


@gluon.jit
def side_by_side(low: gl.tensor, high: gl.tensor) -> gl.tensor:
    """Both parts of a unit's codes [32, 64] -> [32, 128]."""
    return gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), (32, 128))


@gluon.jit
def _decode(p: gl.tensor, INT: gl.constexpr) -> gl.tensor:
    """Bytes of codes [32, 64] -> an operand [32, 128]: int8 of 16 times the code, or e4m3 of 2^-9 times it."""
    if INT:
        low, high = gl.inline_asm_elementwise(
            HIGH_NIBBLES, "=r,=r,r", [p], dtype=(gl.int8, gl.int8), is_pure=False, pack=4
        )
    else:
        low, high = gl.inline_asm_elementwise(
            SUBNORMALS, "=r,=r,r", [p], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=False, pack=4
        )
    return side_by_side(low, high)


@gluon.jit
def _start_unit(
    xs: gl.tensor, ws: gl.tensor, ss: gl.tensor, s: gl.tensor, sums: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, TALL: gl.constexpr, ACC: gl.constexpr, ADDS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Decode buffer `s`, start its products with TALL rows: (pending sums, scales [64] or 0). ADDS: to `sums`."""
    DOT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    INT: gl.constexpr = xs.dtype == gl.int8
    EVERY: gl.constexpr = 128 // TALL
    w = in_turn(_decode(codes_of(ws, 2 * s, WG), INT), _decode(codes_of(ws, 2 * s + 1, WG), INT), DOT)
    scale = 0
    if S[GROUP]:
        s0 = ss.index(2 * s).slice(32 * WG, 32).load(HALF_ROW).to(gl.float32)
        s1 = ss.index(2 * s + 1).slice(32 * WG, 32).load(HALF_ROW).to(gl.float32)
        scale = in_turn(s0, s1, gl.SliceLayout(1, ACC))
    x = xs.index(s * EVERY).permute((1, 0))
    part = warpgroup_mma(w, x, sums, use_acc=ADDS, is_async=True)
    return part, scale


@gluon.jit
def _sum_nibbles(
    xs: gl.tensor, ws: gl.tensor, ss: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, TALL: gl.constexpr, ACC: gl.constexpr, SUM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """
    Multiply 64 channels with TALL rows along all of k.

    One sum at a time: a second one, to scale while the next is made, spills registers and halves the rate.
    """
    zero = gl.zeros((64, TALL), SUM, ACC)
    acc = gl.zeros((64, TALL), gl.float32 if S[GROUP] else SUM, ACC)
    for _ in range((S[K] + 127) // 128):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        if S[GROUP]:
            part, scale = _start_unit(xs, ws, ss, s, zero, S, WG, TALL, ACC, False)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
            acc += part.to(gl.float32) * scale[:, None]
        else:
            part, scale = _start_unit(xs, ws, ss, s, acc, S, WG, TALL, ACC, True)
            acc = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
        s, phase = next_buffer(s, phase, S)
    return acc.to(gl.float32), s, phase


@gluon.jit
def store_turns(
    y: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, y_ptr: gl.tensor, expert: gl.tensor,
    row: gl.tensor, rows: gl.tensor, n0: gl.tensor, n1: gl.tensor, BY_CHANNEL: gl.constexpr, S: gl.constexpr,
) -> None:  # fmt: skip
    """Part what `in_turn` joined, and store 32 channels of both halves; BY_CHANNEL: times their scales."""
    TALL: gl.constexpr = S[HEIGHT]
    a, b = gl.split(gl.permute(gl.reshape(y, (4, 2, 8, TALL)), (0, 2, 3, 1)))
    a = gl.reshape(a, (32, TALL))
    b = gl.reshape(b, (32, TALL))
    store_channels(a, b, arena, base_ptr, bias_ptr, y_ptr, expert, row, rows, n0, n1, 32, BY_CHANNEL, S)


@gluon.jit
def _tile_nibbles(
    arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor, xs: gl.tensor,
    ws: gl.tensor, ss: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor, expert: gl.tensor,
    row: gl.tensor, rows: gl.tensor, n0: gl.tensor, n1: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, TALL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply and store 32 channels of both halves of a tile of at most TALL rows."""
    INT: gl.constexpr = xs.dtype == gl.int8
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TALL, 32])
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    m = gl.arange(0, TALL, gl.SliceLayout(0, ACC))
    r = gl.load(x_scale + row + m, mask=m < rows, other=0.0) * (INT8_STEP if INT else E4M3_STEP)
    acc, s, phase = _sum_nibbles(xs, ws, ss, full, empty, s, phase, S, WG, TALL, ACC, SUM)
    store_turns(acc * r[None, :], arena, base_ptr, bias_ptr, y_ptr, expert, row, rows, n0, n1, S[GROUP] == 0, S)
    return s, phase


@gluon.jit
def multiply_nibbles(
    xd: gl.tensor, wd: gl.tensor, arena: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor,
    tables: gl.tuple, ring: gl.tuple, post: gl.tuple, first: gl.tensor, count: gl.tensor, before: gl.tensor,
    tile: gl.tensor, turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply channels 32 * WG to 32 * WG + 31 of both halves of every tile."""
    base_ptr, _, band_ptr, bands, _ = tables
    small, big, ss, full, empty = ring
    xs = rows_in(big, xd, S[HEIGHT], S)
    ws = codes_in(small, wd, S)
    flat = ss._reinterpret(gl.bfloat16, [S[STAGES] * 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    last = count * S[COLUMNS]
    expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        n0 = column1 * (64 if S[GATED] else 128) + 32 * WG
        n1 = n0 if S[GATED] else n0 + 64
        tile = take(post, turn) - before
        turn += 1
        expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
        s, phase = _tile_nibbles(
            arena, base_ptr, bias_ptr, x_scale, y_ptr, xs, ws, flat, full, empty, s, phase, expert, row, rows, n0, n1,
            S, WG, S[HEIGHT],
        )  # fmt: skip
    return tile, turn, s, phase
