"""
The group GEMM: one launch for all experts of a block, whatever their schemes; and what lies before and behind it.

A program walks tiles of the schedule. The class of a tile says which body runs, with which sizes; the branch is uniform
in a program, and only classes of the launch are compiled in. `CLASSES` is a tuple of rows in the order of `FIELDS`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mxmoe.backends.triton.bodies import dense, nibbles, wide
from mxmoe.backends.triton.decode import E4M3_STEP, INT8_STEP, cast
from mxmoe.backends.triton.schedule import tile_at

FIELDS = (
    *("kind", "height", "width", "depth", "stages"),
    *("n", "k", "bits", "group", "asym", "row_kind", "row_group", "parts"),
)
"""What a class is compiled for: kind of body, rows and columns of a tile, channels of a step and steps in flight; the
matrix; weight bits, group (0: per channel), zero points; which rows it reads, whether they have a scale per group; and
into how many parts k is split."""
KIND = tl.constexpr(0)
HEIGHT = tl.constexpr(1)
WIDTH = tl.constexpr(2)
DEPTH = tl.constexpr(3)
STAGES = tl.constexpr(4)
N = tl.constexpr(5)
K = tl.constexpr(6)
BITS = tl.constexpr(7)
GROUP = tl.constexpr(8)
ASYM = tl.constexpr(9)
ROW_KIND = tl.constexpr(10)
ROW_GROUP = tl.constexpr(11)
PARTS = tl.constexpr(12)

DENSE, NIBBLES, WIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of bodies."""


@triton.jit
def _sigmoid(x: tl.tensor) -> Any:
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x: tl.tensor) -> Any:
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _clip(x: tl.tensor, limit: tl.tensor) -> Any:
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _pointwise(x: tl.tensor, ACT: tl.constexpr) -> Any:
    """One of `mxmoe.quant.acts.POINTWISE`, in float32."""
    if ACT == "silu":
        y = x * _sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "gelu_quick":
        y = x * _sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACT == "sigmoid":
        y = _sigmoid(x)
    elif ACT == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(ACT == "identity", "an activation without a formula here")
        y = x
    return y


@triton.jit
def act(gate: tl.tensor, up: tl.tensor, ACT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr) -> Any:
    """Gated kinds of `mxmoe.quant.ACTS`, in float32; P and Q are the params, in the order of `ACT_PARAMS`."""
    if ACT == "swiglu_oai":
        clipped = tl.minimum(gate, Q)
        y = (_clip(up, Q) + 1.0) * clipped * _sigmoid(P * clipped)
    elif ACT == "silu_clamped":
        y = _pointwise(tl.minimum(gate, P), "silu") * _clip(up, P)
    elif ACT == "silu_capped":
        y = tl.minimum(_pointwise(gate, "silu"), P) * _clip(up, P)
    elif ACT == "swiglu_softcap":
        y = P * _tanh(gate / P) * _sigmoid(gate) * Q * _tanh(up / Q)
    else:
        y = _pointwise(gate, ACT) * up
    return y


@triton.jit
def _scaled(
    acc: tl.tensor, arena: tl.tensor, at_scale: tl.tensor, x_scale: tl.tensor, bias: tl.tensor, n: tl.tensor, CLASSES: tl.constexpr, C: tl.constexpr,
    IS_FLOAT: tl.constexpr, IS_INT: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> Any:  # fmt: skip
    """Apply what is constant along k: steps of the codes, scales per channel and per row, the bias."""
    SPEC: tl.constexpr = CLASSES[C]
    if SPEC[KIND] == NIBBLES:
        acc = acc * (INT8_STEP if IS_INT else E4M3_STEP)
    per_channel: tl.constexpr = SPEC[GROUP] == 0 and SPEC[BITS] < 16
    row_scaled: tl.constexpr = (not IS_FLOAT) and (SPEC[GROUP] == 0 or not SPEC[ROW_GROUP])
    if per_channel:
        s = tl.load((arena + at_scale).to(tl.pointer_type(tl.float32)) + n)
        if row_scaled:
            acc = acc * (s[:, None] * x_scale[None, :])
        else:
            acc = acc * s[:, None]
    elif row_scaled:
        acc = acc * x_scale[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias + n)[:, None]
    return acc


@triton.jit
def _sums(
    x: tl.tensor, x_scale: tl.tensor, source: tl.tensor, arena: tl.tensor, at: tl.tensor, at2: tl.tensor, first: tl.tensor, k0: tl.tensor,
    CLASSES: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """Run the body of a class; `at`, `at2` are the addresses (payload, scale, zero) of a matrix and its second."""
    S: tl.constexpr = CLASSES[C]
    if S[KIND] == DENSE:
        typed = tl.pointer_type(x.dtype.element_ty)
        w, v = (arena + at[0]).to(typed), (arena + at2[0]).to(typed)
        acc, acc2 = dense(
            x, source, w, v, first, k0,
            S[N], S[K], S[K] // S[PARTS], S[HEIGHT], S[WIDTH], S[DEPTH], S[STAGES], GATED, PTX,
        )  # fmt: skip
    elif S[KIND] == NIBBLES:
        s, t = (arena + at[1]).to(tl.pointer_type(tl.bfloat16)), (arena + at2[1]).to(tl.pointer_type(tl.bfloat16))
        acc, acc2 = nibbles(
            x, x_scale, source, arena + at[0], arena + at2[0], s, t, first,
            S[N], S[K], S[GROUP], S[ROW_GROUP], S[HEIGHT], S[WIDTH], S[STAGES], GATED, PTX,
        )  # fmt: skip
    else:
        meta = tl.pointer_type(tl.float32 if S[GROUP] == 0 else tl.bfloat16)
        s, t = (arena + at[1]).to(meta), (arena + at2[1]).to(meta)
        z, y = (arena + at[2]).to(meta), (arena + at2[2]).to(meta)
        acc, acc2 = wide(
            x, source, arena + at[0], arena + at2[0], s, t, z, y, first,
            S[N], S[K], S[BITS], S[GROUP], S[ASYM], S[HEIGHT], S[WIDTH], S[STAGES], GATED, PTX,
        )  # fmt: skip
    return acc, acc2


@triton.jit
def _addresses(base_ptr: tl.tensor, lane: tl.tensor) -> Any:
    """Byte offsets of payload, scale and zero of a matrix; all are multiples of 256."""
    at = base_ptr + lane * 3
    return (
        tl.multiple_of(tl.load(at), 256),
        tl.multiple_of(tl.load(at + 1), 256),
        tl.multiple_of(tl.load(at + 2), 256),
    )


@triton.jit
def _tile(
    xs: tl.tensor, x_scales: tl.tensor, arena: tl.tensor, base_ptr: tl.tensor, bias_ptr: tl.tensor, row_of: tl.tensor, band_ptr: tl.tensor, bands: tl.tensor, y_ptr: tl.tensor,
    assignments: tl.tensor, tokens: tl.tensor, part_stride: tl.tensor, band: tl.tensor, column: tl.tensor,
    CLASSES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BIAS_N: tl.constexpr, LD: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    S: tl.constexpr = CLASSES[C]
    expert = tl.load(band_ptr + band)
    row = tl.load(band_ptr + bands + band) + tl.arange(0, S[HEIGHT])
    inside = tl.arange(0, S[HEIGHT]) < tl.load(band_ptr + 2 * bands + band)
    if GATHER:
        flat = tl.load(row_of + row, mask=inside, other=0)
        source = tl.where(flat < assignments, flat // TOP_K, (flat - assignments) % tl.maximum(tokens, 1))
    else:
        source = tl.where(inside, row, 0)
    source = source.to(tl.int64)
    x = xs[S[ROW_KIND]]
    x_scale = x_scales[S[ROW_KIND]]
    first = (column // S[PARTS]) * S[WIDTH]
    part = column % S[PARTS]
    at = _addresses(base_ptr, expert)
    at2 = _addresses(base_ptr, LANES + expert) if GATED else at
    acc, acc2 = _sums(
        x, x_scale, source, arena, at, at2, first, part * (S[K] // S[PARTS]), CLASSES, C, GATED, PTX
    )  # fmt: skip
    n = first + tl.arange(0, S[WIDTH])
    known = n < S[N]
    if S[N] % S[WIDTH]:
        n = tl.minimum(n, S[N] - 1)
    FLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16 or x.dtype.element_ty == tl.float16
    INT: tl.constexpr = x.dtype.element_ty == tl.int8
    if FLOAT or (S[GROUP] != 0 and S[ROW_GROUP]):
        scale = source.to(tl.float32)
    else:
        scale = tl.load(x_scale + source)
    bias = bias_ptr + expert * BIAS_N
    y = _scaled(acc, arena, at[1], scale, bias, n, CLASSES, C, FLOAT, INT, HAS_BIAS)
    if GATED:
        up = _scaled(acc2, arena, at2[1], scale, bias + LANES * BIAS_N, n, CLASSES, C, FLOAT, INT, HAS_BIAS)
        y = act(y, up, ACT, P, Q)
    elif ACT != "none":
        y = _pointwise(y, ACT)
    to = y_ptr + part * part_stride + row.to(tl.int64)[None, :] * LD + n[:, None]
    mask = inside[None, :] & known[:, None]
    tl.store(to, cast(y, y_ptr.dtype.element_ty, PTX), mask=mask)


@triton.jit
def group_gemm(
    xs: tl.tensor, x_scales: tl.tensor, arena: tl.tensor, base_ptr: tl.tensor, bias_ptr: tl.tensor, row_of: tl.tensor, ends_ptr: tl.tensor, class_ptr: tl.tensor, band_ptr: tl.tensor,
    bands: tl.tensor, y_ptr: tl.tensor, assignments: tl.tensor, tokens: tl.tensor, part_stride: tl.tensor,
    CLASSES: tl.constexpr, CP: tl.constexpr, GROUPING: tl.constexpr, LANES: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, BIAS_N: tl.constexpr, LD: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[source]) for every tile of the schedule.

    Args: `xs`, `x_scales` activations by kind of rows, codes [*, K] and float32 scales; `arena` all weights as bytes;
    `base_ptr` int64 [matrices, LANES, 3] where payload, scale and zero of each lie; `bias_ptr` float32 [matrices,
    LANES, BIAS_N]; the tables of the schedule; `y_ptr` [parts, rows, LD].
    """
    last = tl.load(ends_ptr + CP + len(CLASSES))
    for tile in range(tl.program_id(0), last, tl.num_programs(0)):
        found, band, column = tile_at(tile, ends_ptr, class_ptr, CP, GROUPING)
        for c in tl.static_range(len(CLASSES)):
            if found == c:
                _tile(
                    xs, x_scales, arena, base_ptr, bias_ptr, row_of, band_ptr, bands, y_ptr, assignments, tokens,
                    part_stride, band, column,
                    CLASSES, c, LANES, TOP_K, GATHER, GATED, HAS_BIAS, ACT, P, Q, BIAS_N, LD, PTX,
                )  # fmt: skip


@triton.jit
def combine(
    y_ptr: tl.tensor, place_of: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, part_stride: tl.tensor,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
) -> Any:  # fmt: skip
    """out[token] = sum over its choices, first choice first, of router weight * y[place], in float32."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        place = tl.load(place_of + token * TOP_K + j).to(tl.int64)
        y = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            at = y_ptr + part * part_stride + place * H + h
            y += tl.load(at, mask=(h < H) & (place >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + token * TOP_K + j).to(tl.float32)
        acc += tl.where(place >= 0, y, 0.0)
    tl.store(out_ptr + token * H + h, cast(acc, out_ptr.dtype.element_ty, PTX), mask=h < H)
