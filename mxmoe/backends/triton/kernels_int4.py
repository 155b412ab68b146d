# type: ignore  # a kernel is another language in Python's letters: constants change type, decorators change calls
"""
Grouped products on native INT4 matrix units, in Gluon: mma.m16n8k64 on sm_80 to sm_89, and emulated on newer machines.

Plain Triton has no 4-bit dot. Here sums are a tensor [MT, NT, 8, 4, 2, 2] = (16 output channels, 8 rows, lane / 4, lane
% 4, half of the channels, half of a pair of rows) whose last two axes are four registers of a lane, operands lie in
memory as `int4_pack` puts them, and an element-wise inline-assembly operation with four elements a call is then one
product of 16 x 8 over 128 input channels: broadcasting an operand along NT or MT renames registers, nothing moves. A
step is one group of 128 channels: two products of 64, whose sum is scaled in float32.

A program walks tiles of HEIGHT rows of one expert times WIDTH output channels; operands and scales come through a ring
of STAGES buffers in shared memory, filled by cp.async. Tiles come from the tables of `schedule`, classes of INT4
experts only: these experts have a launch of their own, as plain Triton cannot hold this body.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mxmoe.backends.triton.kernels import act

# An integer below 2^22 added to the bits of 1.5 * 2^23 is that float plus the integer: the sum starts there, and one
# exact float subtraction stands for a conversion, which runs at half the rate. Products and sums are rounded each
# (.rn): the definition does so, and a fused operation would differ in the last bit.
_GROUP_ASM = gl.constexpr(
    """{
.reg .b32 m, c0, c1, c2, c3;
.reg .f32 f, s;
mov.b32 m, 0x4B400000;
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {c0,c1,c2,c3}, {$4,$5,$6,$7}, {$12,$13}, {m,m,m,m};
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {c0,c1,c2,c3}, {$8,$9,$10,$11}, {$14,$15}, {c0,c1,c2,c3};
mov.b32 f, c0;
sub.rn.f32 f, f, 0f4B400000;
mul.rn.f32 s, $20, $16;
mul.rn.f32 f, f, s;
add.rn.f32 $0, $24, f;
mov.b32 f, c1;
sub.rn.f32 f, f, 0f4B400000;
mul.rn.f32 s, $21, $17;
mul.rn.f32 f, f, s;
add.rn.f32 $1, $25, f;
mov.b32 f, c2;
sub.rn.f32 f, f, 0f4B400000;
mul.rn.f32 s, $22, $18;
mul.rn.f32 f, f, s;
add.rn.f32 $2, $26, f;
mov.b32 f, c3;
sub.rn.f32 f, f, 0f4B400000;
mul.rn.f32 s, $23, $19;
mul.rn.f32 f, f, s;
add.rn.f32 $3, $27, f;
}"""
)
_CHANNEL_ASM = gl.constexpr(
    """{
.reg .b32 c0, c1, c2, c3;
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {c0,c1,c2,c3}, {$4,$5,$6,$7}, {$12,$13}, {$16,$17,$18,$19};
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$14,$15}, {c0,c1,c2,c3};
}"""
)


@gluon.jit
def multiply_group(
    a0: gl.tensor, a1: gl.tensor, b: gl.tensor, a_scale: gl.tensor, b_scale: gl.tensor, total: gl.tensor,
) -> gl.tensor:  # fmt: skip
    """Total += (a b over 128 channels, an int32) * (b_scale * a_scale), in float32; all of one shape [.., 2, 2]."""
    return gl.inline_asm_elementwise(
        _GROUP_ASM,
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f,f,f,f,f",
        [a0, a1, b, a_scale, b_scale, total],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def multiply_channel(
    a0: gl.tensor, a1: gl.tensor, b: gl.tensor, total: gl.tensor,
) -> gl.tensor:  # fmt: skip
    """Total += a b over 128 channels, in int32."""
    return gl.inline_asm_elementwise(
        _CHANNEL_ASM,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, b, total],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def accumulators(height: int, warps: int) -> gl.BlockedLayout:
    """Layout of the sums: a warp holds pairs of 16 output channels, so that gate and up of a channel meet in a lane."""
    across = 2 if warps == 8 or height >= 64 else 1
    return gl.BlockedLayout(
        [2, 1, 1, 1, 2, 2], [1, 1, 8, 4, 1, 1], [warps // across, across, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )


@gluon.constexpr_function
def halves(sums: gl.BlockedLayout) -> gl.BlockedLayout:
    """Layout of both products' left operands: as the sums, with one more axis that each lane holds whole."""
    return gl.BlockedLayout(
        [*sums.size_per_thread, 2], [*sums.threads_per_warp, 1], [*sums.warps_per_cta, 1], [5, 4, 6, 3, 2, 1, 0]
    )


@gluon.jit
def _sources(
    row_of_ptr: gl.tensor, first: gl.tensor, n_rows: gl.tensor, top_k: gl.tensor, tokens: gl.tensor,
    HEIGHT: gl.constexpr, GATHER: gl.constexpr, L: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Rows of x [HEIGHT] that a band reads; beyond its end its last row again, so that no address is wrong."""
    row = first + gl.minimum(gl.arange(0, HEIGHT, layout=L), n_rows - 1)
    if GATHER:
        flat = gl.load(row_of_ptr + row)
        # rows of always-on experts follow those that the router made
        row = gl.where(flat < tokens * top_k, flat // top_k, (flat - tokens * top_k) % tokens)
    return row


@gluon.jit
def _copy_step(
    step: gl.tensor, a_to: gl.tensor, b_to: gl.tensor, as_to: gl.tensor, bs_to: gl.tensor, a_from: gl.tensor,
    b_from: gl.tensor, as_from: gl.tensor, bs_from: gl.tensor, as_inside: gl.tensor, as_stride: gl.tensor,
    GROUPED: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying one step's operands and scales into one buffer of the ring."""
    async_copy.async_copy_global_to_shared(a_to, a_from + step * 256)
    async_copy.async_copy_global_to_shared(b_to, b_from + step * 16)
    if GROUPED:
        async_copy.async_copy_global_to_shared(as_to, as_from + step * as_stride, mask=as_inside)
        async_copy.async_copy_global_to_shared(bs_to, bs_from + step)


@gluon.jit
def _tile(
    x_ptr: gl.tensor, x_scale_ptr: gl.tensor, w_ptr: gl.tensor, w_scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    out_ptr: gl.tensor, row_of_ptr: gl.tensor, slot: gl.tensor, first: gl.tensor, n_rows: gl.tensor,
    column: gl.tensor, n: gl.tensor, steps: gl.tensor, top_k: gl.tensor, tokens: gl.tensor, HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr, GATHER: gl.constexpr, GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr, ACT: gl.constexpr, P: gl.constexpr, Q: gl.constexpr,
) -> None:  # fmt: skip
    """One tile: n_rows sorted rows from `first` on, times WIDTH output channels of the weight at `slot`."""
    MT: gl.constexpr = WIDTH // 16
    NT: gl.constexpr = HEIGHT // 8
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = accumulators(HEIGHT, WARPS)
    HALVES: gl.constexpr = halves(SUMS)
    A_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    B_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    AS_COPY: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    BS_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    fragments = (n + 15) // 16
    fragment = gl.minimum(column * MT + gl.arange(0, MT, layout=gl.SliceLayout(1, A_COPY)), fragments - 1)
    word = gl.arange(0, 256, layout=gl.SliceLayout(0, A_COPY))
    a_from = w_ptr + slot.to(gl.int64) * (fragments * steps * 256)
    a_from = a_from + gl.expand_dims(fragment * (steps * 256), 1) + gl.expand_dims(word, 0)
    source = _sources(row_of_ptr, first, n_rows, top_k, tokens, HEIGHT, GATHER, gl.SliceLayout(1, B_COPY))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, B_COPY))
    b_from = x_ptr + gl.expand_dims(source * (steps * 16), 1) + gl.expand_dims(word, 0)
    as_column = column * WIDTH + gl.arange(0, WIDTH, layout=AS_COPY)
    as_inside = as_column < fragments * 16
    as_from = w_scale_ptr + slot.to(gl.int64) * ((steps if GROUPED else 1) * fragments * 16) + as_column
    source = _sources(row_of_ptr, first, n_rows, top_k, tokens, HEIGHT, GATHER, BS_COPY)
    bs_from = x_scale_ptr + source * (steps if GROUPED else 1)

    a_ring = gl.allocate_shared_memory(gl.int32, [STAGES, MT, 256], PLAIN2)
    b_ring = gl.allocate_shared_memory(gl.int32, [STAGES, HEIGHT, 16], PLAIN2)
    as_ring = gl.allocate_shared_memory(w_scale_ptr.dtype.element_ty, [STAGES if GROUPED else 1, WIDTH], PLAIN1)
    bs_ring = gl.allocate_shared_memory(gl.float32, [STAGES if GROUPED else 1, HEIGHT], PLAIN1)
    for step in gl.static_range(STAGES - 1):
        if step < steps:
            _copy_step(
                step, a_ring.index(step), b_ring.index(step), as_ring.index(step if GROUPED else 0),
                bs_ring.index(step if GROUPED else 0), a_from, b_from, as_from, bs_from, as_inside,
                fragments * 16, GROUPED,
            )  # fmt: skip
        async_copy.commit_group()

    total = gl.zeros([MT, NT, 8, 4, 2, 2], gl.float32 if GROUPED else gl.int32, layout=SUMS)
    for step in range(steps):
        # the newest STAGES - 2 copies may be under way
        async_copy.wait_group(STAGES - 2)
        at = step % STAGES
        a = a_ring.index(at).reshape([MT, 2, 1, 8, 4, 2, 2]).permute((0, 2, 3, 4, 5, 6, 1)).load(HALVES)
        b = b_ring.index(at).reshape([1, NT, 8, 4, 2, 2]).load(SUMS)
        if GROUPED:
            a_scale = as_ring.index(at).reshape([MT, 1, 8, 1, 2, 1]).load(SUMS).to(gl.float32)
            b_scale = bs_ring.index(at).reshape([1, NT, 1, 4, 1, 2]).load(SUMS)
        # into the buffer of the step before, which every warp has read
        ahead = step + STAGES - 1
        if ahead < steps:
            into = ahead % STAGES
            _copy_step(
                ahead, a_ring.index(into), b_ring.index(into), as_ring.index(into if GROUPED else 0),
                bs_ring.index(into if GROUPED else 0), a_from, b_from, as_from, bs_from, as_inside,
                fragments * 16, GROUPED,
            )  # fmt: skip
        async_copy.commit_group()
        a0, a1 = gl.split(a)
        a0 = gl.convert_layout(a0, SUMS, assert_trivial=True)
        a1 = gl.convert_layout(a1, SUMS, assert_trivial=True)
        a0, _ = gl.broadcast(a0, total)
        a1, _ = gl.broadcast(a1, total)
        b, _ = gl.broadcast(b, total)
        if GROUPED:
            a_scale, _ = gl.broadcast(a_scale, total)
            b_scale, _ = gl.broadcast(b_scale, total)
            total = multiply_group(a0, a1, b, a_scale, b_scale, total)
        else:
            total = multiply_channel(a0, a1, b, total)
    async_copy.wait_group(0)
    if not GROUPED:
        as_ring.index(0).store(gl.load(as_from, mask=as_inside, other=0.0))
        bs_ring.index(0).store(gl.load(bs_from))
        a_scale = as_ring.index(0).reshape([MT, 1, 8, 1, 2, 1]).load(SUMS).to(gl.float32)
        b_scale = bs_ring.index(0).reshape([1, NT, 1, 4, 1, 2]).load(SUMS)
        total = total.to(gl.float32) * (b_scale * a_scale)
    if HAS_BIAS:
        bias_from = bias_ptr + slot * (fragments * 16) + as_column
        bias_at = gl.allocate_shared_memory(gl.float32, [WIDTH], PLAIN1)
        bias_at.store(gl.load(bias_from, mask=as_inside, other=0.0))
        total = total + bias_at.reshape([MT, 1, 8, 1, 2, 1]).load(SUMS)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(total, [MT // 2, 2, NT, 8, 4, 2, 2]), (0, 2, 3, 4, 5, 6, 1)))
        total = act(gate, up, ACT, P, Q)
    _store(total, out_ptr, first, n_rows, column, n // 2 if GATED else n, HEIGHT, WIDTH // 2 if GATED else WIDTH)


@gluon.jit
def _store(
    total: gl.tensor, out_ptr: gl.tensor, first: gl.tensor, n_rows: gl.tensor, column: gl.tensor, n: gl.tensor,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
) -> None:  # fmt: skip
    """Write the sums as rows of `out`: through shared memory to a layout whose lanes write 16 bytes each."""
    WARPS: gl.constexpr = gl.num_warps()
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    # rows are (NT, lane % 4, half of a pair), channels (MT, half, lane / 4)
    y = gl.reshape(gl.permute(total, (1, 3, 5, 0, 4, 2)), [HEIGHT, WIDTH]).to(out_ptr.dtype.element_ty)
    y = gl.convert_layout(y, OUT)
    row = gl.expand_dims(gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(column * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT)), 0)
    to = out_ptr + (first + row).to(gl.int64) * n + channel
    gl.store(to, y, mask=(row < n_rows) & (channel < n))


# numbers that are 1 would become constants of a binary of their own, and one binary serves every call
@gluon.jit(do_not_specialize=("steps", "top_k", "tokens"))
def int4_kernel(
    x_ptr: gl.tensor, x_scale_ptr: gl.tensor, w_ptr: gl.tensor, w_scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    out_ptr: gl.tensor, row_of_ptr: gl.tensor, slot_ptr: gl.tensor, class_band_ptr: gl.tensor,
    band_expert_ptr: gl.tensor, band_row_ptr: gl.tensor, band_rows_ptr: gl.tensor, n: gl.tensor, steps: gl.tensor,
    top_k: gl.tensor, tokens: gl.tensor, CLASSES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    DEPTH: gl.constexpr, GROUPED: gl.constexpr, GATHER: gl.constexpr, GATED: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACT: gl.constexpr, P: gl.constexpr, Q: gl.constexpr,
) -> None:  # fmt: skip
    """Walk the tiles of some classes, ((place in the order, height), ..), every program its share of each."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    columns = (n + WIDTH - 1) // WIDTH
    passed = program * 0
    for i in gl.static_range(len(CLASSES)):
        begin = gl.load(class_band_ptr + CLASSES[i][0])
        bands = gl.load(class_band_ptr + CLASSES[i][0] + 1) - begin
        count = bands * columns
        held = DEPTH * columns
        # a class starts with the program that comes after the last of the class before
        for tile in range((program + programs - passed % programs) % programs, count, programs):
            deep = tile // held
            inside = tile - deep * held
            size = gl.minimum(bands - deep * DEPTH, DEPTH)
            band = begin + deep * DEPTH + inside % size
            slot = gl.load(slot_ptr + gl.load(band_expert_ptr + band))
            _tile(
                x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, row_of_ptr, slot,
                gl.load(band_row_ptr + band), gl.load(band_rows_ptr + band), inside // size, n, steps, top_k, tokens,
                CLASSES[i][1], WIDTH, STAGES, GROUPED, GATHER, GATED, HAS_BIAS, ACT, P, Q,
            )  # fmt: skip
        passed += count
