# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
What the divided kernels share: what a run of tiles is compiled for, which tile is next, and where its numbers lie.

A *run* is the tiles of one class of the schedule. The first tile of a program is that of its number; then its loading
warp fetches the number of the next one, counted over all runs, from a counter in memory, so that programs whose memory
is slower get fewer, and posts it to the warpgroups. The warps of a program so walk the same tiles in the same order.
Within a run `tile` counts from the run's first; what is left when the run is over is a tile of the next one.

Tall tiles keep the matrix unit busy and low ones memory. So that both are at once, every BACK-th program may begin with
the part of the runs that reads, and come to the other when no tile of it is left, while the others do the reverse; each
part has a counter of its own then.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mxmoe.backends.triton.kernels import act

FIELDS = (
    *("n", "k", "lanes", "grouping", "gated", "bias", "act", "p", "q"),
    *("kind", "height", "place", "columns", "group", "rows", "ring", "first_barrier", "stages", "leaves"),
    *("apart", "reads", "begins", "back"),
)
"""
What a run is compiled for. The launch: matrix, experts, bands that share columns, whether there are two matrices and a
bias, the nonlinearity with its two numbers. The run: which body, rows of a tile, place of its class, tiles of
a band, channels of a group (0: none), kind of rows, ring of buffers, the ring's first barrier, its buffers, and whether
the next run uses the memory for another ring. An expert of its own size, which sees every token, has a matrix, rows and
operands of its own, and its rows are `apart` between the GEMMs: in the order of tokens, where they are written or read.
Where `back` is not 0, runs are in two parts: those that multiply for most of their time, then those that `reads` says
read; a run that `begins` a part is its first.
"""
N = gl.constexpr(0)
K = gl.constexpr(1)
LANES = gl.constexpr(2)
GROUPING = gl.constexpr(3)
GATED = gl.constexpr(4)
BIAS = gl.constexpr(5)
ACT = gl.constexpr(6)
ACT_P = gl.constexpr(7)
ACT_Q = gl.constexpr(8)
KIND = gl.constexpr(9)
HEIGHT = gl.constexpr(10)
PLACE = gl.constexpr(11)
COLUMNS = gl.constexpr(12)
GROUP = gl.constexpr(13)
ROWS = gl.constexpr(14)
RING = gl.constexpr(15)
FIRST = gl.constexpr(16)
STAGES = gl.constexpr(17)
LEAVES = gl.constexpr(18)
APART = gl.constexpr(19)
READING = gl.constexpr(20)
BEGINS = gl.constexpr(21)
BACK = gl.constexpr(22)

STORED = gl.constexpr(64)
"""Columns of sums that are stored at a time. All go through the same code, so that both warpgroups' stays cached."""
STEP = gl.constexpr(128)
"""Bytes of a row in a step of dense weights; channels of a step of 4-bit ones."""
TALL_BOX = gl.constexpr(64)
LOW_BOX = gl.constexpr(16)
"""Rows that one copy brings, of tiles of 64 and 128 rows and of those of 16 and 32."""
LOW_ROWS = gl.constexpr(64)
"""Rows that a buffer of `multiply_low` has room for."""
WIDE = gl.constexpr(0)
NARROW = gl.constexpr(1)
NIBBLES = gl.constexpr(2)
SCALED = gl.constexpr(3)
SCALED_LOW = gl.constexpr(4)
SLIM = gl.constexpr(5)
"""
Bodies: dense weights in tall tiles and in low ones, 4-bit weights, those with integer scales like dense ones, and dense
weights in tall tiles of half as many channels.
"""
WRITES, READS = gl.constexpr(1), gl.constexpr(2)
"""Of rows that are `apart`; 0: all that a run reads and writes is sorted."""
POSTS = gl.constexpr(4)
"""Numbers of tiles that may be on their way to the warpgroups."""
SLOT = gl.constexpr(256)
"""Bytes; every payload in the arena begins at a multiple."""


@triton.constexpr_function
def run(runs: tuple, i: int) -> tuple:
    """What run `i` is compiled for."""
    return runs[i]


@gluon.jit
def place_of_program(EVERY: gl.constexpr) -> gl.tensor:
    """Say whether this program begins with what reads, its number among those that begin alike, and how many do not."""
    program = gl.program_id(0)
    backs = gl.num_programs(0) // EVERY
    is_back = (program % EVERY) == EVERY - 1
    number = gl.where(is_back, program // EVERY, program - program // EVERY)
    return is_back.to(gl.int32), number, backs


@gluon.jit
def walk_of(tables: gl.tuple, backs: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """Tables with the counter of a run's part, and what the numbers that it gives are too high by."""
    base_ptr, ends, band_ptr, bands, walk_ptr = tables
    begun = backs if S[READING] else gl.num_programs(0) - backs
    counter = walk_ptr + 2 if S[READING] else walk_ptr
    return (base_ptr, ends, band_ptr, bands, counter), gl.num_programs(0) - begun


@gluon.jit
def is_on(is_back: gl.tensor, part: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """Say whether a run is of this turn: programs in front have one for both parts, others what reads first."""
    READ: gl.constexpr = 1 if S[READING] else 0
    return (is_back == 0) | (part != READ)


@gluon.jit
def enter(
    walk_ptr: gl.tensor, post: gl.tuple, is_back: gl.tensor, above: gl.tensor, before: gl.tensor, tile: gl.tensor,
    turn: gl.tensor, S: gl.constexpr, LOADS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Where a part begins, its count and first tile: this program's number in the part it began with, else the next."""
    READ: gl.constexpr = 1 if S[READING] else 0
    if S[BEGINS]:
        before = above
        if is_back != READ:
            if LOADS:
                tile = fetch(walk_ptr, post, turn) - before
            else:
                tile = take(post, turn) - before
            turn += 1
    return before, tile, turn


@gluon.jit
def hold(ends_ptr: gl.tensor, COUNT: gl.constexpr) -> gl.tensor:
    """Copy the first band of every class, and the end, to where no warp that comes to a run waits for memory."""
    ends = gl.allocate_shared_memory(gl.int32, [COUNT, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(COUNT):
        ends.index(i).store(gl.full([1], gl.load(ends_ptr + i), gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    return ends


@gluon.jit
def bands_of(ends: gl.tensor, WARPS: gl.constexpr, S: gl.constexpr) -> gl.tensor:
    """First band and number of bands of a run, read by so many warps."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    first = gl.max(ends.index(S[PLACE]).load(ONE), 0)
    return first, gl.max(ends.index(S[PLACE] + 1).load(ONE), 0) - first


@gluon.jit
def fetch(walk_ptr: gl.tensor, post: gl.tuple, turn: gl.tensor) -> gl.tensor:
    """Fetch the number of this program's next tile, and post it as the `turn`-th."""
    number, posted, taken = post
    slot = turn % POSTS
    tile = gl.num_programs(0) + gl.atomic_add(walk_ptr, 1, sem="relaxed")
    mbarrier.wait(taken.index(slot), ((turn // POSTS) & 1) ^ 1)
    number.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(posted.index(slot), count=1)
    return tile


@gluon.jit
def take(post: gl.tuple, turn: gl.tensor) -> gl.tensor:
    """Give the `turn`-th number that was posted to this warpgroup."""
    number, posted, taken = post
    slot = turn % POSTS
    mbarrier.wait(posted.index(slot), (turn // POSTS) & 1)
    tile = gl.max(number.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(taken.index(slot), count=1)
    return tile


@gluon.jit
def find(
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
def addresses(base_ptr: gl.tensor, expert: gl.tensor, WHAT: gl.constexpr, S: gl.constexpr) -> gl.tensor:
    """Byte offset of payload (0) or scale (1) of an expert's matrix, and of the second one's, if any."""
    beside = S[LANES] if S[GATED] else 0
    return gl.load(base_ptr + expert * 3 + WHAT), gl.load(base_ptr + (beside + expert) * 3 + WHAT)


@gluon.jit
def next_buffer(s: gl.tensor, phase: gl.tensor, S: gl.constexpr) -> gl.tensor:
    """Give the buffer after `s`, and the phase of its barrier."""
    s += 1
    if s == S[STAGES]:
        s = 0
        phase ^= 1
    return s, phase


@gluon.jit
def by_channel(
    at: gl.tensor, n0: gl.tensor, n1: gl.tensor, beside: gl.tensor, n: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Numbers per channel of both halves of a tile, from `at` and `beside`; zeros beyond the last channel."""
    return (
        gl.load(at + n0 + n, mask=n < S[N] - n0, other=0.0),
        gl.load(beside + n1 + n, mask=n < S[N] - n1, other=0.0),
    )


@gluon.jit
def scales_of(
    arena: gl.tensor, base_ptr: gl.tensor, expert: gl.tensor, n0: gl.tensor, n1: gl.tensor, n: gl.tensor,
    S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scales per channel of both halves of a tile."""
    at, beside = addresses(base_ptr, expert, 1, S)
    typed: gl.constexpr = gl.pointer_type(gl.float32)
    return by_channel((arena + at).to(typed), n0, n1, (arena + beside).to(typed), n, S)


@gluon.jit
def biases_of(
    bias_ptr: gl.tensor, expert: gl.tensor, n0: gl.tensor, n1: gl.tensor, n: gl.tensor, S: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Biases of both halves of a tile."""
    beside = S[LANES] if S[GATED] else 0
    return by_channel(bias_ptr + expert * S[N], n0, n1, bias_ptr + (beside + expert) * S[N], n, S)


@gluon.jit
def sigmoid(x: gl.tensor) -> gl.tensor:
    """
    1 / (1 + exp(-x)), each step one instruction, where `act` spends three on numbers near the ends of float32.

    What follows a product is most of a tile's code, and what no cache holds of it is waited for.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def store(
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
        if KIND == "silu":
            y = (a * sigmoid(a) * b).to(y_ptr.dtype.element_ty)
        else:
            y = act(a, b, KIND, FIRST_NUMBER, SECOND_NUMBER).to(y_ptr.dtype.element_ty)
        gl.store(to + n0, gl.convert_layout(y, LAYOUT), mask=inside & gl.expand_dims(n < S[N] - n0, AXIS))
    else:
        a = gl.convert_layout(a.to(y_ptr.dtype.element_ty), LAYOUT)
        gl.store(to + n0, a, mask=inside & gl.expand_dims(n < S[N] - n0, AXIS))
        b = gl.convert_layout(b.to(y_ptr.dtype.element_ty), LAYOUT)
        gl.store(to + n1, b, mask=inside & gl.expand_dims(n < S[N] - n1, AXIS))


@gluon.jit
def pick(x: gl.tensor, which: gl.tensor) -> gl.tensor:
    """First or second half of the columns of sums [64, columns]: every thread has as many of either."""
    HALF: gl.constexpr = x.shape[1] // 2
    first, second = gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))
    return gl.where(which == 0, first, second)


@gluon.jit
def store_channels(
    a: gl.tensor, b: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, y_ptr: gl.tensor,
    expert: gl.tensor, row: gl.tensor, rows: gl.tensor, n0: gl.tensor, n1: gl.tensor, CHANNELS: gl.constexpr,
    BY_CHANNEL: gl.constexpr, S: gl.constexpr,
) -> None:  # fmt: skip
    """Store both halves [CHANNELS, rows] of Y^T, with their biases; BY_CHANNEL: times their scales."""
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [CHANNELS // 8, 256 // CHANNELS], [1, 4], [0, 1])
    n = gl.arange(0, CHANNELS, gl.SliceLayout(1, a.type.layout))
    if BY_CHANNEL:
        s0, s1 = scales_of(arena, base_ptr, expert, n0, n1, n, S)
        a = a * s0[:, None]
        b = b * s1[:, None]
    if S[BIAS]:
        b0, b1 = biases_of(bias_ptr, expert, n0, n1, n, S)
        a = a + b0[:, None]
        b = b + b1[:, None]
    m_out = gl.arange(0, a.shape[1], gl.SliceLayout(0, OUT))
    n_out = gl.arange(0, CHANNELS, gl.SliceLayout(1, OUT))
    store(a, b, y_ptr, row, rows, m_out, n_out, n0, n1, 1, OUT, S)
