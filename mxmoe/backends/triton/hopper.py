"""
The divided kernel of sm_90: which GEMMs it multiplies, in which tiles, and its launch.

The tiles are those of the schedule, in classes of 16 to 128 rows; experts of all schemes share one launch. Rows are
read in sorted order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mxmoe.backends.triton import kernels_hopper
from mxmoe.backends.triton.dispatch import WALK, Dispatch, Tables
from mxmoe.backends.triton.hopper_runs import (
    CHANNELS,
    HEIGHTS,
    LOW_BOX,
    MOST_OPERANDS,
    NARROW_WIDTH,
    NIBBLES,
    STAGES,
    TALL_BOX,
    WIDE,
    Operands,
    operands_for,
    operands_of,
    runs,
)
from mxmoe.backends.triton.kernels_hopper_ring import FIELDS
from mxmoe.backends.triton.layout import ALIGN, body_of
from mxmoe.backends.triton.mode import interpreting, overlap, programs_at_once
from mxmoe.backends.triton.operands import Epilogue, Matrices, Rows
from mxmoe.backends.triton.tiles import ALWAYS, DIVIDED_WARPS, Config, Gemm, Shape
from mxmoe.ir import Scheme

WARPS = DIVIDED_WARPS
"""Warps of a program: two warpgroups that multiply, and one of which a warp loads."""
WIDE_HEIGHTS = (HEIGHTS, (64, 128), (32, 64), (16,))
NARROW_HEIGHTS = (HEIGHTS, (64, 128), (16, 32, 64), (64,))
"""Those worth measuring in one launch, where tiles of 64 rows are wide and where they are narrow."""
TOGETHER_HEIGHTS = (HEIGHTS, (64, 128))
"""Those worth measuring where an expert that fills a tile of 128 rows has all its rows in such tiles."""
BACKS = (2, 3)
"""
Every how manieth program may begin with low tiles (`Config.back`), where a launch has several bodies; the first of
them also where all weights have 4 bits and scales of groups.
"""
ENOUGH_ROWS = {"dense": 1.0, "nibbles": 4.0, "scaled": 4.0}
"""Rows of a mean active expert from which the kernel is taken where nothing was measured, by body."""
LEAST_ROWS, MANY_ROWS = 2.0, 24.0
"""Rows of a mean active expert up to which tiles are the lowest, and beyond which those of dense weights are tall."""
REGISTERS = 168
"""Of a thread at the start: 64 K by all warps. The loading warpgroup hands its own on to the others."""
_ELEMENTS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.uint8: gl.uint8,
}


def fits(scheme: Scheme) -> bool:
    """Say whether the kernel multiplies a scheme: dense weights, or 4-bit ones against rows with one scale."""
    body = body_of(scheme)
    return body in ("dense", "scaled") or (body == "nibbles" and scheme.act_group_size is None)


def config_for(
    gemm: Gemm,
    heights: Sequence[int] = HEIGHTS,
    *,
    is_narrow: bool = False,
    together: bool = False,
    slim: bool = False,
) -> Config | None:
    """
    Give the kernel's tiles of the given heights, or None where it does not multiply the GEMM.

    Tiles of 16 and 32 rows are narrow ones, of half as many channels; those of 64 may be, and those of 128 rows of
    dense weights where `slim`. Experts that fill the tallest tile may be kept `together` in such tiles, but those of
    bodies that are busy with decoding.

    It does not where it has no body for a scheme, where operands are of more kinds than it has rings, or where a row is
    no whole 16 bytes.
    """
    _, always_k = gemm.always or (gemm.n, gemm.k)
    rows = {kind.dtype.itemsize * k for kind in gemm.row_kinds for k in (gemm.k, always_k)}
    if not all(map(fits, gemm.distinct)) or any(one % 16 for one in rows):
        return None
    if len(operands_of(gemm)) > MOST_OPERANDS:
        return None
    tall = tuple(heights)
    shapes = tuple((str(one), _shape(one, gemm, tall, is_narrow, together, slim)) for one in gemm.distinct)
    return Config(WARPS, shapes, per_sm=1)


def by_rule(gemm: Gemm, rows: float) -> Config | None:
    """Choose the tiles for so many rows of a mean active expert; None where the kernel is slower or has no body."""
    bodies = {body_of(scheme) for scheme in gemm.distinct}
    if any(rows < ENOUGH_ROWS.get(body or "", math.inf) for body in bodies):
        return None
    if rows <= LEAST_ROWS:
        return config_for(gemm, HEIGHTS[:1])
    if rows <= MANY_ROWS or "nibbles" in bodies:
        return config_for(gemm)
    return config_for(gemm, HEIGHTS[2:], together=bodies == {"dense"})


def with_always(gemm: Gemm, config: Config, tokens: int) -> Config:
    """Give the expert that sees every token tiles of its own: it has more rows than a mean active one."""
    scheme = gemm.schemes[-1]
    heights = HEIGHTS[:1] if tokens <= HEIGHTS[0] else HEIGHTS
    if tokens > MANY_ROWS and body_of(scheme) != "nibbles":
        heights = HEIGHTS[2:]
    return replace(config, shapes=(*config.shapes, (ALWAYS, _shape(scheme, gemm, heights))))


def candidates(gemm: Gemm) -> tuple[Config, ...]:
    """Tiles worth measuring; none where the kernel does not multiply the GEMM."""
    made = [config_for(gemm, heights) for heights in WIDE_HEIGHTS]
    made += [config_for(gemm, heights, is_narrow=True) for heights in NARROW_HEIGHTS]
    bodies = {body_of(scheme) for scheme in gemm.distinct}
    backs = BACKS if len(bodies) > 1 else BACKS[:1] if bodies == {"nibbles"} else ()
    kept = [partial(config_for, gemm, is_narrow=is_narrow, together=True) for is_narrow in (False, True)]
    if "dense" in bodies:
        kept.append(partial(kept[1], slim=True))
    for make, heights in itertools.product(kept, TOGETHER_HEIGHTS):
        config = make(heights)
        made += [config] if config is None else [replace(config, back=back) for back in (0, *backs)]
    return tuple(dict.fromkeys(config for config in made if config is not None))


def _shape(
    scheme: Scheme,
    gemm: Gemm,
    heights: tuple[int, ...],
    is_narrow: bool = False,
    together: bool = False,
    slim: bool = False,
) -> Shape:
    """What is left of an expert's rows comes last, as tiles that cost less."""
    sides = 1 + gemm.gated
    if body_of(scheme) != "nibbles":
        width = NARROW_WIDTH if is_narrow else CHANNELS
        depth = 64 if scheme.act_bits == 16 else 128
        is_slim = slim and body_of(scheme) == "dense"
        return Shape(heights, width // sides, depth, STAGES[WIDE], together=together, slim=is_slim)
    return Shape(heights, CHANNELS // 2 // sides, 128, STAGES[NIBBLES])


def runs_on(device: torch.device) -> bool:
    """Say whether a device has these instructions."""
    return device.type == "cuda" and not interpreting() and torch.cuda.get_device_capability(device)[0] == 9


def takes(matrices: Matrices, config: Config, out: Tensor, epilogue: Epilogue) -> bool:
    """
    Say whether `run_hopper` computes a launch: tiles of `config_for`, whole sums, one matrix as it is.

    One of two matrices by itself may keep the tiles of both: every second of them then lies beyond the last channel.
    """
    gated = matrices.gemm.gated
    whole = len(out) == 1 and out.is_contiguous() and out.shape[-1] == matrices.gemm.n
    return config.warps == WARPS and whole and (epilogue.act == "none") != gated and runs_on(out.device)


def run_hopper(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, few_next: bool = False, compile_only: bool = False,
) -> None:  # fmt: skip
    """Multiply every scheduled row by its expert's weights, as `launch.run_gemm`; rows are sorted by expert."""
    gemm, dispatch, arena = matrices.gemm, tables.dispatch, matrices.arena
    made = tuple(runs(matrices, config, epilogue))
    columns = max(run[FIELDS.index("columns")] for run in made)
    most = programs_at_once(out.device)
    programs = min(most, dispatch.bands(which) * columns)
    if not programs or not dispatch.rows:
        return
    assert gemm.always is None or matrices.bias is None, "biases of one size"
    none = rows.codes[0].new_empty(0, dtype=torch.float32)
    always = Always.of(gemm, rows, dispatch, out)
    kernel: Any = kernels_hopper.divided_gemm
    start = partial(kernel.warmup, grid=(programs,)) if compile_only else kernel[(programs,)]
    start(
        *_descriptors(gemm, rows, always, arena.data), arena.data, arena.base,
        none if matrices.bias is None else matrices.bias, (*rows.scales, always.scales) if always else rows.scales,
        out, tables.words[dispatch.places[f"class_band{which}"][0] :],
        tables.words[dispatch.places[f"band_expert{which}"][0] :], dispatch.bands(which),
        tables.table("walk")[WALK * which :],
        (tables.table("offsets")[dispatch.experts :], always.out) if always else None,
        int(few_next or programs == most), made,
        num_warps=4, maxnreg=REGISTERS, **overlap(out.device),
    )  # fmt: skip


def _layout(box: list[int], dtype: torch.dtype) -> Any:  # noqa: ANN401  # a class that Triton does not type
    return NVMMASharedLayout.get_default_for(box, _ELEMENTS[dtype])


@dataclass(frozen=True, eq=False)
class Always:
    """
    What the expert that sees every token reads and writes.

    Its rows are sorted as the others' are but between the GEMMs: there they lie behind them, in the order of tokens.
    """

    operands: Operands
    n: int
    k: int
    codes: Tensor
    """Rows of its kind, [*, k]."""
    scales: Tensor
    out: Tensor
    """[tokens, n], where it writes what lies between the GEMMs; else all that the launch writes."""

    @classmethod
    def of(cls, gemm: Gemm, rows: Rows, dispatch: Dispatch, out: Tensor) -> Always | None:
        """Find them in a launch, None where there is no such expert: a gate precedes what lies between the GEMMs."""
        if gemm.always is None:
            return None
        operands = operands_for(gemm, gemm.schemes[-1])
        codes, scales = rows.codes[operands[1]], rows.scales[operands[1]]
        if gemm.gated:
            return cls(operands, *gemm.always, codes, scales, _behind(out, dispatch, gemm.n, gemm.always[0]))
        behind = _behind(codes, dispatch, gemm.k, gemm.always[1])
        return cls(operands, *gemm.always, behind, scales[dispatch.beyond :], out)


def _behind(held: Tensor, dispatch: Dispatch, width: int, own: int) -> Tensor:
    """Rows [tokens, own] behind those of `width` numbers, sorted."""
    return held.view(-1)[dispatch.beyond * width :][: dispatch.tokens * own].view(-1, own)


def _descriptors(gemm: Gemm, rows: Rows, always: Always | None, data: Tensor) -> list[Any]:
    """Descriptors of each kind of operands, None beyond the last, and of the scales of groups."""
    made: list[Any] = []
    operands = operands_of(gemm)
    for one in operands:
        made += _operand_set(one, rows.codes[one[1]].view(-1, gemm.k), gemm.n, gemm.k, data)
    made += [None] * (4 * (MOST_OPERANDS - len(operands)))
    made += _operand_set(always.operands, always.codes, always.n, always.k, data) if always else [None] * 4
    has_scales = any(body == "nibbles" for body, _ in (*operands, *([always.operands] if always else [])))
    return [*made, _by_block(data, torch.bfloat16) if has_scales else None]


def _operand_set(operands: Operands, codes: Tensor, n: int, k: int, data: Tensor) -> list[Any]:
    """Descriptors of rows [*, k], tall and low, and of weights, wide and narrow: or codes, and their multipliers."""
    body, _ = operands
    made = [_rows(codes, [tall, 128 // codes.itemsize]) for tall in (TALL_BOX, LOW_BOX)]
    if body == "dense":
        return [*made, *(_dense(n, k, data.view(codes.dtype), wide) for wide in (128, 64))]
    return [*made, _codes(data), _by_block(data, torch.uint8) if body == "scaled" else None]


def _rows(codes: Tensor, box: list[int]) -> Any:  # noqa: ANN401  # a class that Triton does not type
    return TensorDescriptor(codes, list(codes.shape), [codes.shape[1], 1], box, _layout(box, codes.dtype))


def _dense(n: int, k: int, weights: Tensor, wide: int) -> Any:  # noqa: ANN401
    """Describe the arena as overlapping matrices [*, n, k], one from every ALIGN bytes on."""
    size = weights.itemsize
    slots = -(-weights.numel() * size // ALIGN)
    box = [1, wide, 128 // size]
    return TensorDescriptor(weights, [slots, n, k], [ALIGN // size, k, 1], box, _layout(box, weights.dtype))


def _by_block(data: Tensor, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Describe the arena as numbers of blocks of 64 channels."""
    numbers = data.view(dtype).view(-1, 64)
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)
    return TensorDescriptor(numbers, list(numbers.shape), [64, 1], [1, 64], plain)


def _codes(data: Tensor) -> Any:  # noqa: ANN401
    """Describe the arena as lines of 128 bytes, of which 32 are a block and unit of codes."""
    lines = data.view(-1, 128)
    return TensorDescriptor(lines, list(lines.shape), [128, 1], [32, 128], _layout([32, 128], torch.uint8))
