"""
Choose a scheme for every row within a budget: `Problem` and `Budget` in, `Solution` with a proved bound out.

Numpy only, neither the IR nor torch. `solve` answers for one budget, `solve_parts` for
one in each part, `frontier` for many, `tie` makes the groups of
a granularity, SOLVERS is the table of solvers.
"""

from mxmoe.solver.base import LinearSolver, Solver
from mxmoe.solver.frontier import frontier
from mxmoe.solver.instance import Answer, Instance, Tables, Weights
from mxmoe.solver.parts import solve_parts
from mxmoe.solver.problem import SLACK, Budget, Objective, Problem, Solution
from mxmoe.solver.solve import SOLVERS, BudgetLike, make_solver, solve
from mxmoe.solver.tie import GRANULARITIES, tie

__all__ = [
    "GRANULARITIES",
    "SLACK",
    "SOLVERS",
    "Answer",
    "Budget",
    "BudgetLike",
    "Instance",
    "LinearSolver",
    "Objective",
    "Problem",
    "Solution",
    "Solver",
    "Tables",
    "Weights",
    "frontier",
    "make_solver",
    "solve",
    "solve_parts",
    "tie",
]
