"""
Proofs that the tiles of a work list partition the output: each element lies in exactly one.

The functions under test, `n_blocks` and `block_bounds`, are run on symbolic integers. Counts are unbounded; tile sizes
and column blocks, which multiply, are those of SIZES and of the parameters. How numpy spreads the blocks over the list
(`np.repeat` of the expert, position within it divided by the column blocks) is written out here as formulas, and tied
to the function by the enumeration in test_tiles.py.
"""

from __future__ import annotations

import pytest
import z3

from mxmoe.backends.numba.tiles import block_bounds, n_blocks

SIZES = (*range(1, 33), 48, 64, 96, 128, 256)
EXPERTS = 4


class Symbol:
    """A symbolic integer with Python's floor division, which equals z3's for the positive divisors used here."""

    def __init__(self, term: z3.ArithRef) -> None:
        self.term = term

    def __add__(self, other: Symbol | int) -> Symbol:
        return Symbol(self.term + _term(other))

    def __sub__(self, other: Symbol | int) -> Symbol:
        return Symbol(self.term - _term(other))

    def __mul__(self, other: int) -> Symbol:
        return Symbol(self.term * other)

    def __floordiv__(self, other: int) -> Symbol:
        return Symbol(self.term / other)


def _term(x: Symbol | int) -> z3.ArithRef | int:
    return x.term if isinstance(x, Symbol) else x


def _minimum(a: Symbol, b: Symbol) -> Symbol:
    return Symbol(z3.If(a.term <= b.term, a.term, b.term))


def _inside(x: z3.ArithRef, index: z3.ArithRef, count: z3.ArithRef, size: int) -> z3.BoolRef:
    """Say that x lies in block `index`, and that there is such a block."""
    start, end = block_bounds(Symbol(index), Symbol(count), size, _minimum)
    blocks = n_blocks(Symbol(count), size)
    return z3.And(index >= 0, index < blocks.term, start.term <= x, x < end.term)


def _prove(claim: z3.BoolRef) -> None:
    solver = z3.Solver()
    solver.add(z3.Not(claim))
    answer = solver.check()
    assert answer == z3.unsat, f"{answer}: {solver.model() if answer == z3.sat else solver.reason_unknown()}"


@pytest.mark.parametrize("size", SIZES)
def test_blocks_partition_any_count(size: int) -> None:
    x, i, j, count = z3.Ints("x i j count")
    element = z3.And(x >= 0, x < count)
    _prove(z3.Implies(element, _inside(x, x / size, count, size)))
    _prove(z3.Implies(z3.And(_inside(x, i, count, size), _inside(x, j, count, size)), i == j))
    _prove(z3.Implies(_inside(x, i, count, size), element))
    start, end = block_bounds(Symbol(i), Symbol(count), size, _minimum)
    exists = z3.And(i >= 0, i < n_blocks(Symbol(count), size).term)
    _prove(z3.Implies(exists, z3.And(start.term < end.term, end.term - start.term <= size)))


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_rows_of_all_experts_are_covered_once(size: int) -> None:
    counts = z3.Ints(" ".join(f"count{e}" for e in range(EXPERTS)))
    starts = [z3.Sum([z3.IntVal(0), *counts[:e]]) for e in range(EXPERTS)]
    row, i, j = z3.Ints("row i j")
    sane = z3.And([count >= 0 for count in counts])

    def tile(e: int, index: z3.ArithRef) -> z3.BoolRef:
        return _inside(row - starts[e], index, counts[e], size)

    somewhere = z3.Or([tile(e, (row - starts[e]) / size) for e in range(EXPERTS)])
    _prove(z3.Implies(z3.And(sane, row >= 0, row < z3.Sum(counts)), somewhere))
    for a in range(EXPERTS):
        for b in range(a, EXPERTS):
            both = z3.And(sane, tile(a, i), tile(b, j))
            _prove(z3.Implies(both, i == j if a == b else z3.BoolVal(False)))


@pytest.mark.parametrize("columns", [1, 2, 3, 11, 22, 32])
def test_every_place_of_the_list_is_one_pair_of_blocks(columns: int) -> None:
    """Place t: expert by the running sum of tiles, row block by t' // columns, column block by t' % columns."""
    rows = z3.Ints(" ".join(f"rows{e}" for e in range(EXPERTS)))
    before = [z3.Sum([z3.IntVal(0), *(r * columns for r in rows[:e])]) for e in range(EXPERTS)]
    t, i, j, k, m = z3.Ints("t i j k m")
    sane = z3.And([r >= 0 for r in rows])

    def place(e: int, row: z3.ArithRef, column: z3.ArithRef) -> z3.BoolRef:
        return z3.And(row >= 0, row < rows[e], column >= 0, column < columns, t == before[e] + row * columns + column)

    total = z3.Sum([r * columns for r in rows])
    found = [place(e, (t - before[e]) / columns, (t - before[e]) % columns) for e in range(EXPERTS)]
    _prove(z3.Implies(z3.And(sane, t >= 0, t < total), z3.Or(found)))
    for a in range(EXPERTS):
        for b in range(a, EXPERTS):
            same = z3.And(i == k, j == m) if a == b else z3.BoolVal(False)
            _prove(z3.Implies(z3.And(sane, place(a, i, j), place(b, k, m)), same))
