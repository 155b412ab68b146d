"""
The inner loops of the group GEMM, one for each way of holding weights; all compute Y^T = W X^T for one tile.

The weight is the first operand, so that decoded weights go to the matrix unit from registers, and tokens are the short
side of the product: 16 is a legal width on every machine. A tile is `n` output channels by `m` rows; with a gate it is
two such tiles over the same rows. Every loop returns float32 sums that still want the scales that are constant along k.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mxmoe.backends.triton.decode import PART, bf16_nibbles, cast, e4m3_parts, float_codes, int8_parts

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
def dense(
    x: tl.tensor, source: tl.tensor, weight: tl.tensor, second: tl.tensor, first: tl.tensor, k0: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """
    Weights as the matrix unit reads them (bf16, fp16, int8, e4m3), row-major [N, K].

    Args: x [*, K] codes, `source` row of x for each row of the tile, `weight` and `second` (with a gate, else unused)
    pointers to matrices, `first` output channel, DEPTH channels of k from `k0` on.
    """
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    n = first + tl.arange(0, BN)
    if N % BN:
        n = tl.minimum(n, N - 1)
    k = k0 + tl.arange(0, BK)
    at_w = weight + n[:, None].to(tl.int64) * K + k[None, :]
    at_v = second + n[:, None].to(tl.int64) * K + k[None, :]
    at_x = x + source[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), SUM)
    acc2 = tl.zeros((BN, BM), SUM)
    for step in tl.range(0, tl.cdiv(DEPTH, BK), num_stages=STAGES):
        if DEPTH % BK:
            inside = step * BK + tl.arange(0, BK) < DEPTH
            w = tl.load(at_w, mask=inside[None, :], other=0.0)
            rows = tl.load(at_x, mask=inside[:, None], other=0.0)
        else:
            w = tl.load(at_w)
            rows = tl.load(at_x)
        acc = _dot(w, rows, acc, PTX)
        if GATED:
            if DEPTH % BK:
                v = tl.load(at_v, mask=inside[None, :], other=0.0)
            else:
                v = tl.load(at_v)
            acc2 = _dot(v, rows, acc2, PTX)
            at_v += BK
        at_w += BK
        at_x += BK
    return acc.to(tl.float32), acc2.to(tl.float32)


@triton.jit
def _block(first: tl.tensor, N: tl.constexpr, UNITS: tl.constexpr, BN: tl.constexpr) -> Any:
    """Offsets of the rows of a tile in blocks of 64 rows x UNITS units; rows past the last block repeat it."""
    n = first + tl.arange(0, BN)
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    block = n // ROWS
    if (blocks * ROWS) % BN:
        block = tl.minimum(block, blocks - 1)
    return block * UNITS, n % ROWS


@triton.jit
def _zeros(BN: tl.constexpr, BM: tl.constexpr, FLOAT: tl.constexpr) -> Any:
    if FLOAT:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.int32)
    return acc


@triton.jit
def _nibble_dot(p: tl.tensor, x0: tl.tensor, x1: tl.tensor, acc: tl.tensor, FLOAT: tl.constexpr, PTX: tl.constexpr) -> Any:
    """Add both parts of a unit of 4-bit codes times their rows to the sums."""
    if FLOAT:
        low, high = e4m3_parts(p, PTX)
    else:
        low, high = int8_parts(p, PTX)
    acc = _dot(low, x0, acc, PTX)
    acc = _dot(high, x1, acc, PTX)
    return acc


@triton.jit
def _rows_of(at_x: tl.tensor, k: tl.tensor, K: tl.constexpr, UNIT: tl.constexpr) -> Any:
    """Load a part's rows, zeros beyond K where K is not whole units."""
    if K % UNIT:
        rows = tl.load(at_x, mask=(k < K)[:, None], other=0.0)
    else:
        rows = tl.load(at_x)
    return rows


@triton.jit
def nibbles(
    x: tl.tensor, x_scale: tl.tensor, source: tl.tensor, weight: tl.tensor, second: tl.tensor, scale: tl.tensor, scale2: tl.tensor, first: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, ROW_GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """
    Symmetric 4-bit weights against 8-bit rows: int8 (or 4-bit codes held in int8), or e4m3.

    GROUP 0 keeps one sum over all of k; GROUP 128 scales the sum of every unit, int32 to float32, by `scale`
    [n block, unit, 64] (bf16), loaded one unit ahead. ROW_GROUP: the rows have a scale per unit too, `x_scale`
    [*, units] (else a scale per row, applied by the caller). Sums are in steps of INT8_STEP or E4M3_STEP.
    """
    UNITS: tl.constexpr = (K + 127) // 128
    FLOAT: tl.constexpr = x.dtype.element_ty != tl.int8
    block, row = _block(first, N, UNITS, BN)
    byte = block.to(tl.int64)[:, None] * (ROWS * PART) + row[:, None] * PART + tl.arange(0, PART)[None, :]
    at_w = weight + byte
    at_v = second + byte
    k = tl.arange(0, PART)
    at_x = x + source[None, :] * K + k[:, None]
    at_s = scale + block * ROWS + row
    at_t = scale2 + block * ROWS + row
    at_r = x_scale + source * UNITS
    if GROUP == 0:
        sums = _zeros(BN, BM, FLOAT)
        sums2 = _zeros(BN, BM, FLOAT)
        for step in tl.range(0, UNITS, num_stages=STAGES):
            x0 = _rows_of(at_x, k + step * 128, K, 128)
            x1 = _rows_of(at_x + PART, k + step * 128 + PART, K, 128)
            sums = _nibble_dot(tl.load(at_w), x0, x1, sums, FLOAT, PTX)
            if GATED:
                sums2 = _nibble_dot(tl.load(at_v), x0, x1, sums2, FLOAT, PTX)
                at_v += ROWS * PART
            at_w += ROWS * PART
            at_x += 2 * PART
        acc = sums.to(tl.float32)
        acc2 = sums2.to(tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.float32)
        acc2 = tl.zeros((BN, BM), tl.float32)
        s = tl.load(at_s)
        t = tl.load(at_t)
        for step in tl.range(0, UNITS, num_stages=STAGES):
            x0 = _rows_of(at_x, k + step * 128, K, 128)
            x1 = _rows_of(at_x + PART, k + step * 128 + PART, K, 128)
            # the scales of the unit behind the last are there, and not used
            s_next = tl.load(at_s + ROWS)
            part = _nibble_dot(tl.load(at_w), x0, x1, _zeros(BN, BM, FLOAT), FLOAT, PTX).to(tl.float32)
            if ROW_GROUP:
                part = part * tl.load(at_r)[None, :]
            acc += part * s.to(tl.float32)[:, None]
            if GATED:
                t_next = tl.load(at_t + ROWS)
                part = _nibble_dot(tl.load(at_v), x0, x1, _zeros(BN, BM, FLOAT), FLOAT, PTX).to(tl.float32)
                if ROW_GROUP:
                    part = part * tl.load(at_r)[None, :]
                acc2 += part * t.to(tl.float32)[:, None]
                t = t_next
                at_t += ROWS
                at_v += ROWS * PART
            s = s_next
            at_s += ROWS
            at_r += 1
            at_w += ROWS * PART
            at_x += 2 * PART
    return acc, acc2


@triton.jit
def _decoded(
    value: tl.tensor, at_s: tl.tensor, at_z: tl.tensor, group0: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr, ASYM: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Codes [n, 64] as numbers -> weights in DTYPE, but for a scale that is constant along k; `group0`: first group."""
    OWN: tl.constexpr = value.dtype
    if GROUP == 32:
        two = tl.arange(0, 2)
        at = (group0 + two)[None, :] * ROWS
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
        rows = _rows_of(at_x + i * PART, k0 + i * PART + tl.arange(0, PART), K, 512 if BITS == 3 else 512 // BITS)
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
    elif BITS == 4 and DTYPE == tl.bfloat16:
        low, high = bf16_nibbles(tl.load(at_w), PTX)
        x0 = _rows_of(at_x, k0 + tl.arange(0, PART), K, 128)
        x1 = _rows_of(at_x + PART, k0 + PART + tl.arange(0, PART), K, 128)
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
    x: tl.tensor, source: tl.tensor, weight: tl.tensor, second: tl.tensor, scale: tl.tensor, scale2: tl.tensor, zero: tl.tensor, zero2: tl.tensor, first: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASYM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """
    Weights of 2, 3, 4 or 8 bits against bf16 or fp16 rows: decoded to the rows' type, tile by tile.

    GROUP 0, 32, 64 or 128 channels share a scale (and with ASYM a zero point), [n block, group, 64]; group scales are
    multiplied into the weight, per-channel ones are left to the caller.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    CHANNELS: tl.constexpr = 512 if BITS == 3 else 512 // BITS
    BYTES: tl.constexpr = (3 if BITS == 3 else 1) * ROWS * PART
    UNITS: tl.constexpr = (K + CHANNELS - 1) // CHANNELS
    GROUPS: tl.constexpr = 1 if GROUP == 0 else UNITS * CHANNELS // GROUP
    block, row = _block(first, N, 1, BN)
    byte = block.to(tl.int64)[:, None] * (UNITS * BYTES) + row[:, None] * PART + tl.arange(0, PART)[None, :]
    at_w = weight + byte
    at_v = second + byte
    at_s = scale + block * (GROUPS * ROWS) + row
    at_t = scale2 + block * (GROUPS * ROWS) + row
    at_z = zero + block * (GROUPS * ROWS) + row
    at_y = zero2 + block * (GROUPS * ROWS) + row
    at_x = x + source[None, :] * K + tl.arange(0, PART)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    acc2 = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, UNITS, num_stages=STAGES):
        k0 = step * CHANNELS
        acc = _wide_unit(acc, at_w, at_x, at_s, at_z, k0, K, BITS, GROUP, ASYM, BN, DTYPE, PTX)
        if GATED:
            acc2 = _wide_unit(acc2, at_v, at_x, at_t, at_y, k0, K, BITS, GROUP, ASYM, BN, DTYPE, PTX)
            at_v += BYTES
        at_w += BYTES
        at_x += CHANNELS
    return acc, acc2
