"""Every plan, counted."""

from __future__ import annotations

import numpy as np

from mxmoe.solver import Problem, solve


def test_the_best_of_all_plans_by_hand() -> None:
    problem = Problem([[9.0, 1.0, 5.0], [4.0, 0.5, 1.0]], [2.0, 8.0, 4.0])
    assert solve(problem, 6.0, solver="exhaustive").choice.tolist() == [1, 2]
    assert solve(problem, 5.0, solver="exhaustive").choice.tolist() == [1, 0]
    assert solve(problem, 4.0, solver="exhaustive").choice.tolist() == [2, 2]


def test_the_first_of_equals_is_taken() -> None:
    assert solve(Problem(np.ones((3, 2)), [4.0, 4.0]), solver="exhaustive").choice.tolist() == [0, 0, 0]


def test_rows_without_a_choice_do_not_count() -> None:
    loss = np.full((100, 2), np.inf)
    loss[:, 0] = 1.0
    loss[:3] = [[2.0, 1.0]] * 3
    assert solve(Problem(loss, [4.0, 8.0]), solver="exhaustive").choice.tolist() == [1, 1, 1] + [0] * 97
