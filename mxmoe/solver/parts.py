"""Many budgets: the rows in parts, each with a limit of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mxmoe.errors import BadBudget, BadProblem
from mxmoe.solver.problem import Budget, Ints, Objective, Problem, Solution
from mxmoe.solver.solve import BudgetLike, solve


def solve_parts(
    problem: Problem,
    parts: ArrayLike,
    budget: BudgetLike = None,
    *,
    objective: Objective | str | float = "loss",
    solver: str = "lagrangian",
    **options: Any,  # noqa: ANN401  # each solver declares its own
) -> Solution:
    """
    Solve each part of the rows by itself, as MxMoE (ICML 2025) and MC-MoE (ICLR 2025) do with the layers of a model.

    An average of bits holds for each part, bytes are dealt out by numbers of weights. The solution is that of all rows;
    objective and bound are sums over the parts, and other figures are those of the whole. Never better than one budget
    over all, in the loss that is minimised.

    Args:
        problem: the rows of all parts.
        parts: [row] integers, rows with the same one are a part.
        budget: limits; time cannot be dealt out.
        objective: as in `solve`; minimised in each part.
        solver: as in `solve`.
        options: as in `solve`.

    Raises:
        BadBudget: a limit of time.
        BadProblem: parts that are not one integer per row, or rows tied across parts.
        what `solve` raises, for the first part that cannot be solved.
    """
    began = time.perf_counter()
    limits = Budget.of(budget)
    if limits.latency_us is not None:
        raise BadBudget(reason="a limit of time is for the sum over all parts; leave latency_us out")
    numbers, sizes = _numbers(problem, parts), problem.numel if problem.numel is not None else np.ones(problem.n_rows)
    choice = np.zeros(problem.n_rows, dtype=np.int64)
    solved: list[Solution] = []
    for part in range(int(numbers.max()) + 1):
        rows = np.flatnonzero(numbers == part)
        share = float(sizes[rows].sum() / sizes.sum())
        own = Budget(weight_bits=limits.weight_bits, bytes=None if limits.bytes is None else limits.bytes * share)
        solved.append(solve(_rows_of(problem, rows), own, objective=objective, solver=solver, **options))
        choice[rows] = solved[-1].choice
    value, bound = sum(one.objective for one in solved), sum(one.bound for one in solved)
    n_bytes = sum(one.bytes for one in solved)
    choice.setflags(write=False)
    return Solution(
        choice=choice,
        objective=value,
        bound=bound,
        gap=(value - bound) / value if value > 0 else 0.0,
        loss=sum(one.loss for one in solved),
        latency_us=None if problem.cost is None else sum(one.latency_us or 0.0 for one in solved),
        weight_bits=n_bytes * 8 / float(sizes.sum()),
        bytes=n_bytes,
        seconds=time.perf_counter() - began,
        solver=solver,
        budget=limits,
    )


def _numbers(problem: Problem, parts: ArrayLike) -> Ints:
    """Number the parts from 0 on."""
    given = np.asarray(parts)
    if given.shape != (problem.n_rows,) or not np.issubdtype(given.dtype, np.integer):
        raise BadProblem(reason=f"parts is {given.dtype}{list(given.shape)} and should be one integer per row")
    numbers = np.unique(given, return_inverse=True)[1].astype(np.int64)
    if problem.groups is not None:
        pairs = np.unique(np.stack([problem.groups, numbers]), axis=1)
        if pairs.shape[1] != np.unique(problem.groups).size:
            raise BadProblem(reason="rows of different parts are tied to one choice; take a finer granularity")
    return numbers


def _rows_of(problem: Problem, rows: Ints) -> Problem:
    return Problem(
        problem.loss[rows],
        problem.bits[rows],
        None if problem.cost is None else problem.cost[rows],
        None if problem.numel is None else problem.numel[rows],
        None if problem.groups is None else problem.groups[rows],
        None if problem.labels is None else [problem.labels[row] for row in rows],
    )
