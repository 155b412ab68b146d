# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
Runs of weights as the matrix unit reads them, within `kernels_hopper.divided_gemm`.

A step is 128 bytes of k of a tile's weights and rows.

- 128 rows and 256 channels, with a gate 128 of each matrix: Y = X W^T, and either warpgroup has 64 of the rows, none to
  do where the band ends before them. Slim tiles have half as many channels: more tiles, of which fewer are left over
  when the last ones run.
- 64 rows and as many channels: the warpgroups take tiles in turn, so that one multiplies while the other stores.
- 16 or 32 rows and 128 channels, with a gate 64 of each matrix: Y^T = W X^T, since a product has 64 rows at least; in
  turn. Weights are read once and little is multiplied, so tiles are narrow: what is left at the end is as long as one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxmoe.backends.triton.kernels_hopper_ring import (
    BIAS,
    COLUMNS,
    FIRST,
    GATED,
    HEIGHT,
    KIND,
    LOW_ROWS,
    SLIM,
    STAGES,
    STEP,
    STORED,
    K,
    addresses,
    biases_of,
    fetch,
    find,
    next_buffer,
    pick,
    scales_of,
    store,
    take,
)


@gluon.jit
def load_dense(
    xd: gl.tensor, wd: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple, first: gl.tensor, count: gl.tensor,
    shift: gl.tensor, before: gl.tensor, tile: gl.tensor, turn: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fill the ring: in each step the rows of a tile, from `shift` on, and two squares of weights, 128 bytes of k."""
    base_ptr, _, band_ptr, bands, walk_ptr = tables
    small, big, _, full, empty = ring
    BYTES: gl.constexpr = xd.dtype.primitive_bitwidth // 8
    BOX: gl.constexpr = xd.block_type.shape[0]
    HELD: gl.constexpr = 512 // S[STAGES] // BOX
    COPIES: gl.constexpr = S[HEIGHT] // BOX
    SQUARE: gl.constexpr = wd.block_type.shape[1]
    SQUARES: gl.constexpr = 1024 // S[STAGES] // SQUARE
    xs = small._reinterpret(xd.dtype, [512 // BOX, BOX, STEP // BYTES], xd.layout)
    ws = big._reinterpret(wd.dtype, [1024 // SQUARE, 1, SQUARE, STEP // BYTES], wd.layout)
    last = count * S[COLUMNS]
    expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
    at, beside = addresses(base_ptr, expert, 0, S)
    while tile < last:
        tile = fetch(walk_ptr, post, turn) - before
        turn += 1
        from_row = row - shift
        n0 = column * (SQUARE if S[GATED] else 2 * SQUARE)
        n1 = n0 if S[GATED] else n0 + SQUARE
        slot0 = (at // 256).to(gl.int32)
        slot1 = (beside // 256).to(gl.int32)
        expert, row, _, column = find(tile, first, count, band_ptr, bands, S)
        at, beside = addresses(base_ptr, expert, 0, S)
        for k in range(0, S[K], STEP // BYTES):
            barrier = full.index(S[FIRST] + s)
            mbarrier.wait(empty.index(S[FIRST] + s), phase)
            mbarrier.expect(barrier, (S[HEIGHT] + 2 * SQUARE) * STEP)
            tma.async_copy_global_to_shared(wd, [slot0, n0, k], barrier, ws.index(SQUARES * s))
            tma.async_copy_global_to_shared(wd, [slot1, n1, k], barrier, ws.index(SQUARES * s + 1))
            for i in gl.static_range(COPIES):
                tma.async_copy_global_to_shared(xd, [from_row + i * BOX, k], barrier, xs.index(s * HELD + i))
            s, phase = next_buffer(s, phase, S)
    return tile, turn, s, phase


@gluon.jit
def _sum_tall(
    xs: gl.tensor, ws: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor, half: gl.tensor,
    S: gl.constexpr, BYTES: gl.constexpr, LAYOUT: gl.constexpr, SUM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply 64 rows with a tile's channels along all of k, the next step issued before the last is waited for."""
    AT: gl.constexpr = 2 if S[KIND] == SLIM else 1
    acc = gl.zeros((64, 256 // AT), SUM, LAYOUT)
    mbarrier.wait(full.index(S[FIRST] + s), phase)
    acc = warpgroup_mma(xs.index(2 * s + half), ws.index(AT * s).permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    before = s
    s, phase = next_buffer(s, phase, S)
    for _ in range(STEP // BYTES, S[K], STEP // BYTES):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        acc = warpgroup_mma(xs.index(2 * s + half), ws.index(AT * s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(S[FIRST] + before), count=1)
        before = s
        s, phase = next_buffer(s, phase, S)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(S[FIRST] + before), count=1)
    return acc.to(gl.float32), s, phase


@gluon.jit
def _sum_low(
    xs: gl.tensor, ws: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr, BYTES: gl.constexpr, LAYOUT: gl.constexpr, SUM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply 64 channels of both halves with the rows of a tile along all of k; loading is what takes the time."""
    TALL: gl.constexpr = S[HEIGHT]
    a = gl.zeros((64, TALL), SUM, LAYOUT)
    b = gl.zeros((64, TALL), SUM, LAYOUT)
    for _ in range(0, S[K], STEP // BYTES):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        x = xs.index(s * (LOW_ROWS // TALL)).permute((1, 0))
        a = warpgroup_mma(ws.index(2 * s), x, a, is_async=True)
        b = warpgroup_mma(ws.index(2 * s + 1), x, b, is_async=True)
        a, b = warpgroup_mma_wait(0, deps=[a, b])
        mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
        s, phase = next_buffer(s, phase, S)
    return a.to(gl.float32), b.to(gl.float32), s, phase


@gluon.jit
def _pass(
    full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, BYTES: gl.constexpr
) -> gl.tensor:
    """Give every buffer of a tile back untouched."""
    for _ in range(0, S[K], STEP // BYTES):
        mbarrier.wait(full.index(S[FIRST] + s), phase)
        mbarrier.arrive(empty.index(S[FIRST] + s), count=1)
        s, phase = next_buffer(s, phase, S)
    return s, phase


@gluon.jit
def _by_row_and_channel(y: gl.tensor, r: gl.tensor, c: gl.tensor) -> gl.tensor:
    """Sums [rows, channels] times the scales of both."""
    by_row = gl.convert_layout(r, gl.SliceLayout(1, y.type.layout))
    return y * by_row[:, None] * gl.convert_layout(c, gl.SliceLayout(0, y.type.layout))[None, :]


@gluon.jit
def multiply_tall(
    xd: gl.tensor, arena: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor, tables: gl.tuple,
    ring: gl.tuple, post: gl.tuple, first: gl.tensor, count: gl.tensor, before: gl.tensor, tile: gl.tensor,
    turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply one warpgroup's rows of every tile of 128 rows, or every second tile of 64."""
    base_ptr, _, band_ptr, bands, _ = tables
    small, big, _, full, empty = ring
    BYTES: gl.constexpr = xd.dtype.primitive_bitwidth // 8
    SUM: gl.constexpr = gl.int32 if xd.dtype == gl.int8 else gl.float32
    EACH: gl.constexpr = 64 if S[KIND] == SLIM else 128
    # an int8 product of 256 columns is an instruction that Triton has no name for
    WIDTH: gl.constexpr = 128 if xd.dtype == gl.int8 else 2 * EACH
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32 // BYTES])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // STORED, STORED // 8], [4, 1], [1, 0])
    PLACE: gl.constexpr = WG if S[HEIGHT] == 128 else 0
    xs = small._reinterpret(xd.dtype, [8, 64, STEP // BYTES], xd.layout)
    ws = big._reinterpret(xd.dtype, [512 // EACH, 2 * EACH, STEP // BYTES], xd.layout)
    n = gl.arange(0, STORED, gl.BlockedLayout([1], [32], [4], [0]))
    m = gl.arange(0, 64, gl.SliceLayout(1, ACC)) + 64 * PLACE
    last = count * S[COLUMNS]
    expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        n0 = column1 * (EACH if S[GATED] else 2 * EACH)
        n1 = n0 if S[GATED] else n0 + EACH
        mine = rows > 64 * WG if S[HEIGHT] == 128 else turn % 2 == WG
        tile = take(post, turn) - before
        turn += 1
        if BYTES == 1:
            s0, s1 = scales_of(arena, base_ptr, expert, n0, n1, n, S)
            t0, t1 = s0, s1
            if STORED < EACH:
                t0, t1 = scales_of(arena, base_ptr, expert, n0 + STORED, n1 + STORED, n, S)
            r = gl.load(x_scale + row + m, mask=m < rows, other=0.0)
        expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
        if mine:
            acc, s, phase = _sum_tall(xs, ws, full, empty, s, phase, PLACE, S, BYTES, ACC, SUM)
            a, b = gl.split(gl.permute(gl.reshape(acc, (64, 2, EACH)), (0, 2, 1)))
            # as many as there are, but the compiler does not know it, and so does not write the code twice
            for part in range(gl.minimum(rows + 1, EACH // STORED)):
                y0, y1 = a, b
                if STORED < EACH:
                    y0, y1 = pick(a, part), pick(b, part)
                if BYTES == 1:
                    y0 = _by_row_and_channel(y0, r, gl.where(part == 0, s0, t0))
                    y1 = _by_row_and_channel(y1, r, gl.where(part == 0, s1, t1))
                from0 = n0 + part * STORED
                from1 = n1 + part * STORED
                if S[BIAS]:
                    b0, b1 = biases_of(bias_ptr, expert, from0, from1, n, S)
                    y0 = y0 + gl.convert_layout(b0, gl.SliceLayout(0, y0.type.layout))[None, :]
                    y1 = y1 + gl.convert_layout(b1, gl.SliceLayout(0, y1.type.layout))[None, :]
                m_out = gl.arange(0, 64, gl.SliceLayout(1, OUT)) + 64 * PLACE
                n_out = gl.arange(0, STORED, gl.SliceLayout(0, OUT))
                store(y0, y1, y_ptr, row, rows, m_out, n_out, from0, from1, 0, OUT, S)
        else:
            s, phase = _pass(full, empty, s, phase, S, BYTES)
    return tile, turn, s, phase


@gluon.jit
def multiply_low(
    xd: gl.tensor, arena: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor, tables: gl.tuple,
    ring: gl.tuple, post: gl.tuple, first: gl.tensor, count: gl.tensor, before: gl.tensor, tile: gl.tensor,
    turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply every second tile of 16 or 32 rows."""
    base_ptr, _, band_ptr, bands, _ = tables
    small, big, _, full, empty = ring
    BYTES: gl.constexpr = xd.dtype.primitive_bitwidth // 8
    SUM: gl.constexpr = gl.int32 if xd.dtype == gl.int8 else gl.float32
    TALL: gl.constexpr = S[HEIGHT]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TALL, 32 // BYTES])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    xs = small._reinterpret(xd.dtype, [512 // TALL, TALL, STEP // BYTES], xd.layout)
    ws = big._reinterpret(xd.dtype, [16, 64, STEP // BYTES], xd.layout)
    n = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    m = gl.arange(0, TALL, gl.SliceLayout(0, ACC))
    last = count * S[COLUMNS]
    expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        n0 = column1 * (64 if S[GATED] else 128)
        n1 = n0 if S[GATED] else n0 + 64
        mine = turn % 2 == WG
        tile = take(post, turn) - before
        turn += 1
        if BYTES == 1:
            s0, s1 = scales_of(arena, base_ptr, expert, n0, n1, n, S)
            r = gl.load(x_scale + row + m, mask=m < rows, other=0.0)
        expert1, row1, rows1, column1 = find(tile, first, count, band_ptr, bands, S)
        if mine:
            a, b, s, phase = _sum_low(xs, ws, full, empty, s, phase, S, BYTES, ACC, SUM)
            if BYTES == 1:
                a = a * r[None, :] * s0[:, None]
                b = b * r[None, :] * s1[:, None]
            if S[BIAS]:
                b0, b1 = biases_of(bias_ptr, expert, n0, n1, n, S)
                a = a + b0[:, None]
                b = b + b1[:, None]
            m_out = gl.arange(0, TALL, gl.SliceLayout(0, OUT))
            n_out = gl.arange(0, 64, gl.SliceLayout(1, OUT))
            store(a, b, y_ptr, row, rows, m_out, n_out, n0, n1, 1, OUT, S)
        else:
            s, phase = _pass(full, empty, s, phase, S, BYTES)
    return tile, turn, s, phase
