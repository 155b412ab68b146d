# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
Runs of 4-bit weights with integer scales against int8 rows, within `kernels_hopper.divided_gemm`.

A weight's code times the multiplier of its group is an int8, so that sums stay in the matrix unit along all of k.
Y^T = W X^T: decoded weights go to the matrix unit from registers. A step is one unit of 128 channels of k.

- 64 or 128 rows and 256 channels, with a gate 128 of each matrix: either warpgroup has 64 channels of both halves.
- 16 or 32 rows and 128 channels, with a gate 64 of each matrix: either warpgroup has 32 channels of both halves, as
  with other 4-bit weights (`kernels_hopper_nibbles.py`).

Buffers lie where those of dense weights do, rows as they do there, so that runs of both follow each other in one ring.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxmoe.backends.triton.decode import MIDDLES, MINUS_EIGHTS, MULTIPLIED, MULTIPLIED_REGISTERS
from mxmoe.backends.triton.kernels_hopper_nibbles import HALF_ROW, codes_of, in_turn, side_by_side, store_turns
from mxmoe.backends.triton.kernels_hopper_ring import (
    COLUMNS,
    FIRST,
    GATED,
    HEIGHT,
    KIND,
    SCALED,
    STAGES,
    STEP,
    STORED,
    K,
    N,
    addresses,
    fetch,
    find,
    next_buffer,
    pick,
    store_channels,
    take,
)

BLOCK = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
"""Codes of 64 channels, where the operand made of them lies."""
BLOCK_LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [0, 64], [1, 0], [2, 0]],
        [[8, 0], [16, 0]],
        [],
        [32, 128],
    )
)
"""The same, two channels a line."""
BLOCK_ROW = gl.constexpr(gl.SliceLayout(1, BLOCK.value))
"""A number for each of their channels."""
BLOCKS_HELD = gl.constexpr(32)
"""Blocks of 64 channels by 64 bytes that all buffers together have room for; two channels are a line of 128 bytes."""
ROWS_HELD = gl.constexpr(512)
"""Rows, likewise."""


@gluon.jit
def _blocks_of(column: gl.tensor, EACH: gl.constexpr, S: gl.constexpr) -> gl.tensor:
    """First block of 64 channels of both halves of a tile, which have EACH."""
    first = column * (EACH if S[GATED] else 2 * EACH)
    return first, first if S[GATED] else first + EACH


@gluon.jit
def load_scaled(
    xd: gl.tensor, wd: gl.tensor, md: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple,
    first: gl.tensor, count: gl.tensor, shift: gl.tensor, before: gl.tensor, tile: gl.tensor, turn: gl.tensor,
    s: gl.tensor, phase: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fill the ring: in each step a tile's rows, from `shift` on, and both halves' codes and their multipliers."""
    base_ptr, _, band_ptr, bands, walk_ptr = tables
    small, big, ss, full, empty = ring
    UNITS: gl.constexpr = (S[K] + STEP - 1) // STEP
    BLOCKS: gl.constexpr = (S[N] + 63) // 64
    EACH: gl.constexpr = 2 if S[KIND] == SCALED else 1
    BYTES: gl.constexpr = S[HEIGHT] * STEP + 2 * EACH * (64 * 64 + 64)
    BOX: gl.constexpr = xd.block_type.shape[0]
    COPIES: gl.constexpr = S[HEIGHT] // BOX
    HELD: gl.constexpr = ROWS_HELD // S[STAGES] // BOX
    BLOCKS_EACH: gl.constexpr = BLOCKS_HELD // S[STAGES]
    xs = small._reinterpret(xd.dtype, [ROWS_HELD // BOX, BOX, STEP], xd.layout)
    ws = big._reinterpret(gl.uint8, [BLOCKS_HELD, 32, 128], wd.layout)
    ms = ss._reinterpret(gl.uint8, [32, 1, 64], md.layout)
    last = count * S[COLUMNS]
    expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
    at, beside = addresses(base_ptr, expert, 0, S)
    multiplier_at, multiplier_beside = addresses(base_ptr, expert, 2, S)
    while tile < last:
        tile = fetch(walk_ptr, post, turn) - before
        turn += 1
        from_row = row - shift
        b0, b1 = _blocks_of(column, EACH, S)
        w0 = (at // 128).to(gl.int32)
        w1 = (beside // 128).to(gl.int32)
        m0 = (multiplier_at // 64).to(gl.int32)
        m1 = (multiplier_beside // 64).to(gl.int32)
        expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
        at, beside = addresses(base_ptr, expert, 0, S)
        multiplier_at, multiplier_beside = addresses(base_ptr, expert, 2, S)
        for unit in range(UNITS):
            barrier = full.index(S[FIRST] + s)
            mbarrier.wait(empty.index(S[FIRST] + s), phase)
            mbarrier.expect(barrier, BYTES)
            for i in gl.static_range(COPIES):
                to = xs.index(s * HELD + i)
                tma.async_copy_global_to_shared(xd, [from_row + i * BOX, unit * STEP], barrier, to)
            for i in gl.static_range(EACH):
                at0 = gl.minimum(b0 + i, BLOCKS - 1) * UNITS + unit
                at1 = gl.minimum(b1 + i, BLOCKS - 1) * UNITS + unit
                w = s * BLOCKS_EACH + i
                m = 2 * (s * (2 * EACH) + i)  # copies begin at whole 128 bytes
                tma.async_copy_global_to_shared(wd, [w0 + at0 * 32, 0], barrier, ws.index(w))
                tma.async_copy_global_to_shared(wd, [w1 + at1 * 32, 0], barrier, ws.index(w + EACH))
                tma.async_copy_global_to_shared(md, [m0 + at0, 0], barrier, ms.index(m))
                tma.async_copy_global_to_shared(md, [m1 + at1, 0], barrier, ms.index(m + 2 * EACH))
            s, phase = next_buffer(s, phase, S)
    return tile, turn, s, phase


@gluon.jit
def _multiplied(codes: gl.tensor, m: gl.tensor) -> gl.tensor:
    """Bytes of codes [n, 64] and multipliers [n] -> both parts as int8, (code - 8) * m."""
    m = m.to(gl.int32)
    middle = gl.expand_dims(m * MINUS_EIGHTS + MIDDLES, 1).broadcast_to(codes.shape)
    m = gl.expand_dims(m, 1).broadcast_to(codes.shape)
    return gl.inline_asm_elementwise(
        MULTIPLIED, MULTIPLIED_REGISTERS, [codes, m, middle], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
    )


@gluon.jit
def _operand(ws: gl.tensor, ms: gl.tensor, block: gl.tensor, at: gl.tensor, DOT: gl.constexpr) -> gl.tensor:
    """Decode a block of 64 channels to [64, 128] in the registers that multiply it; `at`: its multipliers."""
    lines = ws.index(block).load(BLOCK_LINES)
    codes = gl.convert_layout(gl.reshape(lines, (64, 64)), BLOCK, assert_trivial=True)
    low, high = _multiplied(codes, ms.index(at).load(BLOCK_ROW))
    both = gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), (64, 128))
    return gl.convert_layout(both, DOT, assert_trivial=True)


@gluon.jit
def _half(ws: gl.tensor, ms: gl.tensor, block: gl.tensor, at: gl.tensor, WG: gl.constexpr) -> gl.tensor:
    """Decode a warpgroup's 32 channels of a block to [32, 128]."""
    low, high = _multiplied(codes_of(ws, block, WG), ms.index(at).slice(32 * WG, 32).load(HALF_ROW))
    return side_by_side(low, high)


@gluon.jit
def _sum_low(
    xs: gl.tensor, ws: gl.tensor, ms: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, ACC: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply 32 channels of both halves, eight of each in turn, with the rows of a tile along all of k."""
    TALL: gl.constexpr = S[HEIGHT]
    DOT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    BLOCKS_EACH: gl.constexpr = BLOCKS_HELD // S[STAGES]
    acc = gl.zeros((64, TALL), gl.int32, ACC)
    for _ in range((S[K] + STEP - 1) // STEP):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        w = s * BLOCKS_EACH
        m = 4 * s
        both = in_turn(_half(ws, ms, w, m, WG), _half(ws, ms, w + 1, m + 2, WG), DOT)
        x = xs.index(s * (ROWS_HELD // S[STAGES] // TALL)).permute((1, 0))
        acc = warpgroup_mma(both, x, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
        s, phase = next_buffer(s, phase, S)
    return acc.to(gl.float32), s, phase


@gluon.jit
def _sum_tall(
    xs: gl.tensor, ws: gl.tensor, ms: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, ACC: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply 64 channels of both halves with the rows of a tile along all of k."""
    TALL: gl.constexpr = S[HEIGHT]
    BLOCKS_EACH: gl.constexpr = BLOCKS_HELD // S[STAGES]
    DOT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    a = gl.zeros((64, TALL), gl.int32, ACC)
    b = gl.zeros((64, TALL), gl.int32, ACC)
    for _ in range((S[K] + STEP - 1) // STEP):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        w = s * BLOCKS_EACH + WG
        m = 2 * (4 * s + WG)
        x = xs.index(s * (ROWS_HELD // S[STAGES] // TALL)).permute((1, 0))
        a = warpgroup_mma(_operand(ws, ms, w, m, DOT), x, a, is_async=True)
        b = warpgroup_mma(_operand(ws, ms, w + 2, m + 4, DOT), x, b, is_async=True)
        a, b = warpgroup_mma_wait(0, deps=[a, b])
        mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
        s, phase = next_buffer(s, phase, S)
    return a.to(gl.float32), b.to(gl.float32), s, phase


@gluon.jit
def multiply_scaled(
    xd: gl.tensor, wd: gl.tensor, arena: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor,
    tables: gl.tuple, ring: gl.tuple, post: gl.tuple, first: gl.tensor, count: gl.tensor, before: gl.tensor,
    tile: gl.tensor, turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply one warpgroup's channels of every tile."""
    base_ptr, _, band_ptr, bands, _ = tables
    small, big, ss, full, empty = ring
    TALL: gl.constexpr = S[HEIGHT]
    EACH: gl.constexpr = 2 if S[KIND] == SCALED else 1
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TALL, 32])
    xs = small._reinterpret(xd.dtype, [ROWS_HELD // TALL, TALL, STEP], xd.layout)
    ws = big._reinterpret(gl.uint8, [BLOCKS_HELD, 32, 128], wd.layout)
    ms = ss._reinterpret(gl.uint8, [32, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    m = gl.arange(0, TALL, gl.SliceLayout(0, ACC))
    few = gl.arange(0, STORED, gl.BlockedLayout([1], [32], [4], [0]))
    # without a gate the end of a tile is short by itself
    IN_PARTS: gl.constexpr = S[GATED] and TALL > STORED
    last = count * S[COLUMNS]
    expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        b0, b1 = _blocks_of(column1, EACH, S)
        n0 = 64 * b0 + 32 * EACH * WG
        n1 = 64 * b1 + 32 * EACH * WG
        tile = take(post, turn) - before
        turn += 1
        if IN_PARTS:
            r0 = gl.load(x_scale + row + few, mask=few < rows, other=0.0)
            r1 = gl.load(x_scale + row + STORED + few, mask=few < rows - STORED, other=0.0)
        else:
            r = gl.load(x_scale + row + m, mask=m < rows, other=0.0)
        expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
        if S[KIND] == SCALED:
            a, b, s, phase = _sum_tall(xs, ws, ms, full, empty, s, phase, S, WG, ACC)
            if IN_PARTS:
                for part in range((rows + STORED - 1) // STORED):
                    y0, y1 = pick(a, part), pick(b, part)
                    by_row = gl.convert_layout(gl.where(part == 0, r0, r1), gl.SliceLayout(0, y0.type.layout))[None, :]
                    store_channels(
                        y0 * by_row, y1 * by_row, arena, base_ptr, bias_ptr, y_ptr, expert, row + part * STORED,
                        rows - part * STORED, n0, n1, 64, True, S,
                    )  # fmt: skip
            else:
                a = a * r[None, :]
                b = b * r[None, :]
                store_channels(a, b, arena, base_ptr, bias_ptr, y_ptr, expert, row, rows, n0, n1, 64, True, S)
        else:
            acc, s, phase = _sum_low(xs, ws, ms, full, empty, s, phase, S, WG, ACC)
            store_turns(acc * r[None, :], arena, base_ptr, bias_ptr, y_ptr, expert, row, rows, n0, n1, True, S)
    return tile, turn, s, phase
