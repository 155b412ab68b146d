"""
The inner loops of the group GEMM, one for each way of holding weights; all compute Y^T = W X^T for one tile.

The weight is the first operand, so that decoded weights go to the matrix unit from registers, and tokens are the short
side of the product: 16 is a legal width on every machine. A tile is BN rows of weights by BM rows of tokens; with a
gate the first half of the weights' rows are gate's and the second half up's. Every loop returns float32 sums [BN, BM]
that still want the scales that are constant along k.
"""

# what is compiled is not what Triton's stubs describe: constants are their values, types are known
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mxmoe.backends.triton.decode import PART, bf16_nibbles, cast, e4m3_parts, float_codes, int8_parts, multiplied_parts

ROWS = tl.constexpr(64)
"""Output channels of a block of packed weights; a block and unit of k lie together, 64 x 64 bytes."""


@triton.jit
def _dot(w: tl.tensor, rows: tl.tensor, acc: tl.tensor, PTX: tl.constexpr) -> Any:
    """Add w @ rows to the sums; the interpreter multiplies 16-bit floats only as float32."""
    if PTX or acc.dtype == tl.int32:
        acc = tl.dot(w, rows, acc, out_dtype=acc.dtype)
    else:
        acc = tl.dot(w.to(tl.float32), rows.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def channels(first: tl.tensor, BN: tl.constexpr, GATED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Output channel of each row of a tile's weights, and which of two matrices it belongs to."""
    r = tl.arange(0, BN)
    if GATED:
        n, side = first + r % (BN // 2), r // (BN // 2)
    else:
        n, side = first + r, r // BN
    return n, side


@triton.jit
def dense(
    x: tl.tensor, source: tl.tensor, weight: tl.tensor, beside: tl.tensor, first: tl.tensor, k0: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """
    Weights as the matrix unit reads them (bf16, fp16, int8, e4m3), row-major [N, K].

    Args: x [*, K] codes, `source` row of x for each row of the tile, `weight` pointer to a matrix, `beside` elements to
    the second one (with a gate), `first` output channel, DEPTH channels of k from `k0` on.
    """
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    n, side = channels(first, BN, GATED)
    if N % (BN // 2 if GATED else BN):
        n = tl.minimum(n, N - 1)
    k = tl.arange(0, BK) + k0
    at_w = weight + (n.to(tl.int64) * K)[:, None] + k[None, :]
    if GATED:
        at_w += (side * beside)[:, None]
    at_x = x + source[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), SUM)
    for step in tl.range(0, tl.cdiv(DEPTH, BK), num_stages=STAGES):
        if DEPTH % BK:
            inside = tl.arange(0, BK) + step * BK < DEPTH
            w = tl.load(at_w, mask=inside[None, :], other=0.0)
            rows = tl.load(at_x, mask=inside[:, None], other=0.0)
        else:
            w = tl.load(at_w)
            rows = tl.load(at_x)
        acc = _dot(w, rows, acc, PTX)
        at_w += BK
        at_x += BK
    return acc.to(tl.float32)


@triton.jit
def _block(
    first: tl.tensor, N: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Block of 64 rows, row in it and matrix for each row of a tile; rows past the last block repeat it."""
    n, side = channels(first, BN, GATED)
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    block = n // ROWS
    if (blocks * ROWS) % (BN // 2 if GATED else BN):
        block = tl.minimum(block, blocks - 1)
    return block, n % ROWS, side


@triton.jit
def _zeros(BN: tl.constexpr, BM: tl.constexpr, FLOAT: tl.constexpr) -> tl.tensor:
    if FLOAT:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.int32)
    return acc


@triton.jit
def _nibble_dot(
    p: tl.tensor, x0: tl.tensor, x1: tl.tensor, acc: tl.tensor, FLOAT: tl.constexpr, PTX: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Add both parts of a unit of 4-bit codes times their rows to the sums."""
    if FLOAT:
        low, high = e4m3_parts(p, PTX)
    else:
        low, high = int8_parts(p, PTX)
    acc = _dot(low, x0, acc, PTX)
    acc = _dot(high, x1, acc, PTX)
    return acc


@triton.jit
def _rows_of(at_x: tl.tensor, k: tl.tensor, K: tl.constexpr, UNIT: tl.constexpr) -> tl.tensor:
    """Load a part's rows, zeros beyond K where K is not whole units."""
    if K % UNIT:
        rows = tl.load(at_x, mask=(k < K)[:, None], other=0.0)
    else:
        rows = tl.load(at_x)
    return rows


@triton.jit
def _units_of(
    weight: tl.tensor, beside: tl.tensor, meta: tl.tensor, meta_beside: tl.tensor, first: tl.tensor, unit0: tl.tensor,
    N: tl.constexpr, UNITS: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Addresses of a tile's first unit of 4-bit codes [BN, 64], and of a number for each of its rows [BN]."""
    block, row, side = _block(first, N, BN, GATED)
    at_w = weight + ((block * UNITS + unit0).to(tl.int64) * (ROWS * PART) + row * PART)[:, None]
    at_w += tl.arange(0, PART)[None, :]
    at_meta = meta + (block * UNITS + unit0) * ROWS + row
    if GATED:
        at_w += (side * beside)[:, None]
        at_meta += side * meta_beside
    return at_w, at_meta


@triton.jit
def nibbles(
    x: tl.tensor, x_scale: tl.tensor, source: tl.tensor, weight: tl.tensor, beside: tl.tensor, scale: tl.tensor,
    scale_beside: tl.tensor, first: tl.tensor, unit0: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """
    Symmetric 4-bit weights against 8-bit rows: int8 (or 4-bit codes held in int8), or e4m3.

    GROUP 0 keeps one sum over all of k; GROUP 128 scales the sum of every unit, int32 to float32, by `scale`
    [n block, unit, 64] (bf16), loaded one unit ahead. ROW_GROUP: the rows have a scale per unit too, `x_scale`
    [*, units] (else a scale per row, applied by the caller). Sums are in steps of INT8_STEP or E4M3_STEP. k is split
    into PARTS; this one begins at `unit0`.
    """
    UNITS: tl.constexpr = (K + 127) // 128
    MINE: tl.constexpr = (UNITS + PARTS - 1) // PARTS
    FLOAT: tl.constexpr = x.dtype.element_ty != tl.int8
    at_w, at_s = _units_of(weight, beside, scale, scale_beside, first, unit0, N, UNITS, BN, GATED)
    k = tl.arange(0, PART) + unit0 * 128
    at_x = x + source[None, :] * K + k[:, None]
    at_r = x_scale + source * UNITS + unit0
    steps = MINE
    if UNITS % PARTS:
        steps = tl.minimum(MINE, UNITS - unit0)
    if GROUP == 0:
        sums = _zeros(BN, BM, FLOAT)
        for step in tl.range(0, steps, num_stages=STAGES):
            x0 = _rows_of(at_x, k + step * 128, K, 128)
            x1 = _rows_of(at_x + PART, k + step * 128 + PART, K, 128)
            sums = _nibble_dot(tl.load(at_w), x0, x1, sums, FLOAT, PTX)
            at_w += ROWS * PART
            at_x += 2 * PART
        acc = sums.to(tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.float32)
        s = tl.load(at_s)
        for step in tl.range(0, steps, num_stages=STAGES):
            x0 = _rows_of(at_x, k + step * 128, K, 128)
            x1 = _rows_of(at_x + PART, k + step * 128 + PART, K, 128)
            # the scales of the unit behind the last are there, and not used
            s_next = tl.load(at_s + ROWS)
            part = _nibble_dot(tl.load(at_w), x0, x1, _zeros(BN, BM, FLOAT), FLOAT, PTX).to(tl.float32)
            if ROW_GROUP:
                part = part * tl.load(at_r)[None, :]
            acc += part * s.to(tl.float32)[:, None]
            s = s_next
            at_s += ROWS
            at_r += 1
            at_w += ROWS * PART
            at_x += 2 * PART
    return acc


@triton.jit
def scaled(
    x: tl.tensor, source: tl.tensor, weight: tl.tensor, beside: tl.tensor, multiplier: tl.tensor,
    multiplier_beside: tl.tensor, first: tl.tensor, unit0: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """
    4-bit weights with integer scales against int8 rows: one sum over all of k.

    `multiplier` uint8 [n block, unit, 64], loaded one unit ahead; PARTS and `unit0` as in `nibbles`.
    """
    UNITS: tl.constexpr = (K + 127) // 128
    MINE: tl.constexpr = (UNITS + PARTS - 1) // PARTS
    at_w, at_m = _units_of(weight, beside, multiplier, multiplier_beside, first, unit0, N, UNITS, BN, GATED)
    k = tl.arange(0, PART) + unit0 * 128
    at_x = x + source[None, :] * K + k[:, None]
    steps = MINE
    if UNITS % PARTS:
        steps = tl.minimum(MINE, UNITS - unit0)
    sums = tl.zeros((BN, BM), tl.int32)
    m = tl.load(at_m)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0 = _rows_of(at_x, k + step * 128, K, 128)
        x1 = _rows_of(at_x + PART, k + step * 128 + PART, K, 128)
        # the multipliers of the unit behind the last are there, and not used
        m_next = tl.load(at_m + ROWS)
        low, high = multiplied_parts(tl.load(at_w), m.to(tl.int32)[:, None], PTX)
        sums = _dot(low, x0, sums, PTX)
        sums = _dot(high, x1, sums, PTX)
        m = m_next
        at_m += ROWS
        at_w += ROWS * PART
        at_x += 2 * PART
    return sums.to(tl.float32)


@triton.jit
def _decoded(
    value: tl.tensor, at_s: tl.tensor, at_z: tl.tensor, group0: tl.tensor,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYM: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Codes [n, 64] as numbers -> weights in DTYPE, but for a scale that is constant along k; `group0`: first group."""
    OWN: tl.constexpr = value.dtype
    if GROUP == 32:
        two = tl.arange(0, 2)
        at = (two + group0)[None, :] * ROWS
        if ASYM:
            zero = tl.load(at_z[:, None] + at).to(OWN)
            value = value - tl.reshape(tl.broadcast_to(zero[:, :, None], (BN, 2, 32)), (BN, PART))
        else:
            value = value - 2.0 ** (BITS - 1)
        s = tl.load(at_s[:, None] + at).to(OWN)
        value = value * tl.reshape(tl.broadcast_to(s[:, :, None], (BN, 2, 32)), (BN, PART))
    else:
        if ASYM:
            value = value - tl.load(at_z + (group0 * ROWS if GROUP else 0)).to(OWN)[:, None]
        else:
            value = value - 2.0 ** (BITS - 1)
        if GROUP:
            value = value * tl.load(at_s + group0 * ROWS).to(OWN)[:, None]
    return cast(value, DTYPE, PTX)


@triton.jit
def _wide_parts(
    acc: tl.tensor, p: tl.tensor, high: tl.tensor, at_x: tl.tensor, at_s: tl.tensor, at_z: tl.tensor, k0: tl.tensor,
    K: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr,
    ASYM: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Add all parts of one unit: LOW bits of each code are in `p`, a third one in `high` from bit SHIFT on."""
    for i in tl.static_range(8 // LOW):
        rows = _rows_of(at_x + i * PART, tl.arange(0, PART) + (k0 + i * PART), K, 512 if BITS == 3 else 512 // BITS)
        codes = (p >> (LOW * i)) & ((1 << LOW) - 1)
        if BITS > LOW:
            codes = codes | (((high >> (SHIFT + i)) & 1) << LOW)
        value = float_codes(codes, BITS, DTYPE, PTX)
        w = _decoded(value, at_s, at_z, (k0 + i * PART) // max(GROUP, 1), BITS, GROUP, ASYM, BN, DTYPE, PTX)
        acc = _dot(w, rows, acc, PTX)
    return acc


@triton.jit
def _wide_unit(
    acc: tl.tensor, at_w: tl.tensor, at_x: tl.tensor, at_s: tl.tensor, at_z: tl.tensor, k0: tl.tensor,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASYM: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Add one unit (for 3 bits: one of high bits and two of low bits)."""
    if BITS == 3:
        high = tl.load(at_w)
        for half in tl.static_range(2):
            p = tl.load(at_w + (1 + half) * ROWS * PART)
            acc = _wide_parts(
                acc, p, high, at_x + half * 4 * PART, at_s, at_z, k0 + half * 4 * PART,
                K, 3, 2, 4 * half, GROUP, ASYM, BN, DTYPE, PTX,
            )  # fmt: skip
    elif BITS == 4 and DTYPE == tl.bfloat16 and acc.shape[1] < 64:  # NaN beyond, compiled for sm_90 by Triton 3.6
        low, high = bf16_nibbles(tl.load(at_w), PTX)
        x0 = _rows_of(at_x, tl.arange(0, PART) + k0, K, 128)
        x1 = _rows_of(at_x + PART, tl.arange(0, PART) + (k0 + PART), K, 128)
        w0 = _decoded(low, at_s, at_z, k0 // max(GROUP, 1), BITS, GROUP, ASYM, BN, DTYPE, PTX)
        w1 = _decoded(high, at_s, at_z, (k0 + PART) // max(GROUP, 1), BITS, GROUP, ASYM, BN, DTYPE, PTX)
        acc = _dot(w0, x0, acc, PTX)
        acc = _dot(w1, x1, acc, PTX)
    else:
        p = tl.load(at_w)
        acc = _wide_parts(acc, p, p, at_x, at_s, at_z, k0, K, BITS, BITS, 0, GROUP, ASYM, BN, DTYPE, PTX)
    return acc


@triton.jit
def wide(
    x: tl.tensor, source: tl.tensor, weight: tl.tensor, beside: tl.tensor, scale: tl.tensor, scale_beside: tl.tensor,
    zero: tl.tensor, zero_beside: tl.tensor, first: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASYM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """
    Weights of 2, 3, 4 or 8 bits against bf16 or fp16 rows: decoded to the rows' type, tile by tile.

    GROUP 0, 32, 64 or 128 channels share a scale (and with ASYM a zero point), [n block, group, 64]; group scales are
    multiplied into the weight, per-channel ones are left to the caller.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    CHANNELS: tl.constexpr = 512 if BITS == 3 else 512 // BITS
    BYTES: tl.constexpr = (3 if BITS == 3 else 1) * ROWS * PART
    UNITS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (UNITS * CHANNELS + GROUP - 1) // GROUP
    block, row, side = _block(first, N, BN, GATED)
    at_w = weight + (block.to(tl.int64) * (UNITS * BYTES) + row * PART)[:, None] + tl.arange(0, PART)[None, :]
    at_s = scale + block * (GROUPS * ROWS) + row
    at_z = zero + block * (GROUPS * ROWS) + row
    if GATED:
        at_w += (side * beside)[:, None]
        at_s += side * scale_beside
        at_z += side * zero_beside
    at_x = x + source[None, :] * K + tl.arange(0, PART)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, UNITS, num_stages=STAGES):
        acc = _wide_unit(acc, at_w, at_x, at_s, at_z, step * CHANNELS, K, BITS, GROUP, ASYM, BN, DTYPE, PTX)
        at_w += BYTES
        at_x += CHANNELS
    return acc
