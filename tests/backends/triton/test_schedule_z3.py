"""Proof that bands cover every row once, for all counts; and the same formulas against the twin."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import z3

pytest.importorskip("triton")

from mxmoe.backends.triton.dispatch import Dispatch, TileClass, Tiling
from mxmoe.backends.triton.schedule import allocate, build_reference, tile_in_class_reference

HEIGHTS = ((16, 64, 128), (128,), (16, 32))
cuts = pytest.mark.parametrize("together", [False, True])
MOST = 2**31 - 1
"""Rows of an expert: all that an int32 can hold."""

Number = z3.ArithRef | int


class Formulas:
    """What the kernel computes for one expert and class, over integers of z3 or of Python."""

    def __init__(self, count: Number, heights: tuple[int, ...], height: int, *, together: bool) -> None:
        tallest, below = heights[-1], max((other for other in heights if other < height), default=0)
        full = count / tallest if isinstance(count, z3.ArithRef) else count // tallest
        rest = count - full * tallest
        self.count, self.height, self.is_tallest = count, height, height == tallest
        self.full, self.rest = full, rest
        self.below, self.below_beside = below, (0 if self.is_tallest else height) if together else below
        self.taken = 0 if self.is_tallest else full * tallest

    def bands_z3(self) -> z3.ArithRef:
        below = z3.If(self.full > 0, self.below_beside, self.below)
        partial = z3.If(z3.And(self.rest > below, self.rest <= self.height), 1, 0)
        return (self.full if self.is_tallest else 0) + partial

    def bands(self) -> int:
        below = self.below_beside if self.full > 0 else self.below
        return (self.full if self.is_tallest else 0) + int(below < self.rest <= self.height)

    def first(self, band: Number) -> Number:
        return self.taken + band * self.height


def holds_for_all(claim: z3.BoolRef, *given: z3.BoolRef) -> bool:
    """Whether no assignment fulfils what is given and breaks the claim."""
    solver = z3.Solver()
    solver.set("timeout", 60_000)
    solver.add(*given, z3.Not(claim))
    return solver.check() == z3.unsat


@cuts
@pytest.mark.parametrize("heights", HEIGHTS)
def test_every_row_is_in_a_band(heights: tuple[int, ...], together: bool) -> None:
    count, row = z3.Ints("count row")
    covers: list[z3.BoolRef] = []
    for height in heights:
        one = Formulas(count, heights, height, together=together)
        # the only band of a class that can hold the row
        guess = (row - one.taken) / height
        low = one.first(guess)
        covers.append(z3.And(row >= one.taken, guess < one.bands_z3(), row >= low, row < low + height))
    assert holds_for_all(z3.Or(*covers), count >= 0, count <= MOST, row >= 0, row < count)
    assert not holds_for_all(z3.Or(*covers[:-1]), count >= 0, count <= MOST, row >= 0, row < count)


@cuts
@pytest.mark.parametrize("heights", HEIGHTS)
def test_no_row_is_in_two_bands_and_no_band_leaves_its_expert(heights: tuple[int, ...], together: bool) -> None:
    count, row, i, j = z3.Ints("count row i j")
    classes = [Formulas(count, heights, height, together=together) for height in heights]

    def holds(one: Formulas, band: z3.ArithRef) -> z3.BoolRef:
        end = z3.If(one.first(band) + one.height < count, one.first(band) + one.height, count)
        return z3.And(band >= 0, band < one.bands_z3(), row >= one.first(band), row < end)

    bounds = (count >= 0, count <= MOST)
    for a, b in product(range(len(classes)), repeat=2):
        same = i == j if a == b else z3.BoolVal(False)
        assert holds_for_all(same, *bounds, holds(classes[a], i), holds(classes[b], j))
    for one in classes:
        inside = z3.And(one.first(i) >= 0, one.first(i) < count)
        assert holds_for_all(inside, *bounds, i >= 0, i < one.bands_z3())


def test_bands_of_experts_and_classes_have_places_of_their_own() -> None:
    """Three experts, two groups, one of them together: band numbers are distinct, without a gap, ordered by class."""
    counts = z3.Ints("a b c")
    group = (0, 1, 0)
    classes = ((0, 128), (1, 64), (0, 16), (1, 16))
    heights = {0: (16, 128), 1: (16, 64)}

    def bands_of(expert: int, g: int, height: int) -> z3.ArithRef:
        one = Formulas(counts[expert], heights[g], height, together=g == 0)
        return one.bands_z3() if group[expert] == g else z3.IntVal(0)

    bands = {(at, expert): bands_of(expert, *one) for at, one in enumerate(classes) for expert in range(3)}
    totals = [z3.Sum([bands[at, expert] for expert in range(3)]) for at in range(len(classes))]
    start = {
        (at, expert): z3.Sum([*totals[:at], *(bands[at, other] for other in range(expert)), z3.IntVal(0)])
        for at, expert in bands
    }
    i, j = z3.Ints("i j")
    bounds = [z3.And(count >= 0, count <= MOST) for count in counts]
    everything = z3.Sum(totals)
    for key, other in product(bands, repeat=2):
        both = (i >= 0, i < bands[key], j >= 0, j < bands[other])
        same = i == j if key == other else z3.BoolVal(False)
        assert holds_for_all(same, *bounds, *both, start[key] + i == start[other] + j)
    for key in bands:
        assert holds_for_all(z3.And(start[key] + i >= 0, start[key] + i < everything), *bounds, i >= 0, i < bands[key])


@cuts
@pytest.mark.parametrize("heights", HEIGHTS)
def test_an_expert_that_is_together_is_of_one_class(heights: tuple[int, ...], together: bool) -> None:
    """Where it fills the tallest height; else it is anyhow. Without, it may be of two."""
    count = z3.Int("count")
    classes = [Formulas(count, heights, height, together=together) for height in heights]
    used = z3.Sum([z3.If(one.bands_z3() > 0, 1, 0) for one in classes])
    assert holds_for_all(used == 1, count > 0, count <= MOST) == (together or len(heights) == 1)


@cuts
@pytest.mark.parametrize("heights", HEIGHTS)
def test_the_twin_follows_the_formulas(heights: tuple[int, ...], together: bool) -> None:
    experts = 2 * heights[-1] + 2
    classes = tuple(TileClass(0, height, 1) for height in reversed(heights))
    tiling = Tiling(classes, (0,) * experts, frozenset({0} if together else ()))
    index = torch.arange(experts).repeat_interleave(torch.arange(experts)).reshape(-1, 1)
    tables = allocate(Dispatch(experts, 1, len(index), (tiling,)), "cpu")
    build_reference(tables, index)
    ends, offsets = tables.table("class_band").tolist(), tables.table("offsets").tolist()
    expert, row = tables.table("band_expert").tolist(), tables.table("band_row").tolist()
    for at, one in enumerate(tiling.classes):
        wanted: list[tuple[int, int]] = []
        for count in range(experts):
            formulas = Formulas(count, heights, one.height, together=together)
            wanted += [(count, offsets[count] + formulas.first(band)) for band in range(formulas.bands())]
        assert list(zip(expert, row, strict=True))[ends[at] : ends[at + 1]] == wanted


def test_tiles_of_a_class_are_all_pairs_once() -> None:
    """The arithmetic of `tile_in_class`, for every number of bands, columns and depth of a group up to a bound."""
    for bands, columns, depth in product(range(1, 20), range(1, 7), range(1, 9)):
        found: list[tuple[int, int]] = []
        for local in range(bands * columns):
            group, inside = divmod(local, depth * columns)
            size = min(bands - group * depth, depth)
            found.append((group * depth + inside % size, inside // size))
        assert found == [tile_in_class_reference(local, bands, columns, depth) for local in range(bands * columns)]
        assert sorted(found) == list(product(range(bands), range(columns)))
