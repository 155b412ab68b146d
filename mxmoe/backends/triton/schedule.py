"""
The tile scheduler: from `top_k_index` alone to the tables that a grouped GEMM walks, on the device, in 1 or 2 launches.

Sizes are fixed before (`Dispatch`), nothing waits for the host, and equal routings give equal tables: rows keep their
flat order within an expert, whatever runs first. Two ways:

- *few rows*: one launch. Program 0 counts and builds classes and bands; each other program places a block of flat rows
  by counting the assignments that come before each (smaller expert, or the same and earlier), so no program waits for
  another. `schedule_part` is this as a device function, to be run by the first `few_programs` programs of a kernel that
  does something else in the others.
- *many rows*: two launches. Blocks of assignments are counted; then every program sums the counts of all blocks for
  itself, and places a block of rows or builds every PARTS-th band of each expert.

The order of tiles within a class: groups of `depth` bands; in a group band fastest, then column, so that tiles that run
together share both rows and columns of weights in the second-level cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxmoe.backends.triton.dispatch import Dispatch, Tables, power_of_two_from
from mxmoe.backends.triton.interpreter import mend_interpreter
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

mend_interpreter()


@triton.jit
def _expert_of(
    index_ptr: tl.tensor, i: tl.tensor, rows: tl.tensor, tokens: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Id of the expert of flat rows `i`; E + ALWAYS for padding."""
    raw = tl.load(index_ptr + i, mask=i < rows, other=-1)
    routed = tl.where((raw >= 0) & (raw < E), raw, E + ALWAYS).to(tl.int32)
    return tl.where(i < rows, routed, E + (i - rows) // tl.maximum(tokens, 1))


@triton.jit
def _count(
    index_ptr: tl.tensor, first: tl.tensor, last: tl.tensor, tokens: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr,
    EP: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Assignments first to last, counted by expert; int32 [EP], padding at E + ALWAYS."""
    counts = tl.zeros([EP], tl.int32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        raw = tl.load(index_ptr + i, mask=i < last, other=-1)
        routed = tl.where((raw >= 0) & (raw < E), raw, E + ALWAYS).to(tl.int32)
        counts += tl.histogram(routed, EP)
    return counts


@triton.jit
def _counts_of_all(
    counts: tl.tensor, tokens: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr, EP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Strike off the padding and let always-on experts see every token."""
    e = tl.arange(0, EP)
    return tl.where(e < E, counts, tl.where(e < E + ALWAYS, tokens, 0))


@triton.jit
def _bands(
    counts: tl.tensor, offsets: tl.tensor, group_ptr: tl.tensor, class_ptr: tl.tensor, ends_ptr: tl.tensor,
    band_ptr: tl.tensor, bands: tl.tensor, part: tl.tensor, parts: tl.tensor, EP: tl.constexpr, CP: tl.constexpr,
) -> None:  # fmt: skip
    """Classes of one tiling, and of each expert's bands every `parts`-th, from `part` on."""
    e = tl.arange(0, EP)
    c = tl.arange(0, CP)
    group = tl.load(class_ptr + c)
    height = tl.load(class_ptr + CP + c)[:, None]
    below = tl.load(class_ptr + 2 * CP + c)[:, None]
    shift = tl.load(class_ptr + 3 * CP + c)[:, None]
    n_tiles = tl.load(class_ptr + 4 * CP + c)
    mine = group[:, None] == tl.load(group_ptr + e)[None, :]
    full = counts[None, :] >> shift
    rest = counts[None, :] - (full << shift)
    is_tallest = (height >> shift) == 1
    partial = ((rest > below) & (rest <= height)).to(tl.int32)
    n = tl.where(mine, tl.where(is_tallest, full, 0) + partial, 0)
    totals = tl.sum(n, 1)
    first = tl.cumsum(totals, 0) - totals
    if part == 0:
        tiles = totals * n_tiles
        tl.store(ends_ptr + c, first)
        tl.store(ends_ptr + CP + c, tl.cumsum(tiles, 0) - tiles)
    at = first[:, None] + tl.cumsum(n, 1) - n
    taken = tl.where(is_tallest, 0, full << shift)
    for i in range(part, tl.max(tl.max(n, 1), 0), parts):
        row = taken + i * height
        to = band_ptr + at + i
        tl.store(to, tl.broadcast_to(e[None, :], [CP, EP]), mask=i < n)
        tl.store(to + bands, offsets[None, :] + row, mask=i < n)
        tl.store(to + 2 * bands, tl.minimum(counts[None, :] - row, height), mask=i < n)


@triton.jit
def _tables(
    counts: tl.tensor, words_ptr: tl.tensor, constants_ptr: tl.tensor, row_stride: tl.tensor, bands0: tl.tensor,
    bands1: tl.tensor, part: tl.tensor, parts: tl.tensor, LANES: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr,
    HEAD: tl.constexpr, SETS: tl.constexpr,
) -> None:  # fmt: skip
    """Everything but the rows."""
    e = tl.arange(0, EP)
    offsets = tl.cumsum(counts, 0) - counts
    ends_ptr = words_ptr + 2 * EP
    band_ptr = words_ptr + HEAD + 2 * row_stride
    if part == 0:
        tl.store(words_ptr + e, counts, mask=e < LANES)
        tl.store(words_ptr + EP + e, offsets, mask=e <= LANES)
        tl.store(band_ptr + 3 * (bands0 + bands1) + tl.arange(0, 8), tl.zeros([8], tl.int32))
    class_ptr = constants_ptr + SETS * EP
    _bands(counts, offsets, constants_ptr, class_ptr, ends_ptr, band_ptr, bands0, part, parts, EP, CP)
    if SETS == 2:
        _bands(
            counts, offsets, constants_ptr + EP, class_ptr + 5 * CP, ends_ptr + 2 * CP, band_ptr + 3 * bands0, bands1,
            part, parts, EP, CP,
        )  # fmt: skip


@triton.jit
def place_few(
    index_ptr: tl.tensor, i: tl.tensor, rows: tl.tensor, tokens: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Say which expert flat rows `i` belong to, and their places: how many (expert, position) are smaller."""
    own = _expert_of(index_ptr, i, rows, tokens, E, ALWAYS)
    key = own * rows + tl.where(i < rows, i, 0)
    place = tl.where(i < rows, tl.where(own == E + ALWAYS, ALWAYS * tokens, 0), i - rows)
    for start in range(0, rows, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = _expert_of(index_ptr, j, rows, tokens, E, ALWAYS) * rows + j
        sooner = (other[None, :] < key[:, None]) & (j < rows)[None, :]
        place += tl.sum(sooner.to(tl.int32), 1)
    return own, place


@triton.jit
def _place_few(
    index_ptr: tl.tensor, words_ptr: tl.tensor, block: tl.tensor, rows: tl.tensor, tokens: tl.tensor,
    row_stride: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Place ROWS flat rows."""
    i = block * ROWS + tl.arange(0, ROWS)
    own, place = place_few(index_ptr, i, rows, tokens, E, ALWAYS, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    inside = i < rows + ALWAYS * tokens
    tl.store(words_ptr + HEAD + place, i, mask=inside)
    tl.store(words_ptr + HEAD + row_stride + i, tl.where(own == E + ALWAYS, -1, place), mask=inside)


@triton.jit
def schedule_part(
    program: tl.tensor, index_ptr: tl.tensor, words_ptr: tl.tensor, constants_ptr: tl.tensor, rows: tl.tensor,
    tokens: tl.tensor, row_stride: tl.tensor, bands0: tl.tensor, bands1: tl.tensor, E: tl.constexpr,
    ALWAYS: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, HEAD: tl.constexpr, SETS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """What program 0 to `few_programs(dispatch) - 1` does; arguments are those of `few_arguments`, in order."""
    if program == 0:
        counts = _count(index_ptr, 0, rows, tokens, E, ALWAYS, EP, COUNT)
        counts = _counts_of_all(counts, tokens, E, ALWAYS, EP)
        _tables(
            counts, words_ptr, constants_ptr, row_stride, bands0, bands1, 0, 1, E + ALWAYS, EP, CP, HEAD, SETS
        )  # fmt: skip
    else:
        _place_few(index_ptr, words_ptr, program - 1, rows, tokens, row_stride, E, ALWAYS, HEAD, ROWS, CHUNK)


@triton.jit
def few_kernel(
    index_ptr: tl.tensor, words_ptr: tl.tensor, constants_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor,
    row_stride: tl.tensor, bands0: tl.tensor, bands1: tl.tensor, E: tl.constexpr, ALWAYS: tl.constexpr,
    EP: tl.constexpr, CP: tl.constexpr, HEAD: tl.constexpr, SETS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """The whole schedule in one launch of `few_programs(dispatch)`."""
    schedule_part(
        tl.program_id(0), index_ptr, words_ptr, constants_ptr, rows, tokens, row_stride, bands0, bands1,
        E, ALWAYS, EP, CP, HEAD, SETS, ROWS, CHUNK, COUNT,
    )  # fmt: skip


@triton.jit
def count_kernel(
    index_ptr: tl.tensor, scratch_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor, E: tl.constexpr,
    ALWAYS: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Many rows, first launch: scratch [blocks, EP] = assignments of a block by expert."""
    block = tl.program_id(0)
    last = tl.minimum((block + 1) * BLOCK, rows)
    counts = _count(index_ptr, block * BLOCK, last, tokens, E, ALWAYS, EP, BLOCK)
    # lanes beyond the last assignment were counted as padding
    e = tl.arange(0, EP)
    surplus = (block + 1) * BLOCK - last
    tl.store(scratch_ptr + block * EP + e, counts - tl.where(e == E + ALWAYS, surplus, 0))


@triton.jit
def _place_many(
    index_ptr: tl.tensor, words_ptr: tl.tensor, total: tl.tensor, before: tl.tensor, block: tl.tensor,
    blocks: tl.tensor, rows: tl.tensor, tokens: tl.tensor, row_stride: tl.tensor, E: tl.constexpr,
    ALWAYS: tl.constexpr, EP: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Place a block: of assignments below `blocks`, of always-on rows from there on."""
    e = tl.arange(0, EP)
    row_of = words_ptr + HEAD
    if block < blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)
        own = _expert_of(index_ptr, i, rows, tokens, E, ALWAYS)
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, rows), CHUNK):
            j = start + tl.arange(0, CHUNK)
            other = _expert_of(index_ptr, j, rows, tokens, E, ALWAYS)
            sooner = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
            rank += tl.sum(sooner.to(tl.int32), 1)
        all_counts = tl.where((e >= E) & (e < E + ALWAYS), tokens, total)
        begin = tl.cumsum(all_counts, 0) - all_counts + before
        inside = i < rows
        # always-on ids of lanes beyond the last assignment may exceed the table
        place = tl.gather(begin, tl.where(inside, own, 0), 0) + rank
        tl.store(row_of + place, i, mask=inside)
        tl.store(row_of + row_stride + i, tl.where(own == E + ALWAYS, -1, place), mask=inside)
    else:
        step = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        place = tl.sum(tl.where(e < E, total, 0), 0) + step
        inside = step < ALWAYS * tokens
        tl.store(row_of + place, rows + step, mask=inside)
        tl.store(row_of + row_stride + rows + step, place, mask=inside)


@triton.jit
def many_kernel(
    index_ptr: tl.tensor, words_ptr: tl.tensor, constants_ptr: tl.tensor, scratch_ptr: tl.tensor, rows: tl.tensor,
    tokens: tl.tensor, row_stride: tl.tensor, bands0: tl.tensor, bands1: tl.tensor, blocks: tl.tensor,
    E: tl.constexpr, ALWAYS: tl.constexpr, EP: tl.constexpr, CP: tl.constexpr, HEAD: tl.constexpr, SETS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr, PART_COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Many rows, second launch: bands in the first PART_COUNT programs, a block of rows in each other."""
    program = tl.program_id(0)
    block = program - PART_COUNT
    e = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    before = tl.zeros([EP], tl.int32)
    for start in range(0, blocks, BLOCKS):
        b = start + tl.arange(0, BLOCKS)
        found = tl.load(scratch_ptr + b[:, None] * EP + e[None, :], mask=(b < blocks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((b < block)[:, None], found, 0), 0)
    if program < PART_COUNT:
        counts = _counts_of_all(total, tokens, E, ALWAYS, EP)
        _tables(
            counts, words_ptr, constants_ptr, row_stride, bands0, bands1, program, PART_COUNT,
            E + ALWAYS, EP, CP, HEAD, SETS,
        )  # fmt: skip
    else:
        _place_many(
            index_ptr, words_ptr, total, before, block, blocks, rows, tokens, row_stride,
            E, ALWAYS, EP, HEAD, BLOCK, CHUNK,
        )  # fmt: skip


@triton.jit
def tile_in_class(
    local: tl.tensor, bands: tl.tensor, n_tiles: tl.tensor, DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Tile `local` of a class of `bands` bands -> (band within the class, column); inside a group bands go first."""
    held = DEPTH * n_tiles
    group = local // held
    inside = local - group * held
    size = tl.minimum(bands - group * DEPTH, DEPTH)
    return group * DEPTH + inside % size, inside // size


@triton.jit
def tile_at(
    tile: tl.tensor, ends_ptr: tl.tensor, class_ptr: tl.tensor, CP: tl.constexpr, DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """
    Tile of a launch -> (class, band, column).

    `ends_ptr` is the address of `class_band`, which `class_tile` follows after CP words; `class_ptr` that of the
    classes in the constants, which begin after the groups: SETS * EP words, plus 5 * CP for the second tiling.
    """
    c = tl.arange(0, CP)
    first_tile = tl.load(ends_ptr + CP + c)
    # empty classes share the start of the next, so the last class that starts at or before the tile holds it
    found = tl.sum(((first_tile <= tile) & (c > 0)).to(tl.int32), 0)
    first = tl.load(ends_ptr + found)
    bands = tl.load(ends_ptr + found + 1) - first
    local = tile - tl.load(ends_ptr + CP + found)
    band, column = tile_in_class(local, bands, tl.load(class_ptr + 4 * CP + found), DEPTH)
    return found, first + band, column


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
    arguments = few_arguments(tables, top_k_index)
    if not tables.scratch.numel():
        _launch(FEW_WARPS, few_kernel, few_programs(dispatch), *arguments)
        return
    blocks = -(-dispatch.assignments // MANY_ROWS)
    always_blocks = -(-dispatch.always * dispatch.tokens // MANY_ROWS)
    sizes = (dispatch.experts, dispatch.always, dispatch.expert_width)
    _launch(
        *(MANY_WARPS, count_kernel, blocks, top_k_index, tables.scratch),
        *(dispatch.assignments, dispatch.tokens, *sizes, MANY_ROWS),
    )
    _launch(
        *(MANY_WARPS, many_kernel, PARTS + blocks + always_blocks, *arguments[:3], tables.scratch, *arguments[3:8]),
        *(blocks, *arguments[8:14], MANY_ROWS, MANY_CHUNK, max(16, MANY_COUNTS // dispatch.expert_width), PARTS),
    )


def _launch(warps: int, kernel: Any, programs: int, *arguments: object) -> None:  # noqa: ANN401  # Triton's kernels are untyped
    kernel[(programs,)](*arguments, num_warps=warps)


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
    """Bands of one tiling: the tallest height as often as it fits, then the smallest that covers the rest."""
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
            if rest and one.height == min(height for height in tiling.heights[one.group] if height >= rest):
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
