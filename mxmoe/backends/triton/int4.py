"""The launch of the INT4 experts: what it takes, what it is compiled for, and the slow code that defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton.dispatch import Tables
from mxmoe.backends.triton.int4_pack import (
    STEP,
    ZERO_CODE,
    PackedInt4,
    unpack_channels,
    unpack_int4,
    unpack_rows,
    unpair,
)
from mxmoe.backends.triton.kernels_int4 import int4_kernel
from mxmoe.backends.triton.mode import programs_at_once
from mxmoe.errors import BadInt4
from mxmoe.quant import ACT_PARAMS, apply_act

WIDTH = 128
"""Output channels of a tile, gate and up counted apart."""
STAGES = 3
"""Buffers of the ring: two steps are under way while one is multiplied."""
HEIGHTS = (16, 32, 64, 128)
"""Rows that a tile may have."""
DEPTH = 8
"""Bands that take turns before the next column, so that they share its weights in the second-level cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Bands:
    """The part of a schedule that the INT4 launch walks; the tensors may change between launches of one graph."""

    classes: tuple[tuple[int, int], ...]
    """(place in the order of classes, height) of the classes of INT4 experts, longest first."""
    class_band: Tensor
    """int32, first band of each class of the launch, then the end; as the four below, of `schedule.Tables`."""
    band_expert: Tensor
    band_row: Tensor
    band_rows: Tensor
    row_of: Tensor
    """int32, sorted row -> flat row; read where rows are gathered."""
    slot: Tensor
    """int32 [lanes], expert -> its place among the packed weights; anything for an expert that is not INT4."""
    top_k: int
    tokens: int

    @classmethod
    def of(cls, tables: Tables, which: int, group: int, slot: Tensor) -> Int4Bands:
        """Take the classes of one group of experts out of the tables of a launch."""
        tiling = tables.dispatch.tilings[which]
        classes = tuple((at, one.height) for at, one in enumerate(tiling.classes) if one.group == group)
        names = ("class_band", "band_expert", "band_row", "band_rows", "row_of")
        views = {name: tables.table(name, which) for name in names}
        return cls(classes=classes, slot=slot, top_k=tables.dispatch.top_k, tokens=tables.dispatch.tokens, **views)


@dataclass(frozen=True, slots=True)
class Int4Options:
    """What the launch is compiled for, besides the classes."""

    gather: bool = False
    """Rows are read through `row_of`: x holds tokens, each once. Otherwise x holds sorted rows."""
    act: str | None = None
    """Gated kind of `mxmoe.quant.ACTS`, for weights of `pack_int4_pair`: out = act(gate, up). None: plain sums."""
    params: tuple[float, float] = (0.0, 0.0)
    """Parameters of the activation, in the order of `ACT_PARAMS`."""


PLAIN = Int4Options()
"""Sorted rows in, plain sums out."""


def int4_group_gemm(
    x: Tensor,
    x_scale: Tensor,
    weights: PackedInt4,
    bands: Int4Bands,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    options: Int4Options = PLAIN,
    programs: int | None = None,
) -> None:
    """
    Multiply the rows of every INT4 expert by its weight, in one launch; rows of other experts stay as they are.

    Nothing waits for the device, and shapes do not depend on the routing: the launch can be captured in a graph.

    Args:
        x: int32 [rows, steps * 16] from `quantize_rows` or `pack_rows`: tokens where rows are gathered, else sorted
            rows.
        x_scale: float32 [rows, steps], or [rows, 1] where the scheme has one scale per token.
        weights: from `pack_int4` or `pack_int4_pair`.
        bands: where the tiles are.
        out: bfloat16, float16 or float32 [sorted rows, n], or [sorted rows, n / 2] where an activation is fused.
        bias: float32 [slots, fragments * 16] from `pack_channels`.
        options: what is fused.
        programs: size of the grid; None takes two for each multiprocessor, as many as run at once.

    Raises:
        BadInt4: tensors that do not fit each other, or a height that no tile has.
    """
    reason = _fault(x, x_scale, weights, bands, out, options)
    if reason:
        raise BadInt4(reason=reason)
    if programs is None:
        programs = 2 * programs_at_once(x.device)
    kernel: Any = int4_kernel  # typed by its decorator as what it is not
    kernel[(programs,)](
        *(x, x_scale, weights.words, weights.scale, weights.scale if bias is None else bias, out),
        *(bands.row_of, bands.slot, bands.class_band, bands.band_expert, bands.band_row, bands.band_rows),
        *(weights.n, weights.steps, bands.top_k, bands.tokens),
        **launch_constants(weights.scheme.group_size is not None, bands.classes, options, bias is not None),
        num_warps=launch_warps(bands.classes),
    )


def launch_constants(
    is_grouped: bool, classes: Sequence[tuple[int, int]], options: Int4Options, has_bias: bool
) -> dict[str, Any]:
    """Give the compile-time arguments of the kernel for a launch."""
    return {
        "CLASSES": tuple(classes),
        "WIDTH": WIDTH,
        "STAGES": STAGES,
        "DEPTH": DEPTH,
        "GROUPED": is_grouped,
        "GATHER": options.gather,
        "GATED": options.act is not None,
        "HAS_BIAS": has_bias,
        "ACT": options.act or "none",
        "P": options.params[0],
        "Q": options.params[1],
    }


def launch_warps(classes: Sequence[tuple[int, int]]) -> int:
    """Warps of a program: eight where a tile has 128 rows, whose sums do not fit the registers of four."""
    return 8 if max(height for _, height in classes) > 64 else 4


def int4_group_gemm_torch(
    x: Tensor,
    x_scale: Tensor,
    weights: PackedInt4,
    bands: Int4Bands,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    options: Int4Options = PLAIN,
) -> None:
    """`int4_group_gemm` by the definition, band after band."""
    matrices = unpack_int4(weights)
    ends = bands.class_band.tolist()
    for place, _ in bands.classes:
        for band in range(ends[place], ends[place + 1]):
            first, count = int(bands.band_row[band]), int(bands.band_rows[band])
            rows = torch.arange(first, first + count, device=x.device)
            source = _source(bands, rows) if options.gather else rows
            slot = int(bands.slot[int(bands.band_expert[band])])
            matrix, codes = matrices[slot], unpack_rows(x[source], weights.k)
            assert matrix.scale is not None, f"{weights.scheme} has scales"
            y = scaled_sums(codes, x_scale[source], matrix.codes, matrix.scale)
            if bias is not None:
                y += unpack_channels(bias[slot], weights.n)
            if options.act is not None:
                gate, up = unpair(y)
                params = dict(zip(ACT_PARAMS.get(options.act, ()), options.params, strict=False))
                y = apply_act(options.act, gate, up, params)
            out[first : first + count] = y.to(out.dtype)


def scaled_sums(codes: Tensor, act_scale: Tensor, weight_codes: Tensor, weight_scale: Tensor) -> Tensor:
    """Sum int8 codes [rows, k] times weight codes [n, k] group by group, float32 [rows, n]: `mxmoe.quant.matmul`."""
    groups = weight_scale.shape[-1]
    size = STEP if groups > 1 else weight_codes.shape[-1]
    total = torch.zeros((len(codes), len(weight_codes)), dtype=torch.float32, device=codes.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        # exact: the largest sum of a row, 7 * 8 * 2^17 channels, is below 2^24
        exact = codes[:, part].float() @ (weight_codes[:, part].float() - ZERO_CODE).T
        total += exact * (act_scale[:, group, None] * weight_scale[:, group].float())
    return total


def _source(bands: Int4Bands, rows: Tensor) -> Tensor:
    """Token of each sorted row; rows of always-on experts follow those that the router made."""
    flat = bands.row_of[rows].long()
    made = bands.tokens * bands.top_k
    return torch.where(flat < made, flat // bands.top_k, (flat - made) % max(bands.tokens, 1))


def _fault(
    x: Tensor, x_scale: Tensor, weights: PackedInt4, bands: Int4Bands, out: Tensor, options: Int4Options
) -> str | None:
    """Say what does not fit, or None."""
    heights = {height for _, height in bands.classes}
    if not heights or not heights <= set(HEIGHTS):
        return f"tiles are {sorted(heights)} rows high; heights are {', '.join(map(str, HEIGHTS))}"
    groups = 1 if weights.scheme.group_size is None else weights.steps
    width = weights.n if options.act is None else weights.n // 2
    wanted = {
        "x": (x, torch.int32, weights.steps * STEP // 8),
        "x_scale": (x_scale, torch.float32, groups),
        "out": (out, out.dtype, width),
    }
    for name, (tensor, dtype, columns) in wanted.items():
        if tensor.dtype != dtype or tensor.dim() != 2 or tensor.shape[1] != columns or not tensor.is_contiguous():
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not contiguous {dtype} [rows, {columns}]"
    if len(x) != len(x_scale):
        return f"x has {len(x)} rows and x_scale {len(x_scale)}"
    return None
