"""
The compiled loops: one launch multiplies the rows of all experts of a bank, whatever mix of schemes they are in.

Two ways through a tile. *Float* (16-bit and e4m3 activations): a panel of 64 columns is decoded chunk by chunk into a
scratch that fits the first-level cache, and multiplied from there; columns are the vector lanes, so decoding and
multiplying need no shuffles. *Integer*: rows of codes are widened to int16, and products of 16-bit integers are summed
in int32 along the channels, which the compiler turns into the machine's multiply-add pairs; sums are exact.

All kernels are in this file because numba's cache watches the file of the launched function only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

PANEL = 64
"""Columns that lie side by side in memory, and the width of every float scratch."""
ROW_BLOCK = 16
"""Rows of an integer weight that are decoded together."""

FLOAT_CODES, FLOAT_E4M3, FLOAT_BF16, FLOAT_FP16, INTEGER = range(5)

# columns of a descriptor: one row per matrix
FAMILY, BITS, K, N, GROUP, GROUPS, PAYLOAD, META = range(8)
IS_WIDE, IS_ASYM, HAS_MULTIPLIERS, ACT_GROUPED, CHUNK, BIAS, N_FIELDS = range(8, 15)

# what numba infers by itself; written down for readers and the type checker
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Codes = npt.NDArray[np.int8]
Shorts = npt.NDArray[np.int16]
Longs = npt.NDArray[np.int64]
Indices = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Index = np.uint64

U = np.uint64
_PANEL = U(PANEL)
_0, _1, _2, _3, _4, _5, _6, _7, _8 = (U(i) for i in range(9))


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # noqa: ANN401  # numba's own options
    """
    Compile a function with numba and keep the machine code on disk.

    numba keeps it beside the source, or below the user's cache folder where that is read-only, or where NUMBA_CACHE_DIR
    says; where nothing can be written it is compiled anew in each process.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, nogil=True, boundscheck=False, **options)(function)
        except RuntimeError:  # numba: no locator for a folder that can be written
            return njit(nogil=True, boundscheck=False, **options)(function)

    return decorate


# Indices are unsigned throughout: numba wraps negative indices, and that test would keep loops from being vectorised.


@kernel()
def load_scales(source: Words, wide: np.int64, offset: Index, count: Index, out: Floats) -> None:
    """Read `count` scales or zero points: float32 bits as they are, bf16 bits moved to the upper half."""
    bits = out.view(np.int32)
    if wide:
        both = source.view(np.int32)
        start = offset >> _1
        for n in range(count):
            bits[n] = both[start + n]
    else:
        for n in range(count):
            bits[n] = np.int32(np.int32(source[offset + n]) << np.int32(16))


@kernel(fastmath={"contract"})
def decode_codes(
    payload: Bytes,
    base: Index,
    bits: Index,
    width: Index,
    first: Index,
    count: Index,
    times: np.float32,
    scale: Floats,
    zero: Floats,
    out: Floats,
    row: Index,
) -> None:
    """
    Decode `count` channels of a panel from codes of 1 to 8 bits: out = (times * code - zero) * scale.

    Code k of a column starts at bit k * bits; a panel holds byte j of all its columns side by side. A code is masked
    out where it stands and brought down by a power of two in the multiplication, which saves shifting the lanes.
    """
    ones = (_1 << bits) - _1
    for k in range(count):
        start = (first + k) * bits
        low = base + (start >> _3) * width
        shift = start & _7
        mask = ones << shift
        unit = times / np.float32(_1 << shift)
        o = (row + k) * _PANEL
        if shift + bits <= _8:
            for n in range(width):
                code = np.int32(payload[low + n] & mask)
                out[o + n] = (unit * np.float32(code) - zero[n]) * scale[n]
        else:
            high = low + width
            for n in range(width):
                code = np.int32((np.uint64(payload[low + n]) | (np.uint64(payload[high + n]) << _8)) & mask)
                out[o + n] = (unit * np.float32(code) - zero[n]) * scale[n]


@kernel()
def decode_bf16(halves: Words, base: Index, width: Index, first: Index, count: Index, out: Floats, row: Index) -> None:
    """Decode `count` channels of a panel of bf16 weights: they are the upper half of a float32."""
    bits = out.view(np.int32)
    for k in range(count):
        start = base + (first + k) * width
        o = (row + k) * _PANEL
        for n in range(width):
            bits[o + n] = np.int32(np.int32(halves[start + n]) << np.int32(16))


@kernel()
def widen_half(half: np.int32) -> np.int32:
    """
    Float32 bits for the bits of a finite fp16, to which `half_excess` must still be added.

    A normal number needs its exponent moved by 127 - 15. A denormal m * 2^-24 is 2^-14 * (1 + m / 1024) - 2^-14: so
    float32 denormals, which a process may have switched off, do not occur.
    """
    offset = np.int32(112 << 23) if half & np.int32(0x7C00) else np.int32(113 << 23)
    sign = np.int32((half & np.int32(0x8000)) << np.int32(16))
    return np.int32((np.int32((half & np.int32(0x7FFF)) << np.int32(13)) + offset) | sign)


@kernel()
def half_excess(half: np.int32) -> np.float32:
    """Float32 to add to the number of `widen_half`: -2^-14 or 2^-14 for denormals, by sign, and 0 for others."""
    denormal = np.float32(2.0**-14) if half & np.int32(0x8000) else np.float32(-(2.0**-14))
    return np.float32(0.0) if half & np.int32(0x7C00) else denormal


@kernel()
def decode_fp16(halves: Words, base: Index, width: Index, first: Index, count: Index, out: Floats, row: Index) -> None:
    """Decode `count` channels of a panel of finite fp16 weights, denormals included."""
    bits = out.view(np.int32)
    for k in range(count):
        start = base + (first + k) * width
        o = (row + k) * _PANEL
        for n in range(width):
            bits[o + n] = widen_half(np.int32(halves[start + n]))
        for n in range(width):
            out[o + n] = out[o + n] + half_excess(np.int32(halves[start + n]))


@kernel()
def e4m3_to_half(code: np.uint8) -> np.int32:
    """Bits of the fp16 that is 2^-8 times the number of an e4m3 code; NaN, which never is in a weight, gives 480."""
    return np.int32((np.int32(code & np.uint8(0x7F)) << np.int32(7)) | (np.int32(code & np.uint8(0x80)) << np.int32(8)))


@kernel()
def decode_e4m3(
    payload: Bytes, base: Index, width: Index, first: Index, count: Index, scale: Floats, out: Floats, row: Index
) -> None:
    """Decode `count` channels of a panel of e4m3 weights by way of fp16, whose exponent is biased by 8 more."""
    bits = out.view(np.int32)
    for k in range(count):
        start = base + (first + k) * width
        o = (row + k) * _PANEL
        for n in range(width):
            bits[o + n] = widen_half(e4m3_to_half(payload[start + n]))
        for n in range(width):
            value = out[o + n] + half_excess(e4m3_to_half(payload[start + n]))
            out[o + n] = (np.float32(256.0) * value) * scale[n]


@kernel(fastmath={"contract"})
def multiply_add(
    x: Floats, source: Indices, row0: Index, row1: Index, first: Index, count: Index, w: Floats, acc: Floats
) -> None:
    """acc[row - row0] += x[source[row], first : first + count] @ w for a decoded chunk [count, PANEL], 8 | count."""
    r = row0
    while r + _4 <= row1:
        a = (r - row0) * _PANEL
        i0, i1, i2, i3 = source[r], source[r + _1], source[r + _2], source[r + _3]
        for k in range(_0, count, _4):
            f = first + k
            o = k * _PANEL
            x00, x01, x02, x03 = x[i0, f], x[i0, f + _1], x[i0, f + _2], x[i0, f + _3]
            x10, x11, x12, x13 = x[i1, f], x[i1, f + _1], x[i1, f + _2], x[i1, f + _3]
            x20, x21, x22, x23 = x[i2, f], x[i2, f + _1], x[i2, f + _2], x[i2, f + _3]
            x30, x31, x32, x33 = x[i3, f], x[i3, f + _1], x[i3, f + _2], x[i3, f + _3]
            for n in range(_PANEL):
                w0, w1 = w[o + n], w[o + _PANEL + n]
                w2, w3 = w[o + _2 * _PANEL + n], w[o + _3 * _PANEL + n]
                acc[a + n] = acc[a + n] + x00 * w0 + x01 * w1 + x02 * w2 + x03 * w3
                b = a + _PANEL + n
                acc[b] = acc[b] + x10 * w0 + x11 * w1 + x12 * w2 + x13 * w3
                c = a + _2 * _PANEL + n
                acc[c] = acc[c] + x20 * w0 + x21 * w1 + x22 * w2 + x23 * w3
                d = a + _3 * _PANEL + n
                acc[d] = acc[d] + x30 * w0 + x31 * w1 + x32 * w2 + x33 * w3
        r += _4
    while r < row1:
        a = (r - row0) * _PANEL
        i0 = source[r]
        for k in range(_0, count, _8):
            f = first + k
            o = k * _PANEL
            x0, x1, x2, x3 = x[i0, f], x[i0, f + _1], x[i0, f + _2], x[i0, f + _3]
            x4, x5, x6, x7 = x[i0, f + _4], x[i0, f + _5], x[i0, f + _6], x[i0, f + _7]
            for n in range(_PANEL):
                low = x0 * w[o + n] + x1 * w[o + _PANEL + n] + x2 * w[o + _2 * _PANEL + n] + x3 * w[o + _3 * _PANEL + n]
                o4 = o + _4 * _PANEL + n
                high = x4 * w[o4] + x5 * w[o4 + _PANEL] + x6 * w[o4 + _2 * _PANEL] + x7 * w[o4 + _3 * _PANEL]
                acc[a + n] = acc[a + n] + (low + high)
        r += _1


@kernel()
def decode_chunk(
    d: Longs,
    payload: Bytes,
    meta: Words,
    panel0: Index,
    width: Index,
    first: Index,
    count: Index,
    scale: Floats,
    zero: Floats,
    w: Floats,
) -> None:
    """Decode channels [first, first + count) of the panel that starts at column `panel0`, group by group."""
    bits, groups = U(d[BITS]), U(d[GROUPS])
    if d[FAMILY] == FLOAT_BF16 or d[FAMILY] == FLOAT_FP16:
        halves = payload.view(np.uint16)
        base = (U(d[PAYLOAD]) >> _1) + panel0 * U(d[K])
        if d[FAMILY] == FLOAT_BF16:
            decode_bf16(halves, base, width, first, count, w, _0)
        else:
            decode_fp16(halves, base, width, first, count, w, _0)
        return
    group = U(d[GROUP])
    base = U(d[PAYLOAD]) + panel0 * ((U(d[K]) * bits + _7) >> _3)
    per_scale = _2 if d[IS_WIDE] else _1
    times = np.float32(2.0) if bits == _1 and not d[IS_ASYM] else np.float32(1.0)
    middle = np.float32(1.0) if bits == _1 else np.float32(_1 << (bits - _1))
    k = first
    while k < first + count:
        g = k // group
        end = min((g + _1) * group, first + count)
        at = panel0 * groups + g * width
        load_scales(meta, d[IS_WIDE], U(d[META]) + at * per_scale, width, scale)
        if d[FAMILY] == FLOAT_E4M3:
            decode_e4m3(payload, base, width, k, end - k, scale, w, k - first)
        else:
            if d[IS_ASYM]:
                load_scales(meta, d[IS_WIDE], U(d[META]) + (U(d[N]) * groups + at) * per_scale, width, zero)
            else:
                for n in range(width):
                    zero[n] = middle
            decode_codes(payload, base, bits, width, k, end - k, times, scale, zero, w, k - first)
        k = end


@kernel()
def float_tile(
    d: Longs, item: Longs, payload: Bytes, meta: Words, bias: Floats, x: Floats, source: Indices, y: Floats
) -> None:
    """Rows of one tile with float activations: y[row, column] for the item's rows and columns, panel by panel."""
    row0, row1, column0, column1 = U(item[1]), U(item[2]), U(item[3]), U(item[4])
    channels, n_columns, chunk = U(d[K]), U(d[N]), U(d[CHUNK])
    w = np.zeros(chunk * _PANEL, np.float32)
    acc = np.empty((row1 - row0) * _PANEL, np.float32)
    scale = np.zeros(_PANEL, np.float32)
    zero = np.zeros(_PANEL, np.float32)
    panel0 = column0 - column0 % _PANEL
    while panel0 < column1:
        width = min(_PANEL, n_columns - panel0)
        acc[:] = np.float32(0.0)
        first = _0
        while first < channels:
            count = min(chunk, channels - first)
            decode_chunk(d, payload, meta, panel0, width, first, count, scale, zero, w)
            padded = (count + _7) >> _3 << _3
            for i in range(count * _PANEL, padded * _PANEL):
                w[i] = np.float32(0.0)
            multiply_add(x, source, row0, row1, first, padded, w, acc)
            first += count
        begin, end = max(column0, panel0), min(column1, panel0 + width)
        for r in range(row0, row1):
            a = (r - row0) * _PANEL
            for n in range(begin, end):
                y[r, n] = acc[a + n - panel0]
            if d[BIAS] >= 0:
                b = U(d[BIAS])
                for n in range(begin, end):
                    y[r, n] += bias[b + n]
        panel0 += _PANEL


@kernel()
def decode_row(payload: Bytes, base: Index, bits: Index, count: Index, times: np.int16, out: Shorts, o: Index) -> None:
    """Widen one row of codes of 1 to 8 bits to int16: out[o + k] = times * code[k]."""
    if bits == _8:
        for k in range(count):
            out[o + k] = np.int16(payload[base + k])
    elif bits == _4:
        for j in range(count >> _1):
            both = payload[base + j]
            out[o + _2 * j] = np.int16(both & np.uint8(15))
            out[o + _2 * j + _1] = np.int16(both >> np.uint8(4))
        if count & _1:
            out[o + count - _1] = np.int16(payload[base + (count >> _1)] & np.uint8(15))
    else:
        mask = (_1 << bits) - _1
        for k in range(count):
            start = k * bits
            at = base + (start >> _3)
            word = np.uint64(payload[at]) | (np.uint64(payload[at + _1]) << _8)
            out[o + k] = np.int16(times * np.int16((word >> (start & _7)) & mask))


@kernel()
def subtract(out: Shorts, o: Index, count: Index, zero: np.int16) -> None:
    """out[o : o + count] -= zero."""
    for k in range(count):
        out[o + k] = np.int16(out[o + k] - zero)


@kernel()
def multiply(out: Shorts, o: Index, count: Index, times: np.int16) -> None:
    """out[o : o + count] *= times."""
    for k in range(count):
        out[o + k] = np.int16(out[o + k] * times)


@kernel()
def dot(x: Codes, i: Index, w: Shorts, j: Index, count: Index) -> np.int32:
    """Sum of products of `count` integers in int32, exact: one sum at a time, or the pairing of products is lost."""
    total = np.int32(0)
    for k in range(count):
        total = np.int32(total + np.int32(np.int32(x[i + k]) * np.int32(w[j + k])))
    return total


@kernel()
def decode_integers(
    d: Longs, payload: Bytes, meta: Words, column: Index, rows: Index, scale: Floats, zero: Floats, w: Shorts
) -> None:
    """
    Decode `rows` rows of an integer weight, less their zero points, into w [rows, k]; and scales [rows, groups].

    Integer scales: w is times the multipliers, bytes [n, groups] behind the scales, and there is one scale for a row.
    """
    bits, groups, channels, group = U(d[BITS]), U(d[GROUPS]), U(d[K]), U(d[GROUP])
    sums = _1 if d[HAS_MULTIPLIERS] else groups
    stride = (channels * bits + _7) >> _3
    per_scale = _2 if d[IS_WIDE] else _1
    times = np.int16(2) if bits == _1 and not d[IS_ASYM] else np.int16(1)
    middle = np.int16(1) if bits == _1 else np.int16(_1 << (bits - _1))
    load_scales(meta, d[IS_WIDE], U(d[META]) + column * sums * per_scale, rows * sums, scale)
    multipliers = meta.view(np.uint8)
    first = _2 * (U(d[META]) + U(d[N]) * per_scale) + column * groups
    if d[IS_ASYM]:
        load_scales(meta, d[IS_WIDE], U(d[META]) + (U(d[N]) + column) * groups * per_scale, rows * groups, zero)
    for j in range(rows):
        decode_row(payload, U(d[PAYLOAD]) + (column + j) * stride, bits, channels, times, w, j * channels)
        if not d[IS_ASYM]:
            subtract(w, j * channels, channels, middle)
        else:
            for g in range(groups):
                count = min(group, channels - g * group)
                subtract(w, j * channels + g * group, count, np.int16(zero[j * groups + g]))
        if d[HAS_MULTIPLIERS]:
            for g in range(groups):
                count = min(group, channels - g * group)
                multiply(w, j * channels + g * group, count, np.int16(multipliers[first + j * groups + g]))


@kernel()
def integer_tile(
    d: Longs,
    item: Longs,
    payload: Bytes,
    meta: Words,
    bias: Floats,
    x: Codes,
    x_scale: Floats,
    source: Indices,
    y: Floats,
) -> None:
    """
    Rows of one tile with integer activations: int32 sums per group, then float32 in the order of the definition.

    `y = sum over groups of float32(sum) * (s_a * s_w)`, first group first, and no multiply-add contraction: the result
    is the definition's, bit for bit. With integer scales the whole row is one sum.
    """
    row0, row1, column0, column1 = U(item[1]), U(item[2]), U(item[3]), U(item[4])
    channels, groups = U(d[K]), U(d[GROUPS])
    sums, size = (_1, channels) if d[HAS_MULTIPLIERS] else (groups, U(d[GROUP]))
    flat = x.reshape(-1)
    x_stride = U(x.shape[1])
    block = U(ROW_BLOCK)
    w = np.empty(block * channels, np.int16)
    scale = np.empty(block * groups, np.float32)
    zero = np.empty(block * groups, np.float32)
    column = column0
    while column < column1:
        rows = min(block, column1 - column)
        decode_integers(d, payload, meta, column, rows, scale, zero, w)
        for r in range(row0, row1):
            i = source[r]
            for j in range(rows):
                total = np.float32(0.0)
                for g in range(sums):
                    count = min(size, channels - g * size)
                    exact = dot(flat, i * x_stride + g * size, w, j * channels + g * size, count)
                    total += np.float32(exact) * (x_scale[i, g if d[ACT_GROUPED] else _0] * scale[j * sums + g])
                y[r, column + j] = total
        if d[BIAS] >= 0:
            for r in range(row0, row1):
                for j in range(rows):
                    y[r, column + j] += bias[U(d[BIAS]) + column + j]
        column += rows


@kernel(parallel=True)
def group_gemm(
    items: Longs,
    matrices: Longs,
    payload: Bytes,
    meta: Words,
    bias: Floats,
    x_float: Floats,
    x_int: Codes,
    x_scale: Floats,
    source: Indices,
    y: Floats,
) -> None:
    """
    Multiply every tile of a work list: one launch for all experts, weights and schemes of a group GEMM.

    Args:
        items: int64 [tiles, 5], longest first: row of `matrices`, rows [1] to [2], columns [3] to [4].
        matrices: int64 [matrices, N_FIELDS], a descriptor each; matrices are the weights of the op times the experts.
        payload: uint8, all codes.
        meta: uint16, all scales, zero points and multipliers, float32 ones as two halves, bytes two by two.
        bias: float32, all biases.
        x_float: float32 [float rows, k padded to 8], activations as values.
        x_int: int8 [integer rows, k], activations as codes.
        x_scale: float32 [integer rows, groups or 1].
        source: uint64 [rows], the row of x_float or x_int that a row of y is made from.
        y: float32 [weights, rows, n], written wherever a tile lies.
    """
    experts = matrices.shape[0] // y.shape[0]
    for t in prange(items.shape[0]):
        item = items[t]
        d = matrices[item[0]]
        out = y[item[0] // experts]
        if d[FAMILY] == INTEGER:
            integer_tile(d, item, payload, meta, bias, x_int, x_scale, source, out)
        else:
            float_tile(d, item, payload, meta, bias, x_float, source, out)


@kernel(parallel=True)
def combine(rows: Floats, slots: Longs, weights: Floats, out: Floats) -> None:
    """
    Weigh and add each token's rows in the order of its top-k: out[t] = ((0 + w0 * y0) + w1 * y1) + ...

    Args:
        rows: float32 [assignments, hidden].
        slots: int64 [tokens, top_k], row of each assignment, -1 for padding.
        weights: float32 [tokens, top_k].
        out: float32 [tokens, hidden].
    """
    for t in prange(out.shape[0]):
        total = out[t]
        total[:] = np.float32(0.0)
        for j in range(slots.shape[1]):
            if slots[t, j] >= 0:
                row = rows[slots[t, j]]
                weight = weights[t, j]
                for n in range(total.shape[0]):
                    total[n] = total[n] + weight * row[n]
