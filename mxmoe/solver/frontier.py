"""What a bit more is worth: many budgets in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mxmoe.errors import BadBudget
from mxmoe.registry import near_names
from mxmoe.solver.base import Solver
from mxmoe.solver.instance import Instance, Tables
from mxmoe.solver.problem import Budget, Objective, Problem, Solution
from mxmoe.solver.solve import BudgetLike, make_solver, smallest_use, solve_tables, units_of


def frontier(
    problem: Problem,
    budgets: int | Sequence[BudgetLike] = 40,
    *,
    axis: Literal["weight_bits", "bytes", "latency_us"] = "weight_bits",
    objective: Objective | str | float = "loss",
    solver: str = "lagrangian",
    **options: Any,  # noqa: ANN401  # each solver declares its own
) -> list[Solution]:
    """
    Solve for many budgets at once, which shares most of the work: what a bit more is worth.

    Args:
        problem: the table to choose from.
        budgets: the budgets, or how many limits of `axis` to spread evenly from the smallest feasible one to the
            largest that still changes the answer (at least 2).
        axis: which limit to spread.
        objective: as in `solve`.
        solver: as in `solve`.
        options: as in `solve`.

    Returns:
        One solution per budget, in the order given; none is worse than another one that meets its budget.

    Raises:
        BadBudget: fewer than two points, or an axis that is no limit; else as `solve`.
    """
    tables, goal, chosen = Tables.of(problem), Objective.of(objective), make_solver(solver, **options)
    if isinstance(budgets, int):
        budgets = _spread(tables, budgets, axis, goal, chosen)
    solutions = [solve_tables(tables, Budget.of(budget), goal, chosen) for budget in budgets]
    return [_best_within(solution, solutions) for solution in solutions]


def _best_within(own: Solution, all_of_them: list[Solution]) -> Solution:
    """Take the plan of another budget where that is the better one: answers are exact to their gaps only."""
    used = ("weight_bits", "bytes", "latency_us")
    limits = own.budget.limits()
    fitting = [s for s in all_of_them if all(getattr(s, name) <= limits[name] for name in used if name in limits)]
    best = min(fitting, key=lambda s: s.objective, default=own)
    if best.objective >= own.objective:
        return own
    gap = (best.objective - own.bound) / best.objective if best.objective > 0 else 0.0
    return replace(
        best, bound=min(own.bound, best.objective), gap=max(gap, 0.0), budget=own.budget, seconds=own.seconds
    )


def _spread(tables: Tables, points: int, axis: str, objective: Objective, solver: Solver) -> list[Budget]:
    if axis not in units_of(tables):
        raise BadBudget(reason=f"there is no limit {axis!r}; {near_names(axis, units_of(tables))}")
    if points < 2:
        raise BadBudget(reason=f"a frontier of {points} points has no two ends")
    resource, unit = units_of(tables)[axis]
    Instance.of(tables, Budget(**{axis: 1.0}), objective)  # raises MissingCost before anything long
    best = solve_tables(tables, Budget(), objective, solver)
    ends = {"weight_bits": best.weight_bits, "bytes": best.bytes, "latency_us": best.latency_us or 0.0}
    low = smallest_use(tables, resource) / unit
    return [Budget(**{axis: float(cap)}) for cap in np.linspace(low, max(ends[axis], low), points)]
