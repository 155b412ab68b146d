"""What solvers see is what the problem says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import NoPossibleScheme
from mxmoe.solver import Budget, Instance, Objective, Problem, Tables
from mxmoe.solver.instance import best_uniform

Problems = Callable[..., st.SearchStrategy[Problem]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_grouping_keeps_the_sums_of_every_plan(problems: Problems, data: st.DataObject) -> None:
    problem = data.draw(problems())
    tables = Tables.of(problem)
    instance = Instance.of(tables, Budget(), Objective())
    picks = [data.draw(st.sampled_from(np.flatnonzero(row).tolist())) for row in tables.possible]
    choice = np.array(picks)
    point, rows, spread = instance.measure(choice), np.arange(problem.n_rows), choice[tables.group]
    numel = np.ones(problem.n_rows) if problem.numel is None else problem.numel
    assert point.loss == pytest.approx(problem.loss[rows, spread].sum())
    assert point.latency_us == pytest.approx(problem.cost[rows, spread].sum())
    assert point.storage == pytest.approx((problem.bits[rows, spread] * numel).sum())
    assert instance.is_feasible(choice)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_impossible_cells_are_infinite_in_every_sum_and_harmless_in_every_table(
    problems: Problems, data: st.DataObject
) -> None:
    tables = Tables.of(data.draw(problems()))
    instance = Instance.of(tables, Budget(), Objective())
    for weights in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        assert (np.isfinite(instance.values(weights)) == tables.possible).all()
    for table in (tables.loss, tables.cost, tables.storage):
        assert np.isfinite(table).all()


def test_bits_and_bytes_are_one_limit_the_lower_one() -> None:
    tables = Tables.of(Problem(np.ones((2, 1)), [4.0], numel=[8.0, 8.0]))
    for budget, bits in ((Budget(weight_bits=5), 80), (Budget(bytes=9), 72), (Budget(weight_bits=5, bytes=9), 72)):
        assert Instance.of(tables, budget, Objective()).caps == {"storage": pytest.approx(bits)}
    assert Instance.of(tables, Budget(weight_bits=float("inf")), Objective()).caps == {}


def test_best_uniform_is_the_best_that_fits() -> None:
    problem = Problem([[1.0, 5.0, 3.0, 0.5], [1.0, 5.0, 3.0, np.inf]], [16.0, 4.0, 5.0, 4.0])
    tables = Tables.of(problem)
    for bits, expected in ((16.0, [0, 0]), (6.0, [2, 2]), (4.5, [1, 1])):
        assert best_uniform(Instance.of(tables, Budget(weight_bits=bits), Objective())).tolist() == expected
    assert best_uniform(Instance.of(tables, Budget(weight_bits=3.0), Objective())) is None


def test_rows_tied_without_a_common_scheme_are_named() -> None:
    loss = np.where(np.eye(6, 2, dtype=bool), np.inf, 1.0)
    with pytest.raises(NoPossibleScheme, match="row 0, row 1, row 2, row 3 and 2 more rows"):
        Tables.of(Problem(loss, [4.0, 8.0], groups=[3] * 6))
