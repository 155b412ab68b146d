"""A budget for each part: the parts are solved by themselves, and one budget over all is never worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadBudget, BadProblem, InfeasibleBudget
from mxmoe.solver import Budget, Problem, solve, solve_parts

BITS = [2.0, 4.0, 8.0]


def drawn(seed: int, rows: int, *, tied: bool = False) -> tuple[Problem, np.ndarray]:
    rng = np.random.default_rng(seed)
    loss = np.sort(rng.random((rows, 3)))[:, ::-1] * rng.lognormal(size=(rows, 1))
    parts = rng.integers(3, size=rows) * 5
    groups = np.unique(np.stack([parts, rng.integers(2, size=rows)]), axis=1, return_inverse=True)[1] if tied else None
    problem = Problem(
        loss,
        BITS,
        rng.random((rows, 3)),
        rng.integers(1, 5, size=rows),
        groups,
        labels=[f"row {i}" for i in range(rows)],
    )
    return problem, parts


@given(st.integers(0, 2**16), st.integers(1, 12), st.floats(2, 8), st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_part_keeps_its_budget_and_one_over_all_is_no_worse(seed: int, rows: int, bits: float, tied: bool) -> None:
    problem, parts = drawn(seed, rows, tied=tied)
    found = solve_parts(problem, parts, bits, solver="exhaustive" if rows < 8 else "lagrangian")
    assert problem.numel is not None
    for part in np.unique(parts):
        own = parts == part
        used = (problem.numel[own] * np.array(BITS)[found.choice[own]]).sum() / problem.numel[own].sum()
        assert used <= bits * (1 + 1e-9)
    every = np.arange(rows)
    assert found.loss == pytest.approx(problem.loss[every, found.choice].sum())
    assert found.latency_us == pytest.approx(problem.cost[every, found.choice].sum())  # type: ignore[index]
    assert found.weight_bits == pytest.approx(
        (problem.numel * np.array(BITS)[found.choice]).sum() / problem.numel.sum()
    )
    assert found.bytes == pytest.approx(found.weight_bits * problem.numel.sum() / 8)
    assert found.bound <= found.objective
    assert solve(problem, bits).bound <= found.objective * (1 + 1e-9)


def test_one_part_is_the_whole() -> None:
    problem, _ = drawn(3, 9)
    one, other = solve_parts(problem, np.zeros(9, int), 4.0), solve(problem, 4.0)
    assert one.choice.tolist() == other.choice.tolist()
    assert (one.objective, one.bound) == (other.objective, other.bound)


def test_bytes_are_dealt_out_by_weights() -> None:
    problem = Problem([[9.0, 1.0]] * 4, [4.0, 8.0], numel=[100, 100, 300, 300])
    found = solve_parts(problem, [0, 0, 1, 1], Budget(bytes=600.0))  # 6 bits on average
    assert sorted(found.choice[:2].tolist()) == sorted(found.choice[2:].tolist()) == [0, 1]


def test_what_cannot_be_dealt_out_is_refused() -> None:
    problem, parts = drawn(1, 6)
    with pytest.raises(BadBudget, match="sum over all parts"):
        solve_parts(problem, parts, Budget(latency_us=1.0))
    with pytest.raises(BadProblem, match="one integer per row"):
        solve_parts(problem, parts[:3], 4.0)
    with pytest.raises(BadProblem, match="one integer per row"):
        solve_parts(problem, parts / 2, 4.0)
    tied = Problem(problem.loss, BITS, groups=np.zeros(6, int))
    with pytest.raises(BadProblem, match="tied to one choice"):
        solve_parts(tied, np.arange(6), 4.0)
    with pytest.raises(InfeasibleBudget, match="smallest feasible"):
        solve_parts(problem, parts, 1.0)
