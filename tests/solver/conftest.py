"""Small random allocation problems, and budgets that bind, shared by the tests of the solvers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from mxmoe.solver import Budget, Problem

Draw = Callable[[st.SearchStrategy], object]
# Quarters: sums are exact, so optima are either equal or clearly apart, and ties are common.
QUARTERS = st.integers(0, 60).map(lambda i: i / 4)


@st.composite
def _problems(draw: Draw, rows: int = 5, schemes: int = 4, costs: bool = True, smooth: bool = False) -> Problem:
    n, s = draw(st.integers(1, rows)), draw(st.integers(1, schemes))
    if smooth:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        loss, cost = rng.lognormal(0, 1.5, (n, s)), rng.gamma(2.0, 3.0, (n, s))
        bits, numel = rng.uniform(1, 16, (n, s)), rng.uniform(1, 5, n)
    else:
        table = st.lists(st.lists(QUARTERS, min_size=s, max_size=s), min_size=n, max_size=n).map(np.array)
        loss, cost, bits = draw(table), draw(table), draw(table) + 1.0
        numel = draw(st.none() | st.lists(st.integers(1, 4), min_size=n, max_size=n).map(np.array))
    holes = st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, s - 1)), max_size=3)
    for row, scheme in draw(holes):
        loss[row, scheme] = np.inf
    for row, scheme in draw(holes):
        cost[row, scheme] = np.inf
    groups = draw(st.none() | st.lists(st.integers(0, n), min_size=n, max_size=n).map(np.array))
    tied = np.arange(n) if groups is None else groups
    possible = np.isfinite(loss) & (np.isfinite(cost) | (not costs))
    assume(all(possible[tied == g].all(axis=0).any() for g in np.unique(tied)))
    return Problem(loss, bits, cost if costs else None, numel=numel, groups=groups)


@st.composite
def _budgets(draw: Draw, problem: Problem) -> Budget:
    """Limits at, above and sometimes below what some plan of the problem needs."""
    numel = np.ones(problem.n_rows) if problem.numel is None else problem.numel
    picked = draw(st.lists(st.integers(0, problem.n_schemes - 1), min_size=problem.n_rows, max_size=problem.n_rows))
    both = draw(st.booleans())
    chosen, rows = np.array(picked), np.arange(problem.n_rows)
    storage, limits = float((problem.bits[rows, chosen] * numel).sum()), {}
    if both or draw(st.booleans()):
        limits["weight_bits"] = storage / float(numel.sum()) * draw(st.sampled_from([1.0, 0.7, 1.2]))
    if draw(st.integers(0, 3)) == 0:
        limits["bytes"] = storage / 8 * draw(st.sampled_from([1.0, 0.9, 1.1]))
    if problem.cost is not None and (both or draw(st.booleans())):
        used = problem.cost[rows, chosen]
        limits["latency_us"] = max(float(used[np.isfinite(used)].sum()) * draw(st.sampled_from([1.0, 0.6, 1.1])), 0.25)
    return Budget(**limits)


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    """problems(rows=, schemes=, costs=, smooth=) draws a problem with holes and ties that has a possible plan."""
    return _problems


@pytest.fixture(scope="session")
def budgets() -> Callable[[Problem], st.SearchStrategy[Budget]]:
    """budgets(problem) draws limits alone and together, feasible or not."""
    return _budgets
