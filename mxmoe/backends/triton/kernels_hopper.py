# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
The group GEMM of sm_90 for rows sorted by expert, in Gluon: warps that load, and two warpgroups that multiply.

One program for each SM walks the tiles of a launch, whatever schemes its experts have. A single warp copies operands
into a ring of buffers in shared memory with the tensor memory accelerator; two warpgroups of four warps wait for a
buffer, multiply it and give it back, each for itself, so that one may still multiply while the other writes its part of
the result. What a tile needs from the schedule's tables is read one tile ahead. A tile reads past its band's end, and
what it finds there is not stored.

Tiles come in runs (`kernels_hopper_ring.py`), one for each class of the schedule; `kernels_hopper_dense.py` and
`kernels_hopper_nibbles.py` say what becomes of a run. Runs of the same operands share a ring; before the memory becomes
another ring, the loading warp waits until nothing of the old one is read any more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mxmoe.backends.triton.kernels_hopper_dense import load_dense, multiply_low, multiply_tall
from mxmoe.backends.triton.kernels_hopper_nibbles import load_nibbles, multiply_nibbles
from mxmoe.backends.triton.kernels_hopper_ring import (
    COLUMNS,
    FIRST,
    HEIGHT,
    LEAVES,
    NIBBLES,
    RING,
    ROWS,
    STAGES,
    TALL_BOX,
    bands_of,
    next_buffer,
    run,
)


@gluon.jit
def _drain(empty: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr) -> None:
    """Wait until every buffer of a ring was given back."""
    COUNT: gl.constexpr = S[STAGES]
    for _ in gl.static_range(COUNT):
        mbarrier.wait(empty.index(S[FIRST] + s), phase)
        s, phase = next_buffer(s, phase, S)


@gluon.jit
def _load_run(
    tall: gl.tuple, low: gl.tuple, weights: gl.tuple, metas: gl.tensor, base_ptr: gl.tensor, ends_ptr: gl.tensor,
    band_ptr: gl.tensor, bands: gl.tensor, small: gl.tensor, big: gl.tensor, ss: gl.tensor, full: gl.tensor,
    empty: gl.tensor, tile: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fill a ring for this program's tiles of a run; the tile of the next run, and the next buffer."""
    first, count = bands_of(ends_ptr, S)
    last = count * S[COLUMNS]
    xd = tall[S[RING]] if S[HEIGHT] >= TALL_BOX else low[S[RING]]
    wd = weights[S[RING]]
    if tile < last:
        if S[NIBBLES]:
            tile, s, phase = load_nibbles(
                xd, wd, metas, base_ptr, band_ptr, bands, small, big, ss, full, empty, first, count, tile, s, phase, S
            )
        else:
            tile, s, phase = load_dense(
                xd, wd, base_ptr, band_ptr, bands, small, big, full, empty, first, count, tile, s, phase, S
            )
    tile -= last
    if S[LEAVES]:
        _drain(empty, s, phase, S)
        s = gl.to_tensor(0)
        phase = gl.to_tensor(1)
    return tile, s, phase


@gluon.jit
def _load(
    tall: gl.tuple, low: gl.tuple, weights: gl.tuple, metas: gl.tensor, base_ptr: gl.tensor, ends_ptr: gl.tensor,
    band_ptr: gl.tensor, bands: gl.tensor, small: gl.tensor, big: gl.tensor, ss: gl.tensor, full: gl.tensor,
    empty: gl.tensor, RUNS: gl.constexpr,
) -> None:  # fmt: skip
    """Fill the rings for all tiles of this program."""
    tile = gl.program_id(0)
    s = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for i in gl.static_range(len(RUNS)):
        tile, s, phase = _load_run(
            tall, low, weights, metas, base_ptr, ends_ptr, band_ptr, bands, small, big, ss, full, empty,
            tile, s, phase, run(RUNS, i),
        )  # fmt: skip


@gluon.jit
def _multiply_run(
    tall: gl.tuple, low: gl.tuple, weights: gl.tuple, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor,
    x_scales: gl.tuple, y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor,
    small: gl.tensor, big: gl.tensor, ss: gl.tensor, full: gl.tensor, empty: gl.tensor, tile: gl.tensor,
    s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply one warpgroup's part of this program's tiles of a run; the tile of the next run, and the next buffer."""
    first, count = bands_of(ends_ptr, S)
    last = count * S[COLUMNS]
    xd = tall[S[RING]] if S[HEIGHT] >= TALL_BOX else low[S[RING]]
    x_scale = x_scales[S[ROWS]]
    if tile < last:
        if S[NIBBLES]:
            tile, s, phase = multiply_nibbles(
                xd, weights[S[RING]], arena, base_ptr, bias_ptr, x_scale, y_ptr, band_ptr, bands, small, big, ss,
                full, empty, first, count, tile, s, phase, S, WG,
            )  # fmt: skip
        elif S[HEIGHT] >= TALL_BOX:
            tile, s, phase = multiply_tall(
                xd, arena, base_ptr, bias_ptr, x_scale, y_ptr, band_ptr, bands, small, big, full, empty,
                first, count, tile, s, phase, S, WG,
            )  # fmt: skip
        else:
            tile, s, phase = multiply_low(
                xd, arena, base_ptr, bias_ptr, x_scale, y_ptr, band_ptr, bands, small, big, full, empty,
                first, count, tile, s, phase, S, WG,
            )  # fmt: skip
    tile -= last
    if S[LEAVES]:
        s = gl.to_tensor(0)
        phase = gl.to_tensor(0)
    return tile, s, phase


@gluon.jit
def _multiply(
    tall: gl.tuple, low: gl.tuple, weights: gl.tuple, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor,
    x_scales: gl.tuple, y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor,
    small: gl.tensor, big: gl.tensor, ss: gl.tensor, full: gl.tensor, empty: gl.tensor,
    RUNS: gl.constexpr, WG: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply one warpgroup's part of all tiles of this program."""
    tile = gl.program_id(0)
    s = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for i in gl.static_range(len(RUNS)):
        tile, s, phase = _multiply_run(
            tall, low, weights, arena, base_ptr, bias_ptr, x_scales, y_ptr, ends_ptr, band_ptr, bands,
            small, big, ss, full, empty, tile, s, phase, run(RUNS, i), WG,
        )  # fmt: skip


@gluon.jit
def divided_gemm(
    tall0: gl.tensor, low0: gl.tensor, weights0: gl.tensor, tall1: gl.tensor, low1: gl.tensor, weights1: gl.tensor,
    tall2: gl.tensor, low2: gl.tensor, weights2: gl.tensor, metas: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor,
    bias_ptr: gl.tensor, x_scales: gl.tuple, y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor,
    bands: gl.tensor, RUNS: gl.constexpr,
) -> None:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[sorted row]) for every tile of the runs, each written once.

    Args: for each ring three descriptors, None beyond the last: `tall` and `low` of the sorted rows [*, k], boxes of
    TALL_BOX and LOW_BOX rows times 128 bytes (64 for 4-bit weights); `weights` of the arena, as overlapping matrices
    [*, n, k] of the rows' type, one from every SLOT bytes on, in boxes of 128 channels times 128 bytes, or for 4-bit
    weights as uint8 [*, 64] in boxes of 64. `metas` of the arena as bf16 [*, 64], boxes of one row; `arena` bytes;
    `base_ptr` int64 [matrices, lanes, 3]; `bias_ptr` float32 [matrices, lanes, n]; `x_scales` float32 by sorted row,
    for each kind of rows; `y_ptr` [rows, n]; the tables of the schedule; `RUNS` as `kernels_hopper_ring.FIELDS`.
    """
    LAST: gl.constexpr = run(RUNS, -1)
    BARRIERS: gl.constexpr = LAST[FIRST] + LAST[STAGES]
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    small = gl.allocate_shared_memory(gl.int8, [4, 128, 128], SQUARE)
    big = gl.allocate_shared_memory(gl.int8, [8, 128, 128], SQUARE)
    ss = gl.allocate_shared_memory(gl.bfloat16, [16, 1, 64], gl.NVMMASharedLayout(0, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BARRIERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    tall = (tall0, tall1, tall2)
    low = (low0, low1, low2)
    weights = (weights0, weights1, weights2)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    tall, low, weights, arena, base_ptr, bias_ptr, x_scales, y_ptr, ends_ptr, band_ptr, bands, small,
                    big, ss, full, empty, RUNS, 0,
                ),
            ),
            (
                _multiply,
                (
                    tall, low, weights, arena, base_ptr, bias_ptr, x_scales, y_ptr, ends_ptr, band_ptr, bands, small,
                    big, ss, full, empty, RUNS, 1,
                ),
            ),
            (
                _load,
                (tall, low, weights, metas, base_ptr, ends_ptr, band_ptr, bands, small, big, ss, full, empty, RUNS),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
