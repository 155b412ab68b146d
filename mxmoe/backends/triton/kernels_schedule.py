"""
The kernels of the tile scheduler: counting assignments by expert, placing rows, cutting experts into bands of tiles.

What is built, and by which launches, says `schedule`; `schedule_part` and `place_few` are parts of it as device
functions, for kernels that do something else in other programs. All pointers are to int32, but that to the routing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxmoe.backends.triton.interpreter import mend_interpreter
from mxmoe.backends.triton.kernels_chain import wait_and_lead

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
    below_beside = tl.load(class_ptr + 5 * CP + c)[:, None]
    mine = group[:, None] == tl.load(group_ptr + e)[None, :]
    full = counts[None, :] >> shift
    rest = counts[None, :] - (full << shift)
    is_tallest = (height >> shift) == 1
    partial = ((rest > tl.where(full > 0, below_beside, below)) & (rest <= height)).to(tl.int32)
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
            counts, offsets, constants_ptr + EP, class_ptr + 6 * CP, ends_ptr + 2 * CP, band_ptr + 3 * bands0, bands1,
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
    CHUNK: tl.constexpr, COUNT: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """The whole schedule in one launch of `few_programs(dispatch)`."""
    wait_and_lead(PTX)
    schedule_part(
        tl.program_id(0), index_ptr, words_ptr, constants_ptr, rows, tokens, row_stride, bands0, bands1,
        E, ALWAYS, EP, CP, HEAD, SETS, ROWS, CHUNK, COUNT,
    )  # fmt: skip


@triton.jit
def count_kernel(
    index_ptr: tl.tensor, scratch_ptr: tl.tensor, rows: tl.tensor, tokens: tl.tensor, E: tl.constexpr,
    ALWAYS: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Many rows, first launch: scratch [blocks, EP] = assignments of a block by expert."""
    wait_and_lead(PTX)
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
    PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Many rows, second launch: bands in the first PART_COUNT programs, a block of rows in each other."""
    wait_and_lead(PTX)
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
    classes in the constants, which begin after the groups: SETS * EP words, plus 6 * CP for the second tiling.
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
