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
    APART,
    BACK,
    COLUMNS,
    FIRST,
    HEIGHT,
    KIND,
    LEAVES,
    NARROW,
    NIBBLES,
    POSTS,
    READS,
    RING,
    ROWS,
    SCALED,
    SCALED_LOW,
    SLIM,
    STAGES,
    TALL_BOX,
    WIDE,
    WRITES,
    N,
    bands_of,
    enter,
    hold,
    is_on,
    next_buffer,
    place_of_program,
    run,
    walk_of,
)
from mxmoe.backends.triton.kernels_hopper_scaled import load_scaled, multiply_scaled


@gluon.jit
def _wait() -> None:
    """`kernels_chain.wait`, in Gluon."""
    code: gl.constexpr = "griddepcontrol.wait; // $0"
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _lead() -> None:
    """Let the next launch begin, whose programs wait."""
    code: gl.constexpr = "griddepcontrol.launch_dependents; // $0"
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _drain(empty: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr) -> None:
    """Wait until every buffer of a ring was given back."""
    COUNT: gl.constexpr = S[STAGES]
    for _ in gl.static_range(COUNT):
        mbarrier.wait(empty.index(S[FIRST] + s), phase)
        s, phase = next_buffer(s, phase, S)


@gluon.jit
def _load_run(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, narrow: gl.tuple, metas: gl.tensor, tables: gl.tuple,
    ring: gl.tuple, post: gl.tuple, always: gl.tuple, before: gl.tensor, tile: gl.tensor, turn: gl.tensor, s: gl.tensor,
    phase: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fill a ring for this program's tiles of a run; what `_load` needs for the next run."""
    first, count = bands_of(tables[1], 1, S)
    last = count * S[COLUMNS]
    xd = tall[S[RING]] if S[HEIGHT] >= TALL_BOX else low[S[RING]]
    wd = narrow[S[RING]] if S[KIND] == NARROW or S[KIND] == SLIM else wide[S[RING]]
    shift = gl.load(always[0]) if S[APART] == READS else 0
    if tile < last:
        if S[KIND] == NIBBLES:
            tile, turn, s, phase = load_nibbles(
                xd, wd, metas, tables, ring, post, first, count, shift, before, tile, turn, s, phase, S
            )
        elif S[KIND] == SCALED or S[KIND] == SCALED_LOW:
            tile, turn, s, phase = load_scaled(
                xd, wd, narrow[S[RING]], tables, ring, post, first, count, shift, before, tile, turn, s, phase, S
            )
        else:
            tile, turn, s, phase = load_dense(
                xd, wd, tables, ring, post, first, count, shift, before, tile, turn, s, phase, S
            )  # fmt: skip
    if S[LEAVES]:
        _drain(ring[4], s, phase, S)
        s = gl.to_tensor(0)
        phase = gl.to_tensor(1)
    return before + last, tile - last, turn, s, phase


@gluon.jit
def _load_part(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, narrow: gl.tuple, metas: gl.tensor, tables: gl.tuple,
    ring: gl.tuple, post: gl.tuple, always: gl.tuple, is_back: gl.tensor, part: gl.tensor, backs: gl.tensor,
    before: gl.tensor, tile: gl.tensor, turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`_load_run` where there are two parts: of programs at the back, one part after the other, what reads first."""
    if is_on(is_back, part, S):
        own, above = walk_of(tables, backs, S)
        before, tile, turn = enter(own[4], post, is_back, above, before, tile, turn, S, True)
        before, tile, turn, s, phase = _load_run(
            tall, low, wide, narrow, metas, own, ring, post, always, before, tile, turn, s, phase, S
        )
    return before, tile, turn, s, phase


@gluon.jit
def _load(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, narrow: gl.tuple, metas: gl.tensor, tables: gl.tuple,
    ring: gl.tuple, post: gl.tuple, always: gl.tuple, leads: gl.tensor, RUNS: gl.constexpr,
) -> None:  # fmt: skip
    """Fill the rings for all tiles of this program; the last program that does leaves the counters as they were."""
    before = gl.to_tensor(0)
    tile = gl.program_id(0)
    turn = gl.to_tensor(0)
    s = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    ENDS: gl.constexpr = run(RUNS, 0)[BACK]
    if ENDS:
        is_back, tile, backs = place_of_program(ENDS)
        for part in range(1 + is_back):
            for i in gl.static_range(len(RUNS)):
                before, tile, turn, s, phase = _load_part(
                    tall, low, wide, narrow, metas, tables, ring, post, always, is_back, part, backs, before, tile,
                    turn, s, phase, run(RUNS, i),
                )  # fmt: skip
    else:
        for i in gl.static_range(len(RUNS)):
            before, tile, turn, s, phase = _load_run(
                tall, low, wide, narrow, metas, tables, ring, post, always, before, tile, turn, s, phase, run(RUNS, i)
            )
    if leads != 0:
        _lead()
    walk_ptr = tables[4]
    if gl.atomic_add(walk_ptr + 1, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.store(walk_ptr, 0)
        gl.store(walk_ptr + 1, 0)
        if ENDS:
            gl.store(walk_ptr + 2, 0)


@gluon.jit
def _multiply_run(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, arena: gl.tensor, bias_ptr: gl.tensor, x_scales: gl.tuple,
    y_ptr: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple, always: gl.tuple, before: gl.tensor,
    tile: gl.tensor, turn: gl.tensor, s: gl.tensor, phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Multiply one warpgroup's part of this program's tiles of a run; what `_multiply` needs for the next run."""
    first, count = bands_of(tables[1], 4, S)
    last = count * S[COLUMNS]
    xd = tall[S[RING]] if S[HEIGHT] >= TALL_BOX else low[S[RING]]
    x_scale = x_scales[S[ROWS]]
    # bodies count sorted rows, and these begin where the expert's first one lies
    if S[APART] == READS:
        x_scale = x_scale - gl.load(always[0])
    if S[APART] == WRITES:
        y_ptr = always[1] - gl.load(always[0]).to(gl.int64) * S[N]
    if tile < last:
        if S[KIND] == NIBBLES:
            tile, turn, s, phase = multiply_nibbles(
                xd, wide[S[RING]], arena, bias_ptr, x_scale, y_ptr, tables, ring, post, first, count, before,
                tile, turn, s, phase, S, WG,
            )  # fmt: skip
        elif S[KIND] == SCALED or S[KIND] == SCALED_LOW:
            tile, turn, s, phase = multiply_scaled(
                xd, wide[S[RING]], arena, bias_ptr, x_scale, y_ptr, tables, ring, post, first, count, before,
                tile, turn, s, phase, S, WG,
            )  # fmt: skip
        elif S[KIND] == WIDE or S[KIND] == SLIM:
            tile, turn, s, phase = multiply_tall(
                xd, arena, bias_ptr, x_scale, y_ptr, tables, ring, post, first, count, before,
                tile, turn, s, phase, S, WG,
            )  # fmt: skip
        else:
            tile, turn, s, phase = multiply_low(
                xd, arena, bias_ptr, x_scale, y_ptr, tables, ring, post, first, count, before,
                tile, turn, s, phase, S, WG,
            )  # fmt: skip
    if S[LEAVES]:
        s = gl.to_tensor(0)
        phase = gl.to_tensor(0)
    return before + last, tile - last, turn, s, phase


@gluon.jit
def _multiply_part(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, arena: gl.tensor, bias_ptr: gl.tensor, x_scales: gl.tuple,
    y_ptr: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple, always: gl.tuple, is_back: gl.tensor,
    part: gl.tensor, backs: gl.tensor, before: gl.tensor, tile: gl.tensor, turn: gl.tensor, s: gl.tensor,
    phase: gl.tensor, S: gl.constexpr, WG: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """`_multiply_run` where there are two parts, as `_load_part`."""
    if is_on(is_back, part, S):
        own, above = walk_of(tables, backs, S)
        before, tile, turn = enter(own[4], post, is_back, above, before, tile, turn, S, False)
        before, tile, turn, s, phase = _multiply_run(
            tall, low, wide, arena, bias_ptr, x_scales, y_ptr, own, ring, post, always, before, tile, turn, s, phase,
            S, WG,
        )  # fmt: skip
    return before, tile, turn, s, phase


@gluon.jit
def _multiply(
    tall: gl.tuple, low: gl.tuple, wide: gl.tuple, arena: gl.tensor, bias_ptr: gl.tensor, x_scales: gl.tuple,
    y_ptr: gl.tensor, tables: gl.tuple, ring: gl.tuple, post: gl.tuple, always: gl.tuple, RUNS: gl.constexpr,
    WG: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply one warpgroup's part of all tiles of this program."""
    before = gl.to_tensor(0)
    tile = gl.program_id(0)
    turn = gl.to_tensor(0)
    s = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    ENDS: gl.constexpr = run(RUNS, 0)[BACK]
    if ENDS:
        is_back, tile, backs = place_of_program(ENDS)
        for part in range(1 + is_back):
            for i in gl.static_range(len(RUNS)):
                before, tile, turn, s, phase = _multiply_part(
                    tall, low, wide, arena, bias_ptr, x_scales, y_ptr, tables, ring, post, always, is_back, part, backs,
                    before, tile, turn, s, phase, run(RUNS, i), WG,
                )  # fmt: skip
    else:
        for i in gl.static_range(len(RUNS)):
            before, tile, turn, s, phase = _multiply_run(
                tall, low, wide, arena, bias_ptr, x_scales, y_ptr, tables, ring, post, always, before, tile, turn, s,
                phase, run(RUNS, i), WG,
            )  # fmt: skip


@gluon.jit
def _post() -> gl.tuple:
    """Numbers of tiles on their way from the loading warp to both warpgroups, and when they are there and read."""
    number = gl.allocate_shared_memory(gl.int32, [POSTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [POSTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [POSTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(POSTS):
        mbarrier.init(posted.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    return number, posted, taken


@gluon.jit(do_not_specialize=["leads"])
def divided_gemm(
    tall0: gl.tensor, low0: gl.tensor, wide0: gl.tensor, narrow0: gl.tensor, tall1: gl.tensor, low1: gl.tensor,
    wide1: gl.tensor, narrow1: gl.tensor, tall2: gl.tensor, low2: gl.tensor, wide2: gl.tensor, narrow2: gl.tensor,
    tall3: gl.tensor, low3: gl.tensor, wide3: gl.tensor, narrow3: gl.tensor, tall4: gl.tensor, low4: gl.tensor,
    wide4: gl.tensor, narrow4: gl.tensor,
    metas: gl.tensor, arena: gl.tensor, base_ptr: gl.tensor, bias_ptr: gl.tensor, x_scales: gl.tuple,
    y_ptr: gl.tensor, ends_ptr: gl.tensor, band_ptr: gl.tensor, bands: gl.tensor, walk_ptr: gl.tensor,
    always: gl.tuple, leads: gl.tensor, RUNS: gl.constexpr,
) -> None:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[sorted row]) for every tile of the runs, each written once.

    Args: for each kind of operands four descriptors, None where there is nothing: `tall` and `low` of the sorted rows
    [*, k], boxes of TALL_BOX and LOW_BOX rows times 128 bytes (64 for 4-bit weights); `wide` and `narrow` of the arena,
    as overlapping matrices [*, n, k] of the rows' type, one from every SLOT bytes on, in boxes of 128 and 64 channels
    times 128 bytes, or for 4-bit weights `wide` as uint8 [*, 64] in boxes of 64. `metas` of the arena as bf16 [*, 64],
    boxes of one row; `arena` bytes;
    `base_ptr` int64 [matrices, lanes, 3]; `bias_ptr` float32 [matrices, lanes, n]; `x_scales` float32 by sorted row,
    for each kind of rows; `y_ptr` [rows, n]; the tables of the schedule, of
    which `walk_ptr` two counters; `RUNS` as `kernels_hopper_ring.FIELDS`. An expert that sees every token has the last
    descriptors and scales, and `always`: its first sorted row, and [tokens, its n] where its results are `apart`.
    `leads` says whether the next launch may begin while this one's last tiles are multiplied.
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
    tall = (tall0, tall1, tall2, tall3, tall4)
    low = (low0, low1, low2, low3, low4)
    wide = (wide0, wide1, wide2, wide3, wide4)
    narrow = (narrow0, narrow1, narrow2, narrow3, narrow4)
    _wait()
    tables = (base_ptr, hold(ends_ptr, len(RUNS) + 1), band_ptr, bands, walk_ptr)
    ring = (small, big, ss, full, empty)
    post = _post()
    gl.warp_specialize(
        [
            (_multiply, (tall, low, wide, arena, bias_ptr, x_scales, y_ptr, tables, ring, post, always, RUNS, 0)),
            (_multiply, (tall, low, wide, arena, bias_ptr, x_scales, y_ptr, tables, ring, post, always, RUNS, 1)),
            (_load, (tall, low, wide, narrow, metas, tables, ring, post, always, leads, RUNS)),
        ],
        [4, 1],
        [240, 24],
    )
