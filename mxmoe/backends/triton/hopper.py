"""
Many rows per expert on sm_90: when `kernels_hopper.py` runs, in which tiles, and the launches.

The tiles are those of the schedule, in classes of 128 and 64 rows. Experts of one scheme have a launch of their own, so
a block of mixed schemes has as many launches as it has runs of classes of one scheme; with many rows each of them fills
the machine. Rows are read in sorted order: where they come by token they are copied there first.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mxmoe.backends.triton import kernels, kernels_hopper
from mxmoe.backends.triton.dispatch import Tables, TileClass
from mxmoe.backends.triton.layout import ALIGN, KINDS, body_of
from mxmoe.backends.triton.mode import interpreting, programs_at_once
from mxmoe.backends.triton.operands import Epilogue, Matrices, Rows
from mxmoe.backends.triton.tiles import DIVIDED_WARPS, Config, Gemm, Shape, classes_of
from mxmoe.ir import Scheme

WARPS = DIVIDED_WARPS
"""Warps of a program: two warpgroups that multiply, and one of which a warp loads."""
ENOUGH_ROWS = 96.0
"""Rows of a mean active expert from which these kernels are faster, the copy to sorted rows included."""
DENSE_STAGES, NIBBLE_STAGES = 4, 8
"""Buffers in flight: what shared memory holds."""
REGISTERS = 168
"""Of a thread at the start: 64 K by all warps. The loading warpgroup hands its own on to the others."""
ROWS, CHANNELS = 128, 256
"""Rows of a tile, and channels of one of dense weights, both matrices together."""
_ELEMENTS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.uint8: gl.uint8,
}


def fits(scheme: Scheme) -> bool:
    """Say whether a kernel here multiplies a scheme: dense weights, or 4-bit ones against rows with one scale each."""
    body = body_of(scheme)
    return body == "dense" or (body == "nibbles" and scheme.act_group_size is None)


def config_for(gemm: Gemm) -> Config | None:
    """Give the tiles of these kernels, or None where they do not multiply a scheme, or a row is no whole 16 bytes."""
    rows = {kind.dtype.itemsize * gemm.k for kind in gemm.row_kinds}
    if getattr(gemm, "always", None) is not None or not all(map(fits, gemm.distinct)) or any(one % 16 for one in rows):
        return None
    return Config(WARPS, tuple((str(scheme), _shape(scheme, gemm)) for scheme in gemm.distinct), per_sm=1)


def _shape(scheme: Scheme, gemm: Gemm) -> Shape:
    """What is left of an expert's rows comes last, as tiles that cost half."""
    heights, sides = (ROWS // 2, ROWS), 1 + gemm.gated
    if body_of(scheme) == "dense":
        return Shape(heights, CHANNELS // sides, 64 if scheme.act_bits == 16 else 128, DENSE_STAGES)
    return Shape(heights, CHANNELS // 2 // sides, 128, NIBBLE_STAGES)


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
    *, gather: bool, compile_only: bool = False,
) -> None:  # fmt: skip
    """Multiply every scheduled row by its expert's weights: arguments and result of `launch.run_gemm`."""
    tiling, specs = classes_of(matrices.gemm, config)
    if gather:
        rows = sort_rows(rows, tables, compile_only=compile_only)
    at = 0
    for _, classes in groupby(tiling.classes, key=_group):
        count = len(list(classes))
        _launch(matrices, config, rows, tables, which, out, epilogue, specs[at], (at, count), compile_only)
        at += count


def _group(one: TileClass) -> int:
    return one.group


def sort_rows(rows: Rows, tables: Tables, *, compile_only: bool = False) -> Rows:
    """Copy rows by token to where they lie sorted by expert; what belongs to no expert stays undefined."""
    dispatch = tables.dispatch
    made: list[tuple[Tensor, Tensor]] = []
    for codes, scales in zip(rows.codes, rows.scales, strict=True):
        k = codes.shape[1]
        sorted_codes = torch.empty((dispatch.rows, k), dtype=codes.dtype, device=codes.device)
        sorted_scales = scales.new_empty((dispatch.rows if scales.numel() else 0, 1))
        words = k * codes.itemsize // 4
        kernel: Any = kernels_hopper.spread
        start = partial(kernel.warmup, grid=(dispatch.tokens,)) if compile_only else kernel[(dispatch.tokens,)]
        start(
            codes.view(torch.int32), scales, tables.table("place_of"), sorted_codes.view(torch.int32), sorted_scales,
            dispatch.assignments, dispatch.tokens, words, triton.next_power_of_2(words), dispatch.top_k,
            dispatch.always, scales.numel() > 0, num_warps=4 if words <= 2048 else 8,
        )  # fmt: skip
        made.append((sorted_codes, sorted_scales))
    return Rows(tuple(codes for codes, _ in made), tuple(scales for _, scales in made))


def _launch(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    spec: tuple[int, ...], classes: tuple[int, int], compile_only: bool,
) -> None:  # fmt: skip
    """Run the classes of one scheme: `spec` of the first, (place of the first, their number)."""
    gemm, dispatch, arena = matrices.gemm, tables.dispatch, matrices.arena
    field = dict(zip(kernels.FIELDS, spec, strict=True))
    codes, scales = (made[field["row_kind"]] for made in (rows.codes, rows.scales))
    dense = field["kind"] == KINDS.index("dense")
    columns = -(-gemm.n // field["width"])
    programs = min(programs_at_once(out.device), dispatch.bands(which) * columns)
    if not programs or not len(codes):
        return
    fixed = (
        *(gemm.n, gemm.k, len(gemm.schemes), *classes, columns, config.grouping),
        *(DENSE_STAGES if dense else NIBBLE_STAGES, int(gemm.gated), field["group"], int(matrices.bias is not None)),
        *(epilogue.act, *epilogue.pair),
    )
    kernel: Any = kernels_hopper.dense_gemm if dense else kernels_hopper.nibble_gemm
    descriptors = _dense_operands(codes, matrices) if dense else _nibble_operands(codes, matrices)
    start = partial(kernel.warmup, grid=(programs,)) if compile_only else kernel[(programs,)]
    start(
        *descriptors, arena.data, arena.base, scales if matrices.bias is None else matrices.bias, scales, out,
        tables.words[dispatch.places[f"class_band{which}"][0] :],
        tables.words[dispatch.places[f"band_expert{which}"][0] :], dispatch.bands(which), fixed,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def _layout(box: list[int], dtype: torch.dtype) -> Any:  # noqa: ANN401  # a class that Triton does not type
    return NVMMASharedLayout.get_default_for(box, _ELEMENTS[dtype])


def _dense_operands(codes: Tensor, matrices: Matrices) -> tuple[Any, ...]:
    """Describe rows [*, k], and the arena as overlapping matrices [*, n, k], one from every ALIGN bytes on."""
    n, k, size = matrices.gemm.n, matrices.gemm.k, codes.itemsize
    box = [ROWS, 128 // size]
    weights = matrices.arena.data.view(codes.dtype)
    slots = -(-matrices.arena.data.numel() // ALIGN)
    return (
        TensorDescriptor(codes, list(codes.shape), [k, 1], box, _layout(box, codes.dtype)),
        TensorDescriptor(weights, [slots, n, k], [ALIGN // size, k, 1], [1, *box], _layout([1, *box], codes.dtype)),
    )


def _nibble_operands(codes: Tensor, matrices: Matrices) -> tuple[Any, ...]:
    """Describe rows [*, k], and the arena as rows of a unit's payload and of its scales."""
    data = matrices.arena.data
    payload, scales = data.view(-1, 64), data.view(torch.bfloat16).view(-1, 64)
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
    return (
        TensorDescriptor(codes, list(codes.shape), [codes.shape[1], 1], [ROWS, 64], _layout([ROWS, 64], codes.dtype)),
        TensorDescriptor(payload, list(payload.shape), [64, 1], [64, 64], _layout([64, 64], torch.uint8)),
        TensorDescriptor(scales, list(scales.shape), [64, 1], [1, 64], plain),
    )
