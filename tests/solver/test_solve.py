"""The laws of the door: every solver, every budget, every objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import (
    BadBudget,
    BadSolverOption,
    InfeasibleBudget,
    InfeasibleTogether,
    InstanceTooLarge,
    MissingCost,
    MxmoeError,
    NoPossibleScheme,
    SolverFailed,
    UnknownName,
)
from mxmoe.solver import SLACK, SOLVERS, Budget, Objective, Problem, Solution, solve

Problems = Callable[..., st.SearchStrategy[Problem]]
Budgets = Callable[[Problem], st.SearchStrategy[Budget]]
OBJECTIVES = ["loss", "time", 0.75, 0.3]


def _used(problem: Problem, choice: np.ndarray) -> dict[str, float]:
    rows, numel = np.arange(problem.n_rows), np.ones(problem.n_rows) if problem.numel is None else problem.numel
    storage = float((problem.bits[rows, choice] * numel).sum())
    time = 0.0 if problem.cost is None else float(problem.cost[rows, choice].sum())
    return {"weight_bits": storage / float(numel.sum()), "bytes": storage / 8, "latency_us": time}


def _plans(problem: Problem) -> list[np.ndarray]:
    """Every plan with equal schemes in tied rows and no impossible cell, by the definition and nothing else."""
    groups = np.arange(problem.n_rows) if problem.groups is None else problem.groups
    names = np.unique(groups)
    cost = np.zeros_like(problem.loss) if problem.cost is None else problem.cost
    plans = (
        np.array(p)[np.searchsorted(names, groups)]
        for p in itertools.product(range(problem.n_schemes), repeat=len(names))
    )
    rows = np.arange(problem.n_rows)
    return [p for p in plans if np.isfinite(problem.loss[rows, p] + cost[rows, p]).all()]


def _meets(problem: Problem, choice: np.ndarray, budget: Budget) -> bool:
    used = _used(problem, choice)
    return all(used[name] <= limit * (1 + SLACK) for name, limit in budget.limits().items())


def _value(problem: Problem, choice: np.ndarray, objective: object) -> float:
    loss = float(problem.loss[np.arange(problem.n_rows), choice].sum())
    return Objective.of(objective).value(loss, _used(problem, choice)["latency_us"])


def _refusal(problem: Problem, budget: Budget) -> MxmoeError | None:
    try:
        solve(problem, budget)
    except MxmoeError as error:
        return error
    return None


def _check_sound(problem: Problem, budget: Budget, objective: object, solution: Solution) -> None:
    """Check what every solution promises, whoever found it."""
    assert _meets(problem, solution.choice, budget)
    assert any((solution.choice == plan).all() for plan in _plans(problem))
    assert solution.objective == pytest.approx(_value(problem, solution.choice, objective), rel=1e-12)
    used = _used(problem, solution.choice)
    assert solution.weight_bits == pytest.approx(used["weight_bits"])
    assert solution.bytes == pytest.approx(used["bytes"])
    assert solution.latency_us == (None if problem.cost is None else pytest.approx(used["latency_us"]))
    assert 0 <= solution.bound <= solution.objective
    assert solution.gap * solution.objective == pytest.approx(solution.objective - solution.bound, abs=1e-12)
    uniform = [p for p in _plans(problem) if len(set(p.tolist())) == 1 and _meets(problem, p, budget)]
    assert all(solution.objective <= _value(problem, p, objective) * (1 + 1e-12) for p in uniform)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), smooth=st.booleans(), objective=st.sampled_from(OBJECTIVES))
def test_exhaustive_is_the_definition(
    problems: Problems, budgets: Budgets, data: st.DataObject, smooth: bool, objective: str | float
) -> None:
    problem = data.draw(problems(rows=4, schemes=3, smooth=smooth))
    budget = data.draw(budgets(problem))
    values = [_value(problem, p, objective) for p in _plans(problem) if _meets(problem, p, budget)]
    if not values:
        with pytest.raises((InfeasibleBudget, InfeasibleTogether)):
            solve(problem, budget, objective=objective, solver="exhaustive")
        return
    solution = solve(problem, budget, objective=objective, solver="exhaustive")
    _check_sound(problem, budget, objective, solution)
    assert solution.objective == pytest.approx(min(values), rel=1e-9)
    assert solution.gap == 0


@settings(max_examples=250, deadline=None)
@given(data=st.data(), smooth=st.booleans(), objective=st.sampled_from(OBJECTIVES))
def test_lagrangian_brackets_the_optimum(
    problems: Problems, budgets: Budgets, data: st.DataObject, smooth: bool, objective: str | float
) -> None:
    problem = data.draw(problems(rows=6, schemes=4, smooth=smooth))
    budget = data.draw(budgets(problem))
    try:
        best = solve(problem, budget, objective=objective, solver="exhaustive").objective
    except (InfeasibleBudget, InfeasibleTogether) as error:
        with pytest.raises(type(error)):
            solve(problem, budget, objective=objective)
        return
    solution = solve(problem, budget, objective=objective)
    _check_sound(problem, budget, objective, solution)
    assert solution.bound <= best * (1 + 1e-9)
    # The open core holds everything in an instance of this size, so the plan is optimal and known to be.
    assert solution.objective == pytest.approx(best, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), objective=st.sampled_from(OBJECTIVES))
def test_lagrangian_stays_sound_without_its_core(
    problems: Problems, budgets: Budgets, data: st.DataObject, objective: str | float
) -> None:
    problem = data.draw(problems(rows=6, schemes=4, smooth=True))
    budget = data.draw(budgets(problem))
    try:
        best = solve(problem, budget, objective=objective, solver="exhaustive").objective
        solution = solve(problem, budget, objective=objective, core=1, states=1)
    except (InfeasibleBudget, InfeasibleTogether):
        return
    _check_sound(problem, budget, objective, solution)
    assert solution.bound <= best * (1 + 1e-9)
    assert solution.objective >= best * (1 - 1e-9)


@pytest.mark.parametrize(("solver", "options"), [("pulp", {}), ("pulp", {"engine": "cbc"}), ("z3", {})])
@settings(max_examples=20, deadline=None)
@given(data=st.data(), objective=st.sampled_from(OBJECTIVES))
def test_exact_solvers_agree_with_exhaustive(
    problems: Problems,
    budgets: Budgets,
    data: st.DataObject,
    objective: str | float,
    solver: str,
    options: dict[str, Any],
) -> None:
    small = solver == "z3"
    problem = data.draw(problems(rows=3 if small else 5, schemes=3))
    budget = data.draw(budgets(problem))
    try:
        best = solve(problem, budget, objective=objective, solver="exhaustive").objective
    except (InfeasibleBudget, InfeasibleTogether) as error:
        with pytest.raises(type(error)):
            solve(problem, budget, objective=objective, solver=solver, **options)
        return
    solution = solve(problem, budget, objective=objective, solver=solver, **options)
    _check_sound(problem, budget, objective, solution)
    assert solution.objective == pytest.approx(best, rel=1e-9)
    assert solution.bound == pytest.approx(best, rel=1e-8, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_smallest_feasible_limit_is_feasible_and_smallest(
    problems: Problems, budgets: Budgets, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    least = {
        name: min(_used(problem, p)[name] for p in _plans(problem)) for name in ("weight_bits", "bytes", "latency_us")
    }
    for name, smallest in least.items():
        if smallest == 0:
            continue
        with pytest.raises(InfeasibleBudget) as caught:
            solve(problem, {name: smallest * 0.99})
        assert caught.value.blanks["limit"] == name
        assert caught.value.blanks["smallest"] == pytest.approx(smallest, rel=1e-12)
        typed = float(str(caught.value).rsplit(" ", 1)[1])
        assert _meets(problem, solve(problem, {name: typed}).choice, Budget(**{name: typed}))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_limits_that_exclude_each_other_say_how_far(problems: Problems, budgets: Budgets, data: st.DataObject) -> None:
    problem = data.draw(problems(smooth=True))
    budget = data.draw(budgets(problem))
    error = _refusal(problem, budget)
    if isinstance(error, InfeasibleTogether):
        first, second = error.blanks["first"], error.blanks["second"]
        for kept, moved, smallest in ((first, second, "second_smallest"), (second, first, "first_smallest")):
            within = [
                _used(problem, p)
                for p in _plans(problem)
                if _meets(problem, p, Budget(**{kept: budget.limits()[kept]}))
            ]
            assert error.blanks[smallest] == pytest.approx(min(used[moved] for used in within), rel=1e-9)


def test_limits_that_exclude_each_other() -> None:
    problem = Problem([[3.0, 1.0]], [4.0, 8.0], [[9.0, 2.0]])
    with pytest.raises(
        InfeasibleTogether, match="at this weight_bits the smallest latency_us is 9, at this latency_us"
    ) as e:
        solve(problem, Budget(weight_bits=5, latency_us=5))
    assert e.value.blanks["first_smallest"] == 8
    for solver in ("pulp", "z3", "exhaustive"):
        with pytest.raises(InfeasibleTogether):
            solve(problem, Budget(weight_bits=5, latency_us=5), solver=solver)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), objective=st.sampled_from(OBJECTIVES))
def test_the_same_question_gets_the_same_answer(
    problems: Problems, budgets: Budgets, data: st.DataObject, objective: str | float
) -> None:
    problem = data.draw(problems(rows=8))
    budget = data.draw(budgets(problem))
    try:
        first = solve(problem, budget, objective=objective)
    except (InfeasibleBudget, InfeasibleTogether):
        return
    second = solve(problem, budget, objective=objective)
    assert (first.choice == second.choice).all()
    assert (first.objective, first.bound) == (second.objective, second.bound)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tied_rows_equal_one_row_that_is_their_sum(problems: Problems, data: st.DataObject) -> None:
    problem = data.draw(problems(rows=4))
    doubled = Problem(
        np.repeat(problem.loss, 2, axis=0),
        np.repeat(problem.bits, 2, axis=0),
        np.repeat(problem.cost, 2, axis=0),
        numel=None if problem.numel is None else np.repeat(problem.numel, 2),
        groups=np.repeat(np.arange(problem.n_rows) if problem.groups is None else problem.groups, 2),
    )
    low = min(_used(problem, p)["weight_bits"] for p in _plans(problem))
    one, two = solve(problem, low * 1.2), solve(doubled, low * 1.2)
    assert two.objective == pytest.approx(2 * one.objective, rel=1e-9)
    assert (two.choice[::2] == two.choice[1::2]).all()


def test_a_number_a_mapping_and_a_budget_mean_the_same() -> None:
    problem = Problem([[9.0, 1.0], [4.0, 0.5]], [4.0, 8.0])
    for budget in (6, 6.0, {"weight_bits": 6}, Budget(weight_bits=6)):
        solution = solve(problem, budget)
        assert solution.choice.tolist() == [1, 0]
        assert solution.budget == Budget(weight_bits=6.0)
    assert solve(problem).choice.tolist() == [1, 1]
    assert solve(problem, float("inf")).choice.tolist() == [1, 1]
    assert solve(problem).latency_us is None


def test_a_budget_met_exactly_is_met() -> None:
    loss, bits = np.tile([1.0, 0.1], (30_000, 1)), [4.1, 4.3]
    solution = solve(Problem(loss, bits), 4.2)
    assert solution.choice.sum() == 15_000
    assert solution.weight_bits <= 4.2 * (1 + SLACK)


def test_equal_times_are_settled_by_the_loss() -> None:
    problem = Problem([[5.0, 1.0, 0.5]], [8.0, 4.0, 4.0], [[2.0, 2.0, 2.0]])
    assert solve(problem, objective="time").choice.tolist() == [2]


def test_choices_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        solve(Problem([[1.0]], [4.0])).choice[0] = 0


def test_every_solver_declares_what_it_is() -> None:
    for name, kind in SOLVERS.items():
        assert kind.name == name
        assert isinstance(kind.exact, bool)
        assert isinstance(kind.needs, tuple)
        for limit in (kind.max_cells, kind.max_plans):
            assert limit is None or limit > 0


def test_mistakes_say_the_way_out() -> None:
    problem = Problem([[9.0, 1.0], [4.0, 0.5]], [4.0, 8.0])
    with pytest.raises(UnknownName, match="did you mean lagrangian"):
        solve(problem, 6.0, solver="lagrange")
    with pytest.raises(BadSolverOption, match="did you mean core"):
        solve(problem, 6.0, cores=4)
    with pytest.raises(BadSolverOption, match="at least 1"):
        solve(problem, 6.0, core=0)
    with pytest.raises(BadBudget, match="did you mean weight_bits"):
        solve(problem, {"weight_bit": 6.0})
    for objective, budget in (("time", None), (0.5, None), ("loss", {"latency_us": 3.0})):
        with pytest.raises(MissingCost, match="cost="):
            solve(problem, budget, objective=objective)
    tied = Problem([[np.inf, 1.0], [1.0, np.inf]], [4.0, 8.0], groups=[0, 0], labels=["gate of 3", "up of 3"])
    with pytest.raises(NoPossibleScheme, match=r"gate of 3, up of 3:"):
        solve(tied)


def test_large_instances_are_refused_with_their_size() -> None:
    problem = Problem(np.ones((40, 3)), [2.0, 3.0, 4.0])
    with pytest.raises(InstanceTooLarge, match=r"2,000,000 plans and this instance has 10\^19"):
        solve(problem, solver="exhaustive")
    with pytest.raises(InstanceTooLarge, match=r"this instance has 120"):
        solve(problem, solver="z3")
    with pytest.raises(InstanceTooLarge, match=r"14,348,907"):
        solve(Problem(np.ones((15, 3)), [2.0, 3.0, 4.0]), solver="exhaustive")


def test_a_solver_that_finds_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxmoe.solver.exhaustive.Exhaustive.solve", lambda self, instance: None)
    with pytest.raises(SolverFailed, match="exhaustive"):
        solve(Problem([[1.0]], [4.0]), solver="exhaustive")
