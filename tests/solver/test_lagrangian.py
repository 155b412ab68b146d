"""The default solver on instances too large to enumerate."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.solver import Budget, Problem, solve

BITS = np.array([2.25, 3.25, 4.25, 4.0, 8.0, 16.0])


def _model(rows: int, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 1.8, (rows, 1)) * 4.0**-BITS * rng.lognormal(0, 0.3, (rows, 6))
    cost = rng.gamma(0.5, 2, (rows, 1)) * np.array([0.9, 0.9, 0.9, 0.4, 0.5, 1.0]) + BITS / 8
    return Problem(loss, BITS, cost)


@pytest.mark.parametrize("objective", ["loss", "time", 0.75])
def test_large_instances_are_solved_to_a_small_proved_gap(objective: str | float) -> None:
    problem = _model(20_000)
    solution = solve(problem, 4.25, objective=objective)
    assert solution.weight_bits <= 4.25 * (1 + 1e-9)
    assert solution.gap < 1e-5


@pytest.mark.parametrize("objective", ["loss", 0.5])
def test_two_limits_that_both_bind(objective: str | float) -> None:
    problem = _model(8000)
    accurate, fast = solve(problem, 5.0), solve(problem, 5.0, objective="time")
    limit = (accurate.latency_us + fast.latency_us) / 2
    solution = solve(problem, Budget(weight_bits=5.0, latency_us=limit), objective=objective)
    assert solution.weight_bits <= 5.0 * (1 + 1e-9)
    assert solution.latency_us <= limit * (1 + 1e-9)
    assert solution.gap < 5e-5
    assert solution.loss >= accurate.loss


def test_a_middling_instance_agrees_with_branch_and_cut() -> None:
    problem = _model(150)
    for budget in (3.0, {"weight_bits": 5.0, "latency_us": solve(problem, 5.0).latency_us * 0.9}):
        ours, exact = solve(problem, budget), solve(problem, budget, solver="pulp")
        assert ours.bound <= exact.objective * (1 + 1e-9)
        assert exact.objective * (1 - 1e-9) <= ours.objective <= exact.objective * (1 + 1e-3)


def test_identical_rows_split_where_the_limit_says() -> None:
    problem = Problem(np.tile([4.0, 1.0], (6000, 1)), [4.0, 8.0], np.tile([1.0, 2.0], (6000, 1)))
    assert solve(problem, 5.0).choice.sum() == 1500
    assert solve(problem, Budget(weight_bits=7.0, latency_us=7000.0)).choice.sum() == 1000
    assert solve(problem, 5.0, objective=0.5).gap < 1e-6


def test_units_do_not_matter() -> None:
    problem = _model(300)
    for scale in (1e-9, 1e9):
        scaled = Problem(problem.loss * scale, problem.bits, problem.cost * scale, numel=np.full(300, 1e7))
        for objective in ("loss", 0.75):
            one, two = (solve(p, 4.25, objective=objective) for p in (problem, scaled))
            assert two.objective == pytest.approx(one.objective * scale, rel=1e-6)


def test_sensitivities_without_any_spread_and_losses_of_zero() -> None:
    assert solve(Problem(np.zeros((5000, 3)), [2.0, 4.0, 8.0]), 3.0).gap == 0
    flat = Problem(np.ones((5000, 3)), [2.0, 4.0, 8.0], np.ones((5000, 3)))
    assert solve(flat, {"weight_bits": 3.0, "latency_us": 5000.0}).objective == 5000
