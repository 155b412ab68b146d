"""The sweep of weighted sums finds the least product, and bounds it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.solver import Budget, Problem, solve


def _least(problem: Problem, r: float, weight_bits: float) -> float:
    rows, best = np.arange(problem.n_rows), np.inf
    for plan in itertools.product(range(problem.n_schemes), repeat=problem.n_rows):
        if problem.bits[rows, plan].mean() <= weight_bits:
            loss, time = problem.loss[rows, plan].sum(), problem.cost[rows, plan].sum()
            best = min(best, float(loss**r * time ** (1 - r)))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.sampled_from([3.0, 4.25, 99.0]))
def test_the_least_product_is_found_and_proved(seed: int, r: float, weight_bits: float) -> None:
    rng = np.random.default_rng(seed)
    bits = np.array([2.25, 4.25, 8.0])
    loss = rng.lognormal(0, 1.5, (5, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (5, 3))
    problem = Problem(loss, bits, rng.gamma(2, 2, (5, 1)) * rng.uniform(0.5, 2, (5, 3)))
    best = _least(problem, r, weight_bits)
    for solver in ("lagrangian", "pulp", "exhaustive"):
        solution = solve(problem, weight_bits, objective=r, solver=solver)
        assert solution.objective == pytest.approx(best, rel=1e-8)
        assert solution.bound <= best * (1 + 1e-9)
        assert solution.gap < 1e-6


def test_the_product_of_one_row_by_hand() -> None:
    problem = Problem([[4.0, 1.0, 2.1]], [2.0, 8.0, 4.0], [[1.0, 5.0, 1.9]])
    # sqrt(4 * 1) = 2, sqrt(1 * 5) = 2.24, sqrt(2.1 * 1.9) = 1.998; the third is a vertex though it is best in neither.
    assert solve(problem, objective=0.5).choice.tolist() == [2]
    assert solve(problem, objective=0.9).choice.tolist() == [1]
    assert solve(problem, objective=0.1).choice.tolist() == [0]
    assert solve(problem, Budget(weight_bits=3.0), objective=0.9).choice.tolist() == [0]


def test_a_factor_of_zero_is_the_optimum() -> None:
    for problem in (Problem([[0.0, 3.0]], [4.0, 8.0], [[9.0, 1.0]]), Problem([[3.0, 2.0]], [4.0, 8.0], [[0.0, 1.0]])):
        solution = solve(problem, objective=0.5)
        assert (solution.objective, solution.bound, solution.gap) == (0.0, 0.0, 0.0)
        assert solution.choice.tolist() == [0]


@pytest.mark.parametrize("r", [0.25, 0.75])
def test_more_weight_on_the_loss_trades_time_for_it(r: float) -> None:
    rng = np.random.default_rng(3)
    loss = rng.lognormal(0, 1.5, (200, 1)) * np.array([1.0, 0.3, 0.01])
    problem = Problem(loss, [4.0, 6.0, 8.0], np.tile([1.0, 1.5, 2.0], (200, 1)))
    accurate, mixed, fast = (solve(problem, 6.0, objective=o) for o in ("loss", r, "time"))
    assert accurate.loss <= mixed.loss <= fast.loss
    assert fast.latency_us <= mixed.latency_us <= accurate.latency_us
    assert mixed.gap < 1e-3
