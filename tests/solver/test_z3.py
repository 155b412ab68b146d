"""Exact arithmetic: limits that floats cannot tell apart, and the time limit."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.errors import SolverFailed
from mxmoe.solver import Problem, solve


def test_sums_that_differ_in_the_last_place_are_told_apart() -> None:
    # 0.1 + 0.2 and 0.3 are one unit in the last place apart, as the rationals that the floats are.
    problem = Problem([[0.1, 0.3], [0.2, 0.0]], [4.0, 4.0])
    assert solve(problem, solver="z3").choice.tolist() == [0, 1]
    tied = Problem([[0.1, 0.15], [0.2, 0.15]], [4.0, 4.0], groups=[0, 0])
    assert solve(tied, solver="z3").objective == pytest.approx(0.3)


def test_no_answer_in_time_says_so() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(rng.lognormal(0, 1, (10, 3)), rng.uniform(1, 9, (10, 3)), rng.uniform(1, 9, (10, 3)))
    with pytest.raises(SolverFailed, match="raise timeout_s"):
        solve(problem, {"weight_bits": 4.0, "latency_us": 40.0}, solver="z3", timeout_s=0.001)
