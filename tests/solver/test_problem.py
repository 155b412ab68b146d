"""The values at the door: what they take, what they refuse, and that they stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxmoe.errors import BadBudget, BadObjective, BadProblem
from mxmoe.solver import Budget, Objective, Problem

LOSS = [[9.0, 1.0], [4.0, 0.5]]
BITS = [4.0, 8.0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"loss": [1.0, 2.0]}, r"\[row, scheme\]"),
        ({"loss": np.zeros((0, 2))}, "at least one"),
        ({"loss": [[1.0, 2.0], [3.0]]}, "loss is not an array"),
        ({"loss": [["x", 1.0], [1.0, 1.0]]}, "loss is not an array"),
        ({"loss": [[np.nan, 1.0], [1.0, 1.0]]}, r"loss\[0, 0\] is nan"),
        ({"loss": [[1.0, 1.0], [-2.0, 1.0]]}, r"loss\[1, 0\] is -2.0; write inf .* add a constant"),
        ({"bits": [4.0, 8.0, 16.0]}, r"bits has shape \(3,\)"),
        ({"bits": [4.0, np.inf]}, "bits holds inf"),
        ({"bits": [4.0, np.nan]}, r"bits\[0, 1\] is nan"),
        ({"cost": [[1.0, 2.0]]}, r"cost has shape \(1, 2\)"),
        ({"cost": [[1.0, np.nan], [1.0, 1.0]]}, r"cost\[0, 1\] is nan"),
        ({"numel": [1.0]}, r"numel has shape \(1,\)"),
        ({"numel": [1.0, 0.0]}, "numel holds 0.0"),
        ({"numel": [1.0, np.inf]}, "numel holds inf"),
        ({"groups": [0, 1, 2]}, "one integer per row"),
        ({"groups": [0.0, 1.0]}, "one integer per row"),
        ({"labels": ["a"]}, "1 labels for 2 rows"),
    ],
)
def test_bad_arrays_are_named(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadProblem, match=reason):
        Problem(**{"loss": LOSS, "bits": BITS, **arguments})


def test_arrays_are_copies_that_nobody_can_write() -> None:
    loss = np.array(LOSS)
    problem = Problem(loss, BITS, cost=loss, numel=[1, 2], groups=[7, 7])
    loss[0, 0] = 0.0
    assert problem.loss[0, 0] == 9.0
    assert problem.bits.tolist() == [BITS, BITS]
    assert (problem.n_rows, problem.n_schemes) == (2, 2)
    for array in (problem.loss, problem.bits, problem.cost, problem.numel, problem.groups):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        problem.loss = loss


def test_a_square_table_of_bits_is_taken_row_by_row() -> None:
    assert Problem(LOSS, [[1.0, 2.0], [3.0, 4.0]]).bits.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_rows_are_named_by_label_or_number() -> None:
    assert Problem(LOSS, BITS).label(1) == "row 1"
    assert Problem(LOSS, BITS, labels=[("b", 0), ("b", 1)]).label(1) == "('b', 1)"


@pytest.mark.parametrize("value", [-1.0, float("nan"), "many", [4.0]])
def test_limits_are_numbers_and_not_negative(value: object) -> None:
    with pytest.raises(BadBudget, match="weight_bits"):
        Budget(weight_bits=value)
    with pytest.raises(BadBudget, match="latency_us"):
        Budget.of({"latency_us": value})


def test_budgets_as_people_write_them() -> None:
    assert Budget.of(None) == Budget()
    assert Budget.of(4) == Budget(weight_bits=4.0)
    assert Budget.of({"bytes": 9, "latency_us": None}) == Budget(bytes=9.0)
    assert Budget.of(Budget(bytes=9)).limits() == {"bytes": 9.0}
    with pytest.raises(BadBudget, match="did you mean latency_us"):
        Budget.of({"latency": 3.0})


@given(st.floats(0, 1))
def test_objectives_read_back_what_they_print(r: float) -> None:
    objective = Objective(r)
    assert Objective.of(str(objective)) == objective
    assert Objective.of(r) == Objective.of(objective) == objective


@given(st.floats(0, 1), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_objective_lies_between_its_factors(r: float, loss: float, time: float) -> None:
    value = Objective(r).value(loss, time)
    assert min(loss, time) * (1 - 1e-12) <= value <= max(loss, time) * (1 + 1e-12)


def test_objective_names_and_zeros() -> None:
    assert Objective.of("loss") == Objective(1.0)
    assert Objective.of("time") == Objective(0.0)
    assert Objective(0.75).value(0.0, 5.0) == 0.0
    assert Objective(1.0).value(3.0, 0.0) == 3.0
    assert Objective(0.5).value(4.0, 9.0) == pytest.approx(6.0)


@pytest.mark.parametrize("value", ["los", 1.5, -0.1, float("nan"), None])
def test_bad_objectives_are_refused(value: object) -> None:
    with pytest.raises(BadObjective, match="'loss', 'time', or r"):
        Objective.of(value)
