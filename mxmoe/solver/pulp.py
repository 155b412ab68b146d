"""A mixed-integer program through PuLP: the exact check, by HiGHS or CBC."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pulp

from mxmoe.errors import BadSolverOption, SolverFailed
from mxmoe.solver.base import LinearSolver
from mxmoe.solver.instance import Answer, Instance, Weights
from mxmoe.solver.problem import Floats, Ints

Cells = list[dict[int, pulp.LpVariable]]
"""[group] possible scheme -> its 0/1 variable."""

_SCALE = 1000.0
_TIGHTEN = 8


@dataclass(frozen=True)
class Pulp(LinearSolver):
    """
    Branch and cut over one 0/1 variable per group and possible scheme.

    Seconds for thousands of rows, minutes for tens of thousands. A bound comes from the library when it stops early.

    Raises:
        BadSolverOption: an unknown engine, a negative gap, or a time limit that is not positive.
    """

    engine: Literal["highs", "cbc"] = "highs"
    """HiGHS in this process, or the CBC program that PuLP ships."""
    gap: float = 0.0
    """Relative gap at which to stop; 0 asks for the optimum."""
    time_limit_s: float | None = None
    """Seconds for each weighted sum, after which the best plan so far is taken."""

    name: ClassVar[str] = "pulp"
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("pulp", "highspy")

    def __post_init__(self) -> None:
        if self.engine not in ("highs", "cbc"):
            raise BadSolverOption(solver=self.name, reason=f"engine={self.engine!r} should be 'highs' or 'cbc'")
        if not 0 <= self.gap < 1 or (self.time_limit_s is not None and not self.time_limit_s > 0):
            reason = f"gap={self.gap} should be in [0, 1) and time_limit_s={self.time_limit_s} positive or None"
            raise BadSolverOption(solver=self.name, reason=reason)

    def minimise(self, instance: Instance, weights: Weights) -> Answer | None:
        """Minimise a weighted sum of loss and time; see `LinearSolver`."""
        value = instance.values(weights)
        shrink, bound = 0.0, None
        for _ in range(_TIGHTEN):
            found = self._run(instance, value, shrink)
            if found is None:
                return None
            choice, reached = found
            # The bound of the limits as they are is the first one.
            bound = reached if bound is None else bound
            if instance.is_feasible(choice):
                return Answer(choice, bound)
            # Branch and cut allows a limit to be missed by its tolerance.
            shrink = 1e-9 if shrink == 0 else shrink * 8
        raise SolverFailed(solver=self.name, status="outside the limits", way_out="use solver='lagrangian'")

    def _run(self, instance: Instance, value: Floats, shrink: float) -> tuple[Ints, float] | None:
        """Solve with limits lowered by a fraction: a plan and a bound, or None when there is no plan."""
        scale = _SCALE / max(float(value[np.isfinite(value)].max()), 1e-300)
        program, cells = _program(instance, value * scale, shrink)
        status = program.solve(self._engine())
        if status == pulp.LpStatusInfeasible:
            return None
        if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            way_out = "raise time_limit_s, or use solver='lagrangian'"
            raise SolverFailed(solver=self.name, status=pulp.LpStatus[status], way_out=way_out)
        taken = [max(row, key=lambda cell: row[cell].varValue or 0.0) for row in cells]
        choice = np.array(taken, dtype=np.int64)
        reached = float(value[np.arange(choice.size), choice].sum())
        return choice, min(reached, self._bound(program, reached * scale) / scale)

    def _engine(self) -> Any:  # noqa: ANN401  # PuLP's engines share no public type
        common: dict[str, Any] = {"msg": False, "gapRel": self.gap, "gapAbs": 0.0, "threads": 1}
        common["timeLimit"] = self.time_limit_s
        if self.engine == "cbc":
            # The class of the bundled program is deprecated, the program is not.
            bundled = getattr(pulp, "PULP_CBC_CMD", None)
            path = bundled.pulp_cbc_path if bundled is not None and os.path.exists(bundled.pulp_cbc_path) else None
            return pulp.COIN_CMD(
                path=path, msg=False, gapRel=self.gap, gapAbs=0.0, timeLimit=self.time_limit_s, threads=1
            )
        tolerances: dict[str, Any] = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
        return pulp.HiGHS(msg=False, gapRel=self.gap, gapAbs=0.0, timeLimit=self.time_limit_s, threads=1, **tolerances)

    def _bound(self, program: pulp.LpProblem, reached: float) -> float:
        """Ask the engine for its bound; CBC keeps it to itself, and one stopped early has proved no more than >= 0."""
        if self.engine == "highs":
            model: Any = program.solverModel
            return float(model.getInfo().mip_dual_bound)
        return reached * (1 - self.gap) if program.sol_status == pulp.LpSolutionOptimal else 0.0


def _program(instance: Instance, value: Floats, shrink: float) -> tuple[pulp.LpProblem, Cells]:
    """Write the multiple-choice knapsack down; limits are scaled, for the tolerances of engines are absolute."""
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    cells = [
        {int(s): program.add_variable(f"x_{g}_{s}", cat=pulp.LpBinary) for s in np.flatnonzero(row)}
        for g, row in enumerate(instance.tables.possible)
    ]
    program += _sum(value, cells)
    for row in cells:
        program += pulp.lpSum(row.values()) == 1
    for name, cap in instance.caps.items():
        unit = max(cap, float(instance.tables.resource(name).max()) * 1e-6, 1e-300) / _SCALE
        program += _sum(instance.tables.resource(name) / unit, cells) <= cap / unit * (1 - shrink)
    return program, cells


def _sum(table: Floats, cells: Cells) -> pulp.LpAffineExpression:
    return pulp.lpSum(float(table[g, s]) * x for g, row in enumerate(cells) for s, x in row.items())
