"""The door: `solve`, and the table of solvers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from mxmoe.errors import (
    BadSolverOption,
    InfeasibleBudget,
    InfeasibleTogether,
    InstanceTooLarge,
    SolverFailed,
)
from mxmoe.registry import Registry, near_names
from mxmoe.solver.base import Solver
from mxmoe.solver.instance import Answer, Instance, Tables, best_uniform
from mxmoe.solver.lagrangian import Lagrangian
from mxmoe.solver.problem import Budget, Objective, Problem, Solution

BudgetLike = Budget | float | Mapping[str, float | None] | None
"""A number is an average of weight bits, a mapping holds limits by name."""

SOLVERS = Registry(
    "solver",
    "mxmoe.solvers",
    {
        "lagrangian": "mxmoe.solver.lagrangian:Lagrangian",
        "pulp": "mxmoe.solver.pulp:Pulp",
        "z3": "mxmoe.solver.z3:Z3",
        "exhaustive": "mxmoe.solver.exhaustive:Exhaustive",
    },
)
"""name -> class of `Solver`; its fields are the options of `solve`."""


def solve(
    problem: Problem,
    budget: BudgetLike = None,
    *,
    objective: Objective | str | float = "loss",
    solver: str = "lagrangian",
    **options: Any,  # noqa: ANN401  # each solver declares its own
) -> Solution:
    """
    Choose a scheme for every row within a budget.

    `solve(Problem([[9.0, 1.0], [4.0, 0.5]], [4.0, 8.0]), 6.0).choice` is [1, 0]: the second scheme goes where it
    saves most. Never worse in its own objective than the best plan with one scheme for all rows within the budget.

    Args:
        problem: the table to choose from.
        budget: limits; a number is an average of weight bits, None limits nothing.
        objective: "loss", "time", or r in 0 to 1 for loss^r * time^(1-r), see `minimise_product`.
        solver: a name in SOLVERS.
        options: fields of that solver, e.g. `engine="cbc"` for "pulp".

    Raises:
        UnknownName: no such solver.
        BadSolverOption: an option the solver does not have.
        BadBudget: a limit that is not a number or negative, or a name of none.
        BadObjective: neither a name nor a number from 0 to 1.
        MissingCost: time is limited or minimised and the problem has no costs.
        NoPossibleScheme: a row, or tied rows, with no possible cell.
        InfeasibleBudget: a limit that no plan meets, with the smallest that one does.
        InfeasibleTogether: limits that no plan meets at once.
        InstanceTooLarge: more than the solver declares.
    """
    began = time.perf_counter()
    solution = solve_tables(
        Tables.of(problem), Budget.of(budget), Objective.of(objective), make_solver(solver, **options)
    )
    return replace(solution, seconds=time.perf_counter() - began)


def make_solver(name: str, **options: Any) -> Solver:  # noqa: ANN401  # each solver declares its own
    """
    Look a solver up and give it its options.

    Raises:
        UnknownName: no such solver.
        BadSolverOption: an option it does not have; the message has the nearest.
    """
    kind = SOLVERS[name]
    known = [f.name for f in fields(kind) if f.init]
    for option in options:
        if option not in known:
            raise BadSolverOption(solver=name, reason=f"there is no option {option!r}; {near_names(option, known)}")
    return kind(**options)


def solve_tables(tables: Tables, budget: Budget, objective: Objective, solver: Solver) -> Solution:
    """Solve for one budget with the sums and the solver at hand; see `solve`."""
    began = time.perf_counter()
    instance = Instance.of(tables, budget, objective)
    _refuse_large(instance, solver)
    _refuse_single(instance, budget)
    answer = solver.solve(instance)
    if answer is None:
        raise _explain(instance, budget, solver)
    if not instance.is_feasible(answer.choice):
        raise SolverFailed(solver=solver.name, status="outside the limits", way_out="use solver='lagrangian'")
    uniform = best_uniform(instance)
    if uniform is not None and instance.value(uniform) < instance.value(answer.choice):
        answer = Answer(uniform, answer.bound)
    return _solution(instance, budget, answer, solver, time.perf_counter() - began)


def _solution(instance: Instance, budget: Budget, answer: Answer, solver: Solver, seconds: float) -> Solution:
    point, value = instance.measure(answer.choice), instance.value(answer.choice)
    bound = min(max(answer.bound, 0.0), value)
    rows = answer.choice[instance.tables.group]
    rows.setflags(write=False)
    return Solution(
        choice=rows,
        objective=value,
        bound=bound,
        gap=(value - bound) / value if value > 0 else 0.0,
        loss=point.loss,
        latency_us=None if instance.tables.cost is None else point.latency_us,
        weight_bits=point.storage / instance.tables.weights,
        bytes=point.storage / 8,
        seconds=seconds,
        solver=solver.name,
        budget=budget,
    )


def _refuse_large(instance: Instance, solver: Solver) -> None:
    cells = int(instance.tables.possible.sum())
    if solver.max_cells is not None and cells > solver.max_cells:
        raise InstanceTooLarge(solver=solver.name, limit=solver.max_cells, what="cells", size=f"{cells:,}")
    plans = float(np.log10(instance.tables.possible.sum(axis=1)).sum())
    if solver.max_plans is not None and plans > np.log10(solver.max_plans) + 1e-9:
        size = f"{round(10**plans):,}" if plans < 15 else f"10^{plans:.0f}"
        raise InstanceTooLarge(solver=solver.name, limit=solver.max_plans, what="plans", size=size)


def smallest_use(tables: Tables, name: str) -> float:
    """Add up the least that every group can use of a resource."""
    return float(np.where(tables.possible, tables.resource(name), np.inf).min(axis=1).sum())


def units_of(tables: Tables) -> dict[str, tuple[str, float]]:
    """Say of each limit which resource it limits, and how much of it one unit is."""
    return {"weight_bits": ("storage", tables.weights), "bytes": ("storage", 8.0), "latency_us": ("latency", 1.0)}


def _refuse_single(instance: Instance, budget: Budget) -> None:
    for limit, value in budget.limits().items():
        resource, unit = units_of(instance.tables)[limit]
        smallest = smallest_use(instance.tables, resource)
        if resource in instance.caps and smallest > instance.caps[resource] and smallest > value * unit * (1 + 1e-12):
            raise InfeasibleBudget(limit=limit, value=value, smallest=smallest / unit)


def _explain(instance: Instance, budget: Budget, solver: Solver) -> InfeasibleTogether | SolverFailed:
    """Say how far each of two limits would have to move for the other to stand."""
    if len(instance.caps) < 2:
        return SolverFailed(solver=solver.name, status="no plan", way_out="use solver='lagrangian'")
    limits, tables = budget.limits(), instance.tables
    units = {name: unit for name, (_, unit) in units_of(tables).items()}
    first = min((name for name in limits if name != "latency_us"), key=lambda name: limits[name] * units[name])
    fastest = Lagrangian().solve(replace(instance.without("latency"), r=0.0))
    swapped = replace(tables, loss=np.where(tables.possible, tables.storage, 0.0))
    smallest = Lagrangian().solve(replace(instance.without("storage"), tables=swapped, r=1.0))
    assert fastest is not None, f"{limits=}: each was met alone"
    assert smallest is not None, f"{limits=}: each was met alone"
    return InfeasibleTogether(
        first=first,
        first_value=limits[first],
        first_smallest=instance.measure(smallest.choice).storage / units[first],
        second="latency_us",
        second_value=limits["latency_us"],
        second_smallest=instance.measure(fastest.choice).latency_us,
    )
