"""
The group GEMM: one launch for all experts of a block, whatever their schemes; and what lies before and behind it.

A program walks tiles of the schedule. The class of a tile says which body runs, with which sizes; the branch is uniform
in a program, and only classes of the launch are compiled in. `CLASSES` is a tuple of rows in the order of `FIELDS`.
"""

# what is compiled is not what Triton's stubs describe: constants are their values, types are known
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportUnusedImport=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mxmoe.backends.triton.bodies import channels, dense, nibbles, scaled, wide
from mxmoe.backends.triton.decode import E4M3_STEP, INT8_STEP, cast
from mxmoe.backends.triton.kernels_chain import wait, wait_and_lead
from mxmoe.backends.triton.kernels_schedule import tile_in_class

FIELDS = (
    *("kind", "height", "width", "depth", "stages"),
    *("n", "k", "bits", "group", "asym", "row_kind", "row_group", "parts", "lead"),
)
"""What a class is compiled for: kind of body, rows and columns of a tile, channels of a step and steps in flight; the
matrix; weight bits, group (0: per channel), zero points; which rows it reads, whether they have a scale per group; and
into how many parts k is split. An expert of its own size, which sees every token, has a `lead`: the k of the others, 0
for these. Between the GEMMs its rows lie behind theirs, from a multiple of 16 rows on, in the order of tokens."""
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
LEAD = tl.constexpr(13)

DENSE, NIBBLES, WIDE, SCALED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
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
    acc: tl.tensor, arena: tl.tensor, at: tl.tensor, beside: tl.tensor, x_scale: tl.tensor, bias: tl.tensor,
    first: tl.tensor,
    CLASSES: tl.constexpr, C: tl.constexpr, ROWS_FLOAT: tl.constexpr, ROWS_INT: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SIDES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Apply what is constant along k: steps of the codes, scales per channel and per row, the bias."""
    S: tl.constexpr = CLASSES[C]
    n, side = channels(first, BN, GATED)
    n = tl.minimum(n, S[N] - 1)
    if S[KIND] == NIBBLES:
        acc = acc * (INT8_STEP if ROWS_INT else E4M3_STEP)
    row_scaled: tl.constexpr = (not ROWS_FLOAT) and (S[GROUP] == 0 or not S[ROW_GROUP])
    if S[GROUP] == 0 and S[BITS] < 16:
        s = tl.load((arena + at + side * beside).to(tl.pointer_type(tl.float32)) + n)
        if row_scaled:
            acc = acc * (s[:, None] * x_scale[None, :])
        else:
            acc = acc * s[:, None]
    elif row_scaled:
        acc = acc * x_scale[None, :]
    if HAS_BIAS:  # of the first part of k only, where it is split
        acc = acc + tl.load(bias + side * SIDES + n)[:, None]
    return acc


@triton.jit
def _sums(
    x: tl.tensor, x_scale: tl.tensor, source: tl.tensor, arena: tl.tensor, base_ptr: tl.tensor, expert: tl.tensor,
    first: tl.tensor, part: tl.tensor, CLASSES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Run the body of a class."""
    S: tl.constexpr = CLASSES[C]
    at, beside = _address(base_ptr, expert, 0, LANES, GATED)
    if S[KIND] == DENSE:
        typed = tl.pointer_type(x.dtype.element_ty)
        bytes_each: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
        depth: tl.constexpr = S[K] // S[PARTS]
        acc = dense(
            x, source, (arena + at).to(typed), beside // bytes_each, first, part * depth,
            S[N], S[K], depth, S[HEIGHT], BN, S[DEPTH], S[STAGES], GATED, PTX,
        )  # fmt: skip
    elif S[KIND] == NIBBLES:
        s, s_beside = _address(base_ptr, expert, 1, LANES, GATED)
        units: tl.constexpr = (S[K] + 127) // 128
        acc = nibbles(
            x, x_scale, source, arena + at, beside, (arena + s).to(tl.pointer_type(tl.bfloat16)), s_beside // 2, first,
            part * ((units + S[PARTS] - 1) // S[PARTS]),
            S[N], S[K], S[PARTS], S[GROUP], S[ROW_GROUP], S[HEIGHT], BN, S[STAGES], GATED, PTX,
        )  # fmt: skip
    elif S[KIND] == SCALED:
        m, m_beside = _address(base_ptr, expert, 2, LANES, GATED)
        units: tl.constexpr = (S[K] + 127) // 128
        acc = scaled(
            x, source, arena + at, beside, arena + m, m_beside, first, part * ((units + S[PARTS] - 1) // S[PARTS]),
            S[N], S[K], S[PARTS], S[HEIGHT], BN, S[STAGES], GATED, PTX,
        )  # fmt: skip
    else:
        meta = tl.pointer_type(tl.float32 if S[GROUP] == 0 else tl.bfloat16)
        each: tl.constexpr = 4 if S[GROUP] == 0 else 2
        s, s_beside = _address(base_ptr, expert, 1, LANES, GATED)
        z, z_beside = _address(base_ptr, expert, 2, LANES, GATED)
        acc = wide(
            x, source, arena + at, beside, (arena + s).to(meta), s_beside // each, (arena + z).to(meta),
            z_beside // each, first,
            S[N], S[K], S[BITS], S[GROUP], S[ASYM], S[HEIGHT], BN, S[STAGES], GATED, PTX,
        )  # fmt: skip
    return acc


@triton.jit
def _columns(CLASSES: tl.constexpr, C: tl.constexpr) -> tl.constexpr:
    """Tiles of a band: side by side, times the parts of k."""
    return ((CLASSES[C][N] + CLASSES[C][WIDTH] - 1) // CLASSES[C][WIDTH]) * CLASSES[C][PARTS]


@triton.jit
def _address(
    base_ptr: tl.tensor, expert: tl.tensor, WHAT: tl.constexpr, LANES: tl.constexpr, GATED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Byte offset of an expert's payload (0), scale (1) or zero or multiplier (2), and bytes to the second matrix's."""
    at = tl.multiple_of(tl.load(base_ptr + expert * 3 + WHAT), 256)
    if GATED:
        beside = tl.multiple_of(tl.load(base_ptr + (LANES + expert) * 3 + WHAT) - at, 256)
    else:
        beside = at
    return at, beside


@triton.jit
def _tile(
    xs: tl.tensor, x_scales: tl.tensor, arena: tl.tensor, base_ptr: tl.tensor, bias_ptr: tl.tensor, row_of: tl.tensor,
    band_ptr: tl.tensor, bands: tl.tensor, y_ptr: tl.tensor, assignments: tl.tensor, tokens: tl.tensor,
    part_stride: tl.tensor, local: tl.tensor, before: tl.tensor, end: tl.tensor,
    CLASSES: tl.constexpr, C: tl.constexpr, GROUPING: tl.constexpr, LANES: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BIAS_N: tl.constexpr, LD: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply one tile and write it."""
    S: tl.constexpr = CLASSES[C]
    BM: tl.constexpr = S[HEIGHT]
    BN: tl.constexpr = S[WIDTH] * (2 if GATED else 1)
    band, column = tile_in_class(local, end - before, _columns(CLASSES, C), GROUPING)
    band += before
    expert = tl.load(band_ptr + band)
    row = tl.load(band_ptr + bands + band) + tl.arange(0, BM)
    inside = tl.arange(0, BM) < tl.load(band_ptr + 2 * bands + band)
    if GATHER or S[LEAD]:
        flat = tl.load(row_of + row, mask=inside, other=0)
        source = tl.where(flat < assignments, flat // TOP_K, (flat - assignments) % tl.maximum(tokens, 1))
    else:
        source = tl.where(inside, row, 0)
    source = source.to(tl.int64)
    x = xs[S[ROW_KIND]]
    x_scale = x_scales[S[ROW_KIND]]
    beyond = tl.full((), 0, tl.int64) + (assignments + 15) // 16 * 16
    if S[LEAD] and not GATHER:
        x += beyond * S[LEAD]
        x_scale += beyond * ((S[LEAD] + 127) // 128 if S[ROW_GROUP] else 1)
    first = (column // S[PARTS]) * S[WIDTH]
    part = column % S[PARTS]
    acc = _sums(
        x, x_scale, source, arena, base_ptr, expert, first, part, CLASSES, C, LANES, BN, GATED, PTX
    )  # fmt: skip
    FLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16 or x.dtype.element_ty == tl.float16
    INT: tl.constexpr = x.dtype.element_ty == tl.int8
    if FLOAT or (S[GROUP] != 0 and S[ROW_GROUP]):
        scale = source.to(tl.float32)
    else:
        scale = tl.load(x_scale + source)
    if S[GROUP] == 0 and S[BITS] < 16:
        at, beside = _address(base_ptr, expert, 1, LANES, GATED)
    else:
        at, beside = expert, expert
    bias = bias_ptr + expert * BIAS_N
    y = _scaled(
        acc, arena, at, beside, scale, bias, first, CLASSES, C, FLOAT, INT, BN, GATED, HAS_BIAS, LANES * BIAS_N
    )  # fmt: skip
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BN // 2, BM)), (1, 2, 0)))
        y = act(gate, up, ACT, P, Q)
    elif ACT != "none":
        y = _pointwise(y, ACT)
    n = first + tl.arange(0, S[WIDTH])
    if S[LEAD] and GATHER:
        at_row = beyond * LD + source * S[N]
    else:
        at_row = row.to(tl.int64) * LD
    to = y_ptr + part * part_stride + at_row[None, :] + n[:, None]
    mask = inside[None, :] & (n < S[N])[:, None]
    tl.store(to, cast(y, y_ptr.dtype.element_ty, PTX), mask=mask)


@triton.jit
def group_gemm(
    xs: tl.tensor, x_scales: tl.tensor, arena: tl.tensor, base_ptr: tl.tensor, bias_ptr: tl.tensor, row_of: tl.tensor,
    ends_ptr: tl.tensor, band_ptr: tl.tensor, bands: tl.tensor, y_ptr: tl.tensor, assignments: tl.tensor,
    tokens: tl.tensor, part_stride: tl.tensor,
    CLASSES: tl.constexpr, CP: tl.constexpr, GROUPING: tl.constexpr, LANES: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, BIAS_N: tl.constexpr, LD: tl.constexpr, PTX: tl.constexpr, WALKS: tl.constexpr,
) -> None:  # fmt: skip
    """
    y[sorted row] = act(W_expert x[source]) for every tile of the schedule.

    Args: `xs`, `x_scales` activations by kind of rows, codes [*, K] and float32 scales; `arena` all weights as bytes;
    `base_ptr` int64 [matrices, LANES, 3] where payload, scale and zero of each lie; `bias_ptr` float32 [matrices,
    LANES, BIAS_N]; the tables of the schedule; `y_ptr` [parts, rows, LD].
    """
    wait(PTX)
    if WALKS:
        last = tl.load(ends_ptr + CP + len(CLASSES))
        for tile in range(tl.program_id(0), last, tl.num_programs(0)):
            found, local, before, end = _find(tile, last, ends_ptr, CLASSES, CP)
            for i in tl.static_range(len(CLASSES)):
                if found == i:
                    _tile(
                        xs, x_scales, arena, base_ptr, bias_ptr, row_of, band_ptr, bands, y_ptr, assignments, tokens,
                        part_stride, local, before, end,
                        CLASSES, i, GROUPING, LANES, TOP_K, GATHER, GATED, HAS_BIAS, ACT, P, Q, BIAS_N, LD, PTX,
                    )  # fmt: skip
    else:  # a loop of one step would keep its registers
        tile = tl.program_id(0)
        for i in tl.static_range(len(CLASSES)):
            # classes are in the order of their tiles; leaving at once tells the compiler that all threads go one way
            if tile < tl.load(ends_ptr + CP + i + 1):
                local = tile - tl.load(ends_ptr + CP + i)
                _tile(
                    xs, x_scales, arena, base_ptr, bias_ptr, row_of, band_ptr, bands, y_ptr, assignments, tokens,
                    part_stride, local, tl.load(ends_ptr + i), tl.load(ends_ptr + i + 1),
                    CLASSES, i, GROUPING, LANES, TOP_K, GATHER, GATED, HAS_BIAS, ACT, P, Q, BIAS_N, LD, PTX,
                )  # fmt: skip
                return


@triton.jit
def _find(
    tile: tl.tensor, last: tl.tensor, ends_ptr: tl.tensor, CLASSES: tl.constexpr, CP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Class of a tile, its number in the class, and the first band of the class and of the next."""
    if len(CLASSES) == 1:
        found, local, before, end = 0, tile, 0, last // _columns(CLASSES, 0)
    else:
        c = tl.arange(0, CP)
        first_band = tl.load(ends_ptr + c)
        first_tile = tl.load(ends_ptr + CP + c)
        # empty classes share the start of the next, so the last class that starts at or before the tile holds it
        found = tl.sum(((first_tile <= tile) & (c > 0)).to(tl.int32), 0)
        local = tile - tl.sum(tl.where(c == found, first_tile, 0), 0)
        before = tl.sum(tl.where(c == found, first_band, 0), 0)
        end = tl.sum(tl.where(c == found + 1, first_band, 0), 0)
    return found, local, before, end


@triton.jit
def combine(
    y_ptr: tl.tensor, place_of: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, part_stride: tl.tensor,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    PTX: tl.constexpr,
) -> None:  # fmt: skip
    """out[token] = sum over its choices, first choice first, of router weight * y[place], in float32."""
    wait_and_lead(PTX)
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
