"""Many budgets in one go: as good as one by one, and never worse with more."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.errors import BadBudget, InfeasibleBudget, MissingCost
from mxmoe.solver import Budget, Problem, frontier, solve


def _problem(rows: int = 120, seed: int = 5) -> Problem:
    rng = np.random.default_rng(seed)
    bits = np.array([2.25, 3.25, 4.25, 8.0])
    loss = rng.lognormal(0, 1.5, (rows, 1)) * 4.0**-bits * rng.lognormal(0, 0.2, (rows, 4))
    return Problem(loss, bits, rng.gamma(2, 2, (rows, 1)) * np.array([1.0, 1.1, 1.2, 0.9]))


def test_points_are_those_of_solve() -> None:
    problem, budgets = _problem(), [2.5, 4.0, {"weight_bits": 5.0, "latency_us": 600.0}, Budget(bytes=60.0)]
    for solution, budget in zip(frontier(problem, budgets), budgets, strict=True):
        alone = solve(problem, budget)
        assert solution.budget == Budget.of(budget)
        assert solution.objective <= alone.objective * (1 + 1e-9)
        assert solution.bound == pytest.approx(alone.bound, rel=1e-4)


@pytest.mark.parametrize("axis", ["weight_bits", "bytes", "latency_us"])
@pytest.mark.parametrize("objective", ["loss", 0.75])
def test_spread_points_run_from_the_smallest_to_the_best(axis: str, objective: str | float) -> None:
    problem = _problem(40)
    points = frontier(problem, 9, axis=axis, objective=objective)
    caps = [point.budget.limits()[axis] for point in points]
    assert np.diff(caps) == pytest.approx(np.diff(caps)[0])
    assert all(getattr(p, axis) <= cap * (1 + 1e-9) for p, cap in zip(points, caps, strict=True))
    assert (np.diff([p.objective for p in points]) <= 0).all()
    assert points[-1].objective == pytest.approx(solve(problem, objective=objective).objective, rel=1e-9)
    with pytest.raises(InfeasibleBudget):
        solve(problem, {axis: caps[0] * 0.999})


def test_a_frontier_of_plans_that_all_use_the_same() -> None:
    points = frontier(Problem([[2.0, 1.0]], [0.0, 0.0]), 2)
    assert [p.choice.tolist() for p in points] == [[1], [1]]


def test_other_solvers_make_frontiers_too() -> None:
    problem = _problem(5)
    ours, theirs = (frontier(problem, 4, solver=name) for name in ("lagrangian", "exhaustive"))
    assert [p.objective for p in ours] == pytest.approx([p.objective for p in theirs], rel=1e-9)


def test_mistakes_say_the_way_out() -> None:
    problem = Problem([[2.0, 1.0]], [4.0, 8.0])
    with pytest.raises(BadBudget, match="did you mean weight_bits"):
        frontier(problem, 4, axis="weight_bit")
    with pytest.raises(BadBudget, match="two ends"):
        frontier(problem, 1)
    with pytest.raises(MissingCost):
        frontier(problem, 4, axis="latency_us")
