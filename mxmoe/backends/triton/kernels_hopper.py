# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
The group GEMM for many rows per expert on sm_90, in Gluon: warps that load, and two warpgroups that multiply.

One program for each SM walks the tiles of one scheme. A single warp copies operands into a ring of buffers in shared
memory with the tensor memory accelerator; two warpgroups of four warps wait for a buffer, multiply it and give it back,
each for itself, so that one may still multiply while the other writes its part of the result. What a tile needs from
the schedule's tables is read one tile ahead. Rows lie sorted by expert; a tile reads past its band's end, and what it
finds there is not stored.

- `dense_gemm`: weights as the matrix unit reads them. A tile is 128 rows times 256 channels (with a gate 128 of each
  matrix); either warpgroup has 64 of the rows, and none to do where the band ends before them.
- `nibble_gemm`: 4-bit weights against 8-bit rows, Y^T = W X^T, so that decoded weights go to the matrix unit from
  registers. A tile is 128 channels (with a gate 64 of each matrix) times 128 rows, or 64 where the band has no more;
  either warpgroup has 32 of the channels of both halves, eight rows of one and eight of the other in turn, so that gate
  and up meet in one thread. A step is one unit of 128 channels of k; with a scale per group its sums are scaled while
  the other warpgroup multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mxmoe.backends.triton.kernels import act

FIELDS = (
    "n",
    "k",
    "lanes",
    "first",
    "classes",
    "columns",
    "grouping",
    "stages",
    "gated",
    "group",
    "bias",
    "act",
    "p",
    "q",
)
"""What a kernel is compiled for: the matrix, experts, first class and number of classes, tiles of a band, bands that
share columns, buffers in flight, whether there are two matrices, channels of a group (0: none), whether there is a
bias, and the nonlinearity with its two numbers."""
N = gl.constexpr(0)
K = gl.constexpr(1)
LANES = gl.constexpr(2)
FIRST = gl.constexpr(3)
CLASSES = gl.constexpr(4)
COLUMNS = gl.constexpr(5)
GROUPING = gl.constexpr(6)
STAGES = gl.constexpr(7)
GATED = gl.constexpr(8)
GROUP = gl.constexpr(9)
BIAS = gl.constexpr(10)
ACT = gl.constexpr(11)
ACT_P = gl.constexpr(12)
ACT_Q = gl.constexpr(13)

ROWS = gl.constexpr(128)
"""Rows of a tile."""
STEP = gl.constexpr(128)
"""Bytes of a row in a step of `dense_gemm`; channels of a step of `nibble_gemm`."""
SLOT = gl.constexpr(256)
"""Bytes; every payload in the arena begins at a multiple."""
INT8_STEP = gl.constexpr(2.0**-4)
E4M3_STEP = gl.constexpr(2.0**9)

# the tricks of `decode.py`, four codes at a time
_HIGH_NIBBLES = gl.constexpr("""{
.reg .b32 t;
shl.b32 t, $2, 4;
lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")
_SUBNORMALS = gl.constexpr("""{
.reg .b32 t, u;
and.b32 $0, $2, 0x87878787;
shr.b32 t, $2, 3;
and.b32 t, t, 0x07070707;
shl.b32 u, $2, 1;
lop3.b32 $1, u, 0x80808080, t, 0xEA;
}""")


@gluon.jit
def _range(ends_ptr: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """First band, number of bands and number of tiles of the launch."""
    first = gl.load(ends_ptr + S[FIRST])
    count = gl.load(ends_ptr + S[FIRST] + S[CLASSES]) - first
    return first, count, count * S[COLUMNS]


@gluon.jit
def _find(
    tile: gl.tensor, first: gl.tensor, count: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Expert, first sorted row, rows and column of a tile (of the last one where there is none), as `tile_in_class`."""
    tile = gl.minimum(tile, gl.maximum(count * S[COLUMNS] - 1, 0))
    held: gl.constexpr = S[GROUPING] * S[COLUMNS]
    group = tile // held
    inside = tile - group * held
    size = gl.maximum(gl.minimum(count - group * S[GROUPING], S[GROUPING]), 1)
    band = band_ptr + first + group * S[GROUPING] + inside % size
    return gl.load(band), gl.load(band + bands), gl.load(band + 2 * bands), inside // size


@gluon.jit
def _addresses(base_ptr: gl.tensor, expert: gl.tensor, WHAT: gl.constexpr, S: gl.constexpr) -> gl.tensor:
    """Byte offset of payload (0) or scale (1) of an expert's matrix, and of the second one's, if any."""
    beside = S[LANES] if S[GATED] else 0
    return gl.load(base_ptr + expert * 3 + WHAT), gl.load(base_ptr + (beside + expert) * 3 + WHAT)


@gluon.jit
def _next(s: gl.tensor, phase: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """Give the buffer after `s`, and the phase of its barrier."""
    s += 1
    if s == S[STAGES]:
        s = 0
        phase ^= 1
    return s, phase


@gluon.jit
def _load_dense(
    xd: gl.tensor, wd: gl.tensor, base_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor,
    xs: gl.tensor, ws: gl.tensor, full: gl.tensor, empty: gl.tensor, S: gl.constexpr,
) -> None:  # fmt: skip
    """Fill the ring: in each step a square of rows and two of weights, 128 bytes of k."""
    BYTES: gl.constexpr = xd.dtype.primitive_bitwidth // 8
    first, count, last = _range(ends_ptr, S)
    tile = gl.program_id(0)
    expert, row, _, column = _find(tile, first, count, band_ptr, bands, S)
    at, beside = _addresses(base_ptr, expert, 0, S)
    s = 0
    phase = 1
    while tile < last:
        tile += gl.num_programs(0)
        from_row = row
        n0 = column * (128 if S[GATED] else 256)
        n1 = n0 if S[GATED] else n0 + 128
        slot0 = (at // SLOT).to(gl.int32)
        slot1 = (beside // SLOT).to(gl.int32)
        expert, row, _, column = _find(tile, first, count, band_ptr, bands, S)
        at, beside = _addresses(base_ptr, expert, 0, S)
        for k in range(0, S[K], STEP // BYTES):
            mbarrier.wait(empty.index(s), phase)
            mbarrier.expect(full.index(s), 3 * ROWS * STEP)
            tma.async_copy_global_to_shared(xd, [from_row, k], full.index(s), xs.index(s))
            tma.async_copy_global_to_shared(wd, [slot0, n0, k], full.index(s), ws.index(2 * s))
            tma.async_copy_global_to_shared(wd, [slot1, n1, k], full.index(s), ws.index(2 * s + 1))
            s, phase = _next(s, phase, S)


@gluon.jit
def _sum_dense(
    xs: gl.tensor, ws: gl.tensor, full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, BYTES: gl.constexpr, LAYOUT: gl.constexpr, SUM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply 64 rows with 256 channels along all of k, the next step issued before the last one is waited for."""
    acc = gl.zeros((64, 256), SUM, LAYOUT)
    mbarrier.wait(full.index(s), phase)
    acc = warpgroup_mma(xs.index(2 * s + WG), ws.index(s).permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    before = s
    s, phase = _next(s, phase, S)
    for _ in range(STEP // BYTES, S[K], STEP // BYTES):
        mbarrier.wait(full.index(s), phase)
        acc = warpgroup_mma(xs.index(2 * s + WG), ws.index(s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)
        before = s
        s, phase = _next(s, phase, S)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return acc.to(gl.float32), s, phase


@gluon.jit
def _pass_dense(
    full: gl.tensor, empty: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, BYTES: gl.constexpr
) -> gl.tensor:
    """Give every buffer of a tile back untouched."""
    for _ in range(0, S[K], STEP // BYTES):
        mbarrier.wait(full.index(s), phase)
        mbarrier.arrive(empty.index(s), count=1)
        s, phase = _next(s, phase, S)
    return s, phase


@gluon.jit
def _by_channel(
    at: gl.tensor, n0: gl.tensor, n1: gl.tensor, beside: gl.tensor, n: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Numbers per channel of both halves of a tile, from `at` and `beside`; zeros beyond the last channel."""
    return (
        gl.load(at + n0 + n, mask=n < S[N] - n0, other=0.0),
        gl.load(beside + n1 + n, mask=n < S[N] - n1, other=0.0),
    )


@gluon.jit
def _scales(
    arena: gl.tensor, base_ptr: gl.tensor, expert: gl.tensor, n0: gl.tensor, n1: gl.tensor, n: gl.tensor,
    S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scales per channel of both halves of a tile."""
    at, beside = _addresses(base_ptr, expert, 1, S)
    typed: gl.constexpr = gl.pointer_type(gl.float32)
    return _by_channel((arena + at).to(typed), n0, n1, (arena + beside).to(typed), n, S)


@gluon.jit
def _biases(
    bias_ptr: gl.tensor, expert: gl.tensor, n0: gl.tensor, n1: gl.tensor, n: gl.tensor, S: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Biases of both halves of a tile."""
    beside = S[LANES] if S[GATED] else 0
    return _by_channel(bias_ptr + expert * S[N], n0, n1, bias_ptr + (beside + expert) * S[N], n, S)


@gluon.jit
def _store(
    a: gl.tensor, b: gl.tensor, y_ptr: gl.tensor, row: gl.tensor, rows: gl.tensor, m: gl.tensor, n: gl.tensor,
    n0: gl.tensor, n1: gl.tensor, AXIS: gl.constexpr, LAYOUT: gl.constexpr, S: gl.constexpr,
) -> None:  # fmt: skip
    """Join gate and up, or store both halves; rows `m` lie along AXIS of a and b, channels `n` along the other."""
    to = y_ptr + gl.expand_dims((row + m).to(gl.int64) * S[N], 1 - AXIS) + gl.expand_dims(n, AXIS)
    inside = gl.expand_dims(m < rows, 1 - AXIS)
    if S[GATED]:
        KIND: gl.constexpr = S[ACT]
        FIRST_NUMBER: gl.constexpr = S[ACT_P]
        SECOND_NUMBER: gl.constexpr = S[ACT_Q]
        y = act(a, b, KIND, FIRST_NUMBER, SECOND_NUMBER).to(y_ptr.dtype.element_ty)
        gl.store(to + n0, gl.convert_layout(y, LAYOUT), mask=inside & gl.expand_dims(n < S[N] - n0, AXIS))
    else:
        a = gl.convert_layout(a.to(y_ptr.dtype.element_ty), LAYOUT)
        gl.store(to + n0, a, mask=inside & gl.expand_dims(n < S[N] - n0, AXIS))
        b = gl.convert_layout(b.to(y_ptr.dtype.element_ty), LAYOUT)
        gl.store(to + n1, b, mask=inside & gl.expand_dims(n < S[N] - n1, AXIS))


@gluon.jit
def _multiply_dense(
    arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor,
    ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor, xs: gl.tensor, ws: gl.tensor, full: gl.tensor,
    empty: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply rows 64 * WG to 64 * WG + 63 of every tile."""
    BYTES: gl.constexpr = xs.dtype.primitive_bitwidth // 8
    SUM: gl.constexpr = gl.int32 if xs.dtype == gl.int8 else gl.float32
    # an int8 product of 256 columns is an instruction that Triton has no name for
    WIDTH: gl.constexpr = 128 if xs.dtype == gl.int8 else 256
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32 // BYTES])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    first, count, last = _range(ends_ptr, S)
    n = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    m = gl.arange(0, 64, gl.SliceLayout(1, ACC)) + 64 * WG
    s = 0
    phase = 0
    tile = gl.program_id(0)
    expert1, row1, rows1, column1 = _find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        n0 = column1 * (128 if S[GATED] else 256)
        n1 = n0 if S[GATED] else n0 + 128
        tile += gl.num_programs(0)
        if BYTES == 1:
            s0, s1 = _scales(arena, base_ptr, expert, n0, n1, n, S)
            r = gl.load(x_scale + row + m, mask=m < rows, other=0.0)
        expert1, row1, rows1, column1 = _find(tile, first, count, band_ptr, bands, S)
        if rows > 64 * WG:
            acc, s, phase = _sum_dense(xs, ws, full, empty, s, phase, S, WG, BYTES, ACC, SUM)
            a, b = gl.split(gl.permute(gl.reshape(acc, (64, 2, 128)), (0, 2, 1)))
            CHANNELS: gl.constexpr = gl.SliceLayout(0, a.type.layout)
            if BYTES == 1:
                by_row = gl.convert_layout(r, gl.SliceLayout(1, a.type.layout))[:, None]
                a = a * by_row * gl.convert_layout(s0, CHANNELS)[None, :]
                b = b * by_row * gl.convert_layout(s1, CHANNELS)[None, :]
            if S[BIAS]:
                b0, b1 = _biases(bias_ptr, expert, n0, n1, n, S)
                a = a + gl.convert_layout(b0, CHANNELS)[None, :]
                b = b + gl.convert_layout(b1, CHANNELS)[None, :]
            m_out = gl.arange(0, 64, gl.SliceLayout(1, OUT)) + 64 * WG
            n_out = gl.arange(0, 128, gl.SliceLayout(0, OUT))
            _store(a, b, y_ptr, row, rows, m_out, n_out, n0, n1, 0, OUT, S)
        else:
            s, phase = _pass_dense(full, empty, s, phase, S, BYTES)


@gluon.jit
def _barriers(S: gl.constexpr) -> gl.tensor:
    """Two barriers for each buffer: filled by the copies, emptied by both warpgroups."""
    full = gl.allocate_shared_memory(gl.int64, [S[STAGES], 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S[STAGES], 1], mbarrier.MBarrierLayout())
    COUNT: gl.constexpr = S[STAGES]
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return full, empty


@gluon.jit
def dense_gemm(
    xd: gl.tensor, wd: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor,
    y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor, S: gl.constexpr,
) -> None:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[sorted row]) for every tile of classes FIRST to FIRST + CLASSES - 1.

    Args: `xd` descriptor of the sorted rows [*, k], boxes of 128 rows and 128 bytes; `wd` of the arena as overlapping
    matrices [*, n, k], one from every SLOT bytes on, the same boxes; `arena` bytes; `base_ptr` int64 [matrices, lanes,
    3]; `bias_ptr` float32 [matrices, lanes, n]; `x_scale` float32 by sorted row; `y_ptr` [rows, n];
    the tables of the schedule.
    """
    BOX: gl.constexpr = STEP // (xd.dtype.primitive_bitwidth // 8)
    xs = gl.allocate_shared_memory(xd.dtype, [S[STAGES], 128, BOX], xd.layout)
    ws = gl.allocate_shared_memory(xd.dtype, [S[STAGES] * 2, 1, 128, BOX], wd.layout)
    full, empty = _barriers(S)
    halves = xs._reinterpret(xd.dtype, [S[STAGES] * 2, 64, BOX], xd.layout)
    both = ws._reinterpret(xd.dtype, [S[STAGES], 256, BOX], xd.layout)
    gl.warp_specialize(
        [
            (
                _multiply_dense,
                (arena, base_ptr, bias_ptr, x_scale, y_ptr, ends_ptr, band_ptr, bands, halves, both, full, empty, S, 0),
            ),
            (
                _multiply_dense,
                (arena, base_ptr, bias_ptr, x_scale, y_ptr, ends_ptr, band_ptr, bands, halves, both, full, empty, S, 1),
            ),
            (_load_dense, (xd, wd, base_ptr, ends_ptr, band_ptr, bands, xs, ws, full, empty, S)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load_nibbles(
    xd: gl.tensor, wd: gl.tensor, sd: gl.tensor, base_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor,
    bands: gl.tensor, xs: gl.tensor, ws: gl.tensor, ss: gl.tensor, full: gl.tensor, empty: gl.tensor, S: gl.constexpr,
) -> None:  # fmt: skip
    """Fill the ring: in each step a unit of two blocks of weights, its scales, and both halves of its rows."""
    UNITS: gl.constexpr = (S[K] + 127) // 128
    BLOCKS: gl.constexpr = (S[N] + 63) // 64
    BYTES: gl.constexpr = ROWS * STEP + 2 * 64 * 64 + (256 if S[GROUP] else 0)
    first, count, last = _range(ends_ptr, S)
    tile = gl.program_id(0)
    expert, row, _, column = _find(tile, first, count, band_ptr, bands, S)
    at, beside = _addresses(base_ptr, expert, 0, S)
    scale_at, scale_beside = _addresses(base_ptr, expert, 1, S)
    s = 0
    phase = 1
    while tile < last:
        tile += gl.num_programs(0)
        from_row = row
        b0 = column * (1 if S[GATED] else 2)
        b1 = b0 if S[GATED] else gl.minimum(b0 + 1, BLOCKS - 1)
        w0 = (at // 64).to(gl.int32) + b0 * (UNITS * 64)
        w1 = (beside // 64).to(gl.int32) + b1 * (UNITS * 64)
        s0 = (scale_at // 128).to(gl.int32) + b0 * UNITS
        s1 = (scale_beside // 128).to(gl.int32) + b1 * UNITS
        expert, row, _, column = _find(tile, first, count, band_ptr, bands, S)
        at, beside = _addresses(base_ptr, expert, 0, S)
        scale_at, scale_beside = _addresses(base_ptr, expert, 1, S)
        for unit in range(UNITS):
            mbarrier.wait(empty.index(s), phase)
            mbarrier.expect(full.index(s), BYTES)
            tma.async_copy_global_to_shared(wd, [w0 + unit * 64, 0], full.index(s), ws.index(2 * s))
            tma.async_copy_global_to_shared(wd, [w1 + unit * 64, 0], full.index(s), ws.index(2 * s + 1))
            if S[GROUP]:
                tma.async_copy_global_to_shared(sd, [s0 + unit, 0], full.index(s), ss.index(2 * s))
                tma.async_copy_global_to_shared(sd, [s1 + unit, 0], full.index(s), ss.index(2 * s + 1))
            tma.async_copy_global_to_shared(xd, [from_row, unit * 128], full.index(s), xs.index(2 * s))
            tma.async_copy_global_to_shared(xd, [from_row, unit * 128 + 64], full.index(s), xs.index(2 * s + 1))
            s, phase = _next(s, phase, S)


@gluon.jit
def _in_turn(a: gl.tensor, b: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """[32, ..] of both halves -> [64, ..], eight rows of each in turn; no number leaves its thread."""
    if len(a.shape) == 1:
        both = gl.reshape(gl.permute(gl.reshape(gl.join(a, b), (4, 8, 2)), (0, 2, 1)), (64,))
    else:
        both = gl.reshape(gl.permute(gl.reshape(gl.join(a, b), (4, 8, 64, 2)), (0, 3, 1, 2)), (64, 64))
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def _decode(p: gl.tensor, INT: gl.constexpr) -> gl.tensor:
    """Bytes of codes -> both parts as operands: int8 of 16 times the code, or e4m3 of 2^-9 times it."""
    if INT:
        low, high = gl.inline_asm_elementwise(
            _HIGH_NIBBLES, "=r,=r,r", [p], dtype=(gl.int8, gl.int8), is_pure=False, pack=4
        )
    else:
        low, high = gl.inline_asm_elementwise(
            _SUBNORMALS, "=r,=r,r", [p], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=False, pack=4
        )
    return low, high


@gluon.jit
def _start_unit(
    xs: gl.tensor, ws: gl.tensor, ss: gl.tensor, s: gl.tensor, sums: gl.tensor,
    S: gl.constexpr, WG: gl.constexpr, TALL: gl.constexpr, ACC: gl.constexpr, ADDS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Decode buffer `s`, start its products with TALL rows: (pending sums, scales [64] or 0). ADDS: to `sums`."""
    # the thread that holds a row of gate's operand holds the same row of up's; so do its registers
    HALF: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 64]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    DOT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    INT: gl.constexpr = xs.dtype == gl.int8
    l0, h0 = _decode(ws.index(2 * s).slice(32 * WG, 32).load(HALF), INT)
    l1, h1 = _decode(ws.index(2 * s + 1).slice(32 * WG, 32).load(HALF), INT)
    low = _in_turn(l0, l1, DOT)
    high = _in_turn(h0, h1, DOT)
    scale = 0
    if S[GROUP]:
        s0 = ss.index(2 * s).slice(32 * WG, 32).load(ROW).to(gl.float32)
        s1 = ss.index(2 * s + 1).slice(32 * WG, 32).load(ROW).to(gl.float32)
        scale = _in_turn(s0, s1, gl.SliceLayout(1, ACC))
    part = warpgroup_mma(low, xs.index(2 * s).slice(0, TALL).permute((1, 0)), sums, use_acc=ADDS, is_async=True)
    part = warpgroup_mma(high, xs.index(2 * s + 1).slice(0, TALL).permute((1, 0)), part, is_async=True)
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
        mbarrier.wait(full.index(s), phase)
        if S[GROUP]:
            part, scale = _start_unit(xs, ws, ss, s, zero, S, WG, TALL, ACC, False)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(s), count=1)
            acc += part.to(gl.float32) * scale[:, None]
        else:
            part, scale = _start_unit(xs, ws, ss, s, acc, S, WG, TALL, ACC, True)
            acc = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(s), count=1)
        s, phase = _next(s, phase, S)
    return acc.to(gl.float32), s, phase


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
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    m = gl.arange(0, TALL, gl.SliceLayout(0, ACC))
    r = gl.load(x_scale + row + m, mask=m < rows, other=0.0) * (INT8_STEP if INT else E4M3_STEP)
    acc, s, phase = _sum_nibbles(xs, ws, ss, full, empty, s, phase, S, WG, TALL, ACC, SUM)
    y = gl.permute(gl.reshape(acc * r[None, :], (4, 2, 8, TALL)), (0, 2, 3, 1))
    a, b = gl.split(y)
    a = gl.reshape(a, (32, TALL))
    b = gl.reshape(b, (32, TALL))
    n = gl.arange(0, 32, gl.SliceLayout(1, a.type.layout))
    if S[GROUP] == 0:
        s0, s1 = _scales(arena, base_ptr, expert, n0, n1, n, S)
        a = a * s0[:, None]
        b = b * s1[:, None]
    if S[BIAS]:
        b0, b1 = _biases(bias_ptr, expert, n0, n1, n, S)
        a = a + b0[:, None]
        b = b + b1[:, None]
    m_out = gl.arange(0, TALL, gl.SliceLayout(0, OUT))
    n_out = gl.arange(0, 32, gl.SliceLayout(1, OUT))
    _store(a, b, y_ptr, row, rows, m_out, n_out, n0, n1, 1, OUT, S)
    return s, phase


@gluon.jit
def _multiply_nibbles(
    arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, x_scale: gl.tensor, y_ptr: gl.tensor,
    ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor, xs: gl.tensor, ws: gl.tensor, ss: gl.tensor,
    full: gl.tensor, empty: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply channels 32 * WG to 32 * WG + 31 of both halves of every tile."""
    first, count, last = _range(ends_ptr, S)
    s = 0
    phase = 0
    tile = gl.program_id(0)
    expert1, row1, rows1, column1 = _find(tile, first, count, band_ptr, bands, S)
    while tile < last:
        expert, row, rows = expert1, row1, rows1
        n0 = column1 * (64 if S[GATED] else 128) + 32 * WG
        n1 = n0 if S[GATED] else n0 + 64
        tile += gl.num_programs(0)
        expert1, row1, rows1, column1 = _find(tile, first, count, band_ptr, bands, S)
        if rows > 64:
            s, phase = _tile_nibbles(
                arena, base_ptr, bias_ptr, x_scale, y_ptr, xs, ws, ss, full, empty, s, phase, expert, row, rows, n0, n1,
                S, WG, 128,
            )  # fmt: skip
        else:
            s, phase = _tile_nibbles(
                arena, base_ptr, bias_ptr, x_scale, y_ptr, xs, ws, ss, full, empty, s, phase, expert, row, rows, n0, n1,
                S, WG, 64,
            )  # fmt: skip


@gluon.jit
def nibble_gemm(
    xd: gl.tensor, wd: gl.tensor, sd: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor,
    x_scale: gl.tensor, y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor,
    S: gl.constexpr,
) -> None:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[sorted row]) for 4-bit weights, as `dense_gemm`.

    Args: `xd` descriptor of the sorted rows, boxes of 128 rows and 64 bytes; `wd` of the arena as uint8 [*, 64], boxes
    of 64 rows; `sd` of the arena as bf16 [*, 64], boxes of one row; the others as there.
    """
    xs = gl.allocate_shared_memory(xd.dtype, [S[STAGES] * 2, 128, 64], xd.layout)
    ws = gl.allocate_shared_memory(gl.uint8, [S[STAGES] * 2, 64, 64], wd.layout)
    ss = gl.allocate_shared_memory(gl.bfloat16, [S[STAGES] * 2, 1, 64], sd.layout)
    full, empty = _barriers(S)
    flat = ss._reinterpret(gl.bfloat16, [S[STAGES] * 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize(
        [
            (
                _multiply_nibbles,
                (arena, base_ptr, bias_ptr, x_scale, y_ptr, ends_ptr, band_ptr, bands, xs, ws, flat, full, empty, S, 0),
            ),
            (
                _multiply_nibbles,
                (arena, base_ptr, bias_ptr, x_scale, y_ptr, ends_ptr, band_ptr, bands, xs, ws, flat, full, empty, S, 1),
            ),
            (_load_nibbles, (xd, wd, sd, base_ptr, ends_ptr, band_ptr, bands, xs, ws, ss, full, empty, S)),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def spread(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, place_ptr: tl.tensor, y_ptr: tl.tensor, y_scale_ptr: tl.tensor,
    assignments: tl.tensor, tokens: tl.tensor, WORDS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    ALWAYS: tl.constexpr, SCALED: tl.constexpr,
) -> None:  # fmt: skip
    """Copy a token's row of WORDS int32, and its scale, to the place of each of its choices."""
    token = tl.program_id(0)
    word = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token.to(tl.int64) * WORDS + word, mask=word < WORDS)
    for j in tl.static_range(TOP_K + ALWAYS):
        flat = token * TOP_K + j if j < TOP_K else assignments + (j - TOP_K) * tokens + token
        place = tl.load(place_ptr + flat).to(tl.int64)
        tl.store(y_ptr + place * WORDS + word, x, mask=(word < WORDS) & (place >= 0))
        if SCALED:
            tl.store(y_scale_ptr + place, tl.load(scale_ptr + token), mask=place >= 0)
