"""Rows as the bodies read them: cast, or quantized per token or per group; rotated before where a plan asks."""

# what is compiled is not what Triton's stubs describe: constants are their values, types are known
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mxmoe.backends.triton.decode import cast
from mxmoe.backends.triton.kernels_chain import wait_and_lead
from mxmoe.backends.triton.kernels_schedule import place_few, schedule_part

CAST, INTEGER, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# for sm_89 Triton's own cast goes by way of fp16, cut off, and so rounds twice
_TO_E4M3 = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")


@triton.jit
def _round(x: tl.tensor) -> Any:
    """Round to the nearest integer, halves to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_e4m3(x: tl.tensor) -> Any:
    """Round float32 within +-448 to an e4m3, halves to even; for the interpreter, whose own cast cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    small = _round(x * 512.0) * 0.001953125
    return tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit
def _coded(ratio: tl.tensor, WAY: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr) -> Any:
    """What `_quantize` gives, as codes: whole numbers already, or the nearest e4m3."""
    if PTX and WAY == E4M3:
        code = tl.inline_asm_elementwise(_TO_E4M3, "=r,r,r,r,r", [ratio], dtype=tl.float8e4nv, is_pure=True, pack=4)
    else:
        code = ratio.to(DTYPE)
    return code


@triton.jit
def _divide(x: tl.tensor, by: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """
    x / by, correctly rounded, from the correctly rounded inverse: one step of Markstein's, three operations.

    P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990, theorem 8.1; for
    quotients below 2^9, as here, nothing overflows, and what underflows rounds to code 0.
    """
    near = x * inverse
    return tl.fma(tl.fma(-near, by, x), inverse, near)


@triton.jit
def _quantize(x: tl.tensor, WAY: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr) -> Any:
    """Rows of a 2-d tile -> (codes before their cast, scale per row), as `mxmoe.quant.quantize_activation` does."""
    largest = tl.max(tl.abs(x), 1)
    broken = tl.sum(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 1) > 0
    scale = tl.where(largest > 0.0, tl.maximum(tl.div_rn(largest, STEPS), 2.0**-126), 1.0)
    if PTX:
        ratio = _divide(x, scale[:, None], tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None])
    else:
        ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    ratio = tl.where((ratio == ratio) & ~broken[:, None], ratio, 0.0)
    if WAY == INTEGER:
        ratio = _round(tl.minimum(tl.maximum(ratio, -STEPS), STEPS))
    elif not PTX:
        ratio = _round_e4m3(tl.minimum(tl.maximum(ratio, -STEPS), STEPS))
    return ratio, tl.where(broken, float("nan"), scale)


@triton.jit
def prepare_row(
    row: tl.tensor, x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor, hadamard_ptr: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, TURN: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """
    Write one row in every kind of KINDS. TURN > 0 multiplies blocks of TURN channels by a Hadamard matrix first.

    `hadamard_ptr` [TURN, TURN] holds +-1 in the type of x, so that products are exact; the root is taken here.
    """
    at = row.to(tl.int64) * K
    if TURN:
        k = tl.arange(0, BLOCK // TURN)[:, None] * TURN + tl.arange(0, TURN)[None, :]
        x = tl.load(x_ptr + at + k, mask=k < K, other=0.0)
        h = tl.load(hadamard_ptr + tl.arange(0, TURN)[:, None] * TURN + tl.arange(0, TURN)[None, :])
        if x.dtype == tl.float32 or not PTX:  # the interpreter multiplies 16-bit floats only as float32
            x = tl.dot(x.to(tl.float32), h.to(tl.float32), input_precision="ieee")
        else:
            x = tl.dot(x, h.to(x.dtype))
        x = x * TURN**-0.5
        x = tl.reshape(x, (1, BLOCK))
    else:
        k = tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + at + k, mask=k < K, other=0.0).to(tl.float32)
    at = row.to(tl.int64) + tl.arange(0, 1)
    for i in tl.static_range(len(KINDS)):
        _write_kind(x, codes[i], scales[i], at, tl.full([1], 1, tl.int1), K, BLOCK, KINDS, i, 1, PTX)


@triton.jit
def prepare_at(
    row: tl.tensor, places: tl.tensor, x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, PLACES: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Write one row in every kind of KINDS, each once for every of the PLACES that is not negative."""
    k = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    at = places.to(tl.int64)
    for i in tl.static_range(len(KINDS)):
        _write_kind(x, codes[i], scales[i], at, places >= 0, K, BLOCK, KINDS, i, PLACES, PTX)


@triton.jit
def _write_kind(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, rows: tl.tensor, held: tl.tensor, K: tl.constexpr,
    BLOCK: tl.constexpr, KINDS: tl.constexpr, WHICH: tl.constexpr, PLACES: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Write float32 `x` [1, BLOCK] in one kind, as each of the `rows` [PLACES] that are `held`."""
    GROUP: tl.constexpr = KINDS[WHICH][2]
    code, scale = _as_kind(x, codes.dtype.element_ty, BLOCK, KINDS, WHICH, PTX)
    k = tl.arange(0, BLOCK)[None, :]
    tl.store(codes + (rows[:, None] * K + k), tl.broadcast_to(code, (PLACES, BLOCK)), mask=held[:, None] & (k < K))
    if KINDS[WHICH][0] != CAST:
        groups: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
        WIDTH: tl.constexpr = BLOCK // GROUP if GROUP else 1
        g = tl.arange(0, WIDTH)[None, :]
        to = scales + (rows[:, None] * groups + g)
        tl.store(to, tl.broadcast_to(scale[None, :], (PLACES, WIDTH)), mask=held[:, None] & (g < groups))


@triton.jit
def _as_kind(
    x: tl.tensor, DTYPE: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, WHICH: tl.constexpr,
    PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Float32 `x` [1, BLOCK] in one kind: codes [1, BLOCK], scale of each group or of the row; of a cast, 0."""
    WAY: tl.constexpr = KINDS[WHICH][0]
    STEPS: tl.constexpr = KINDS[WHICH][1]
    GROUP: tl.constexpr = KINDS[WHICH][2]
    if WAY == CAST:
        # finite values saturate, as the definition has it
        LARGEST: tl.constexpr = 65504.0 if DTYPE == tl.float16 else 3.3895313892515355e38
        near = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        code = cast(tl.where(tl.abs(x) < float("inf"), near, x), DTYPE, PTX)
        scale = tl.zeros([1], tl.float32)
    elif GROUP:
        ratio, scale = _quantize(tl.reshape(x, (BLOCK // GROUP, GROUP)), WAY, STEPS, PTX)
        code = _coded(tl.reshape(ratio, (1, BLOCK)), WAY, DTYPE, PTX)
    else:
        ratio, scale = _quantize(x, WAY, STEPS, PTX)
        code = _coded(ratio, WAY, DTYPE, PTX)
    return code, scale


@triton.jit
def prepare_rows(
    x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor, hadamard_ptr: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, TURN: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """One program a row; see `prepare_row`."""
    wait_and_lead(PTX)
    prepare_row(tl.program_id(0), x_ptr, codes, scales, hadamard_ptr, K, BLOCK, KINDS, TURN, PTX)


@triton.jit
def _flat_rows(
    token: tl.tensor, rows: tl.tensor, tokens: tl.tensor, TOP_K: tl.constexpr, ALWAYS: tl.constexpr,
    PLACES: tl.constexpr,
) -> Any:  # fmt: skip
    """Flat rows of a token's choices and of its always-on experts [PLACES], and which of them there are."""
    j = tl.arange(0, PLACES)
    return tl.where(j < TOP_K, token * TOP_K + j, rows + (j - TOP_K) * tokens + token), j < TOP_K + ALWAYS


@triton.jit
def prepare_sorted(
    x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor, place_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor,
    TOP_K: tl.constexpr, ALWAYS: tl.constexpr, PLACES: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """One program a token, which is written where each of its `rows` lies sorted by expert."""
    wait_and_lead(PTX)
    token = tl.program_id(0)
    flat, inside = _flat_rows(token, rows, tokens, TOP_K, ALWAYS, PLACES)
    places = tl.load(place_ptr + flat, mask=inside, other=-1)
    prepare_at(token, places, x_ptr, codes, scales, K, BLOCK, KINDS, PLACES, PTX)


@triton.jit
def begin(
    index_ptr: tl.tensor, words_ptr: tl.tensor, constants_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor,
    row_stride: tl.tensor, bands0: tl.tensor, bands1: tl.tensor,
    E: tl.constexpr, ALWAYS: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, HEAD: tl.constexpr, SETS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
    first: tl.tensor, x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, PTX: tl.constexpr,
    SORTED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """
    Schedule few rows and prepare the tokens in one launch: the first programs do the one, the others the other.

    SORTED writes a token as `prepare_sorted` does; which places those are its program counts by itself.
    """
    wait_and_lead(PTX)
    program = tl.program_id(0)
    if program < first:
        schedule_part(
            program, index_ptr, words_ptr, constants_ptr, rows, tokens, row_stride, bands0, bands1,
            E, ALWAYS, EP, CP, HEAD, SETS, ROWS, CHUNK, COUNT,
        )  # fmt: skip
    elif SORTED:
        flat, inside = _flat_rows(program - first, rows, tokens, TOP_K, ALWAYS, PLACES)
        own, place = place_few(index_ptr, tl.where(inside, flat, 0), rows, tokens, E, ALWAYS, CHUNK)
        places = tl.where(inside & (own < E + ALWAYS), place, -1)
        prepare_at(program - first, places, x_ptr, codes, scales, K, BLOCK, KINDS, PLACES, PTX)
    else:
        prepare_row(program - first, x_ptr, codes, scales, x_ptr, K, BLOCK, KINDS, 0, PTX)
