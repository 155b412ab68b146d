"""
The tile scheduler: from `top_k_index` alone to the tables that a grouped GEMM walks, on the device, in 1 or 2 launches.

Sizes are fixed before (`Dispatch`), nothing waits for the host, and equal routings give equal tables: rows keep their
flat order within an expert, whatever runs first. Two ways:

- *few rows*: one launch. Program 0 counts and builds classes and bands; each other program places a block of flat rows
  by counting the assignments that come before each (smaller expert, or the same and earlier), so no program waits for
  another. `kernels_schedule.schedule_part` is this as a device function, to be run by the first `few_programs` programs
  of a kernel that does something else in the others.
- *many rows*: two launches. Blocks of assignments are counted; then every program sums the counts of all blocks for
  itself, and places a block of rows or builds every PARTS-th band of each expert.

The order of tiles within a class: groups of `depth` bands; in a group band fastest, then column, so that tiles that run
together share both rows and columns of weights in the second-level cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton.dispatch import Dispatch, Tables, power_of_two_from
from mxmoe.backends.triton.kernels_schedule import count_kernel, few_kernel, many_kernel
from mxmoe.backends.triton.mode import overlap, ptx_of
from mxmoe.errors import BadDispatch

FEW_ASSIGNMENTS = 2048
"""Up to here one launch: its work is the square of the assignments."""
FEW_ROWS, FEW_CHUNK = 32, 256
"""Flat rows of a program that places few, and assignments that it compares them with at a time."""
MANY_ROWS, MANY_CHUNK, MANY_COUNTS = 256, 32, 2048
"""Assignments of a block, those compared at a time, and counts of blocks summed at a time where there are many."""
PARTS = 8
"""Programs that share the bands where there are many rows."""
FEW_WARPS, MANY_WARPS = 8, 4


def few_programs(dispatch: Dispatch) -> int:
    """Programs of `few_kernel`, and first program that a fused kernel has for itself."""
    return 1 + -(-dispatch.rows // FEW_ROWS)


def few_arguments(tables: Tables, top_k_index: Tensor) -> tuple[Any, ...]:
    """Arguments of `few_kernel`, in order: three addresses, five numbers, nine constants."""
    dispatch = tables.dispatch
    numbers = (dispatch.assignments, dispatch.tokens, dispatch.row_stride, *_bounds(dispatch))
    sizes = (dispatch.experts, dispatch.always, dispatch.expert_width, dispatch.class_width)
    head = dispatch.places["row_of"][0]
    # all assignments in one go where one program counts them; few sizes, so that few kernels are compiled
    count = max(FEW_CHUNK, power_of_two_from(min(dispatch.assignments, FEW_ASSIGNMENTS)))
    return (
        *(top_k_index, tables.words, tables.constants, *numbers),
        *(*sizes, head, len(dispatch.tilings), FEW_ROWS, FEW_CHUNK, count),
    )


def _bounds(dispatch: Dispatch) -> tuple[int, int]:
    """Bands of the first tiling, and of the second or 0."""
    return dispatch.bands(0), dispatch.bands(1) if len(dispatch.tilings) > 1 else 0


def allocate(dispatch: Dispatch, device: torch.device | str, *, few_assignments: int = FEW_ASSIGNMENTS) -> Tables:
    """
    Make room for a schedule; once, before a graph is captured.

    Beyond `few_assignments` assignments `build` takes two launches, and the room has the scratch that they need.
    """
    blocks = 0 if dispatch.assignments <= few_assignments else -(-dispatch.assignments // MANY_ROWS)
    return Tables(
        dispatch,
        words=torch.zeros(dispatch.words, dtype=torch.int32, device=device),
        constants=dispatch.constants().to(device),
        scratch=torch.zeros(blocks * dispatch.expert_width, dtype=torch.int32, device=device),
    )


def build(tables: Tables, top_k_index: Tensor) -> None:
    """
    Fill the tables from a routing: one launch for few assignments, two for many; nothing is read back.

    Args:
        tables: from `allocate`, on the device of the routing.
        top_k_index: int64 or int32 [tokens, top_k], contiguous; ids outside 0 to experts - 1 are padding.

    Raises:
        BadDispatch: a routing of another shape, type or device.
    """
    dispatch = tables.dispatch
    _check(tables, top_k_index)
    arguments, device = few_arguments(tables, top_k_index), tables.words.device
    if not tables.scratch.numel():
        _launch(device, FEW_WARPS, few_kernel, few_programs(dispatch), *arguments)
        return
    blocks = -(-dispatch.assignments // MANY_ROWS)
    always_blocks = -(-dispatch.always * dispatch.tokens // MANY_ROWS)
    sizes = (dispatch.experts, dispatch.always, dispatch.expert_width)
    _launch(
        *(device, MANY_WARPS, count_kernel, blocks, top_k_index, tables.scratch),
        *(dispatch.assignments, dispatch.tokens, *sizes, MANY_ROWS),
    )
    programs = PARTS + blocks + always_blocks
    _launch(
        *(device, MANY_WARPS, many_kernel, programs, *arguments[:3], tables.scratch, *arguments[3:8]),
        *(blocks, *arguments[8:14], MANY_ROWS, MANY_CHUNK, max(16, MANY_COUNTS // dispatch.expert_width), PARTS),
    )


def _launch(device: torch.device, warps: int, kernel: Any, programs: int, *arguments: object) -> None:  # noqa: ANN401  # Triton's kernels are untyped
    kernel[(programs,)](*arguments, ptx_of(device), num_warps=warps, **overlap(device))


def _check(tables: Tables, index: Tensor) -> None:
    dispatch = tables.dispatch
    wanted = (dispatch.tokens, dispatch.top_k)
    if tuple(index.shape) != wanted or index.dtype not in (torch.int64, torch.int32) or not index.is_contiguous():
        found = f"{index.dtype} {list(index.shape)}"
        raise BadDispatch(reason=f"top_k_index is {found}, and not contiguous int64 or int32 {list(wanted)}")
    if index.device != tables.words.device:
        raise BadDispatch(reason=f"top_k_index is on {index.device} and the tables are on {tables.words.device}")


def build_reference(tables: Tables, top_k_index: Tensor) -> None:
    """Fill the tables as `build` does, by the definition: a stable sort, and a walk over experts and classes."""
    dispatch = tables.dispatch
    _check(tables, top_k_index)
    tables.words.zero_()
    experts, lanes, tokens = dispatch.experts, dispatch.lanes, dispatch.tokens
    flat = top_k_index.reshape(-1).to(torch.int64)
    flat = torch.where((flat >= 0) & (flat < experts), flat, lanes)
    always = torch.arange(experts, lanes, device=flat.device).repeat_interleave(tokens)
    ids = torch.cat([flat, always])
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=lanes + 1)[:lanes]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=flat.device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tables.table("counts").copy_(counts)
    tables.table("offsets").copy_(offsets)
    tables.table("row_of").copy_(order)
    tables.table("place_of").copy_(torch.where(ids == lanes, -1, place))
    for which in range(len(dispatch.tilings)):
        _bands_reference(tables, which, counts.tolist(), offsets.tolist())


def _bands_reference(tables: Tables, which: int, counts: list[int], offsets: list[int]) -> None:
    """Bands of one tiling: the tallest height as often as it fits, then one that covers the rest."""
    tiling = tables.dispatch.tilings[which]
    bands: list[tuple[int, int, int]] = []
    class_band, class_tile = [0], [0]
    for one in tiling.classes:
        tallest = tiling.heights[one.group][-1]
        for expert, (count, offset) in enumerate(zip(counts, offsets[:-1], strict=True)):
            if tiling.group[expert] != one.group:
                continue
            full, rest = divmod(count, tallest)
            if one.height == tallest:
                bands += [(expert, offset + at * tallest, tallest) for at in range(full)]
            last = min(height for height in tiling.heights[one.group] if height >= rest)
            if full and one.group in tiling.together:
                last = tallest
            if rest and one.height == last:
                bands.append((expert, offset + full * tallest, rest))
        class_band.append(len(bands))
        class_tile.append(class_tile[-1] + (class_band[-1] - class_band[-2]) * one.n_tiles)
    device = tables.words.device
    tables.table("class_band", which).copy_(torch.tensor(class_band, device=device))
    tables.table("class_tile", which).copy_(torch.tensor(class_tile, device=device))
    for name, column in zip(("band_expert", "band_row", "band_rows"), range(3), strict=True):
        values = torch.tensor([band[column] for band in bands], dtype=torch.int32, device=device)
        tables.table(name, which)[: len(bands)] = values


def tile_in_class_reference(local: int, bands: int, n_tiles: int, depth: int) -> tuple[int, int]:
    """`tile_in_class`, by the definition: write the order down and look it up."""
    groups = [range(start, min(start + depth, bands)) for start in range(0, bands, depth)]
    return [(band, column) for group in groups for column in range(n_tiles) for band in group][local]


def tile_at_reference(tables: Tables, which: int, tile: int, depth: int) -> tuple[int, int, int]:
    """`tile_at`, by the definition: (class, band, column) of a tile."""
    class_band, class_tile = tables.table("class_band", which).tolist(), tables.table("class_tile", which).tolist()
    found = max(at for at, first in enumerate(class_tile[:-1]) if first <= tile)
    bands, n_tiles = class_band[found + 1] - class_band[found], tables.dispatch.tilings[which].classes[found].n_tiles
    band, column = tile_in_class_reference(tile - class_tile[found], bands, n_tiles, depth)
    return found, class_band[found] + band, column
