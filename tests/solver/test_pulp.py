"""Branch and cut: options, early stops, and limits met to the letter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mxmoe.errors import BadSolverOption, SolverFailed
from mxmoe.solver import Instance, Problem, solve
from mxmoe.solver.pulp import Pulp


def _problem(rows: int) -> Problem:
    rng = np.random.default_rng(2)
    return Problem(rng.lognormal(0, 1, (rows, 4)), rng.uniform(1, 9, (rows, 4)))


@pytest.mark.parametrize("engine", ["highs", "cbc"])
def test_a_loose_gap_is_kept_and_bounded(engine: str) -> None:
    problem = _problem(60)
    exact, loose = solve(problem, 4.0, solver="pulp"), solve(problem, 4.0, solver="pulp", engine=engine, gap=0.05)
    assert loose.bound <= exact.objective * (1 + 1e-9) <= loose.objective * (1 + 2e-9)
    assert loose.gap <= 0.05 + 1e-9


@pytest.mark.parametrize("options", [{"engine": "gurobi"}, {"gap": -0.1}, {"gap": 1.0}, {"time_limit_s": 0.0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadSolverOption, match="should be"):
        solve(_problem(2), 8.0, solver="pulp", **options)


def test_no_plan_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pulp.LpProblem.solve", lambda self, engine: 0)
    with pytest.raises(SolverFailed, match="raise time_limit_s"):
        solve(_problem(3), 8.0, solver="pulp")


def test_a_plan_outside_by_a_tolerance_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, shrinks, run = Problem([[2.0, 1.0]], [4.0, 8.0]), [], Pulp._run

    def sloppy(self: Pulp, instance: Instance, value: np.ndarray, shrink: float) -> tuple[np.ndarray, float] | None:
        shrinks.append(shrink)
        return (np.array([1]), 1.0) if len(shrinks) < 3 else run(self, instance, value, shrink)

    monkeypatch.setattr(Pulp, "_run", sloppy)
    solution = solve(problem, 5.0, solver="pulp")
    assert solution.choice.tolist() == [0]
    assert solution.bound == 1.0
    assert shrinks == sorted(shrinks)
    assert len(set(shrinks)) == 3
