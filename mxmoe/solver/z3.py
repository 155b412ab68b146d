"""An oracle in exact arithmetic: z3's optimiser over rationals."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import z3

from mxmoe.errors import SolverFailed
from mxmoe.solver.base import LinearSolver
from mxmoe.solver.instance import Answer, Instance, Weights
from mxmoe.solver.problem import Floats


@dataclass(frozen=True)
class Z3(LinearSolver):
    """Small instances without any rounding: every float is taken as the rational that it is."""

    timeout_s: float = 60.0
    """Seconds for each weighted sum."""

    name: ClassVar[str] = "z3"
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("z3",)
    max_cells: ClassVar[int | None] = 32

    def minimise(self, instance: Instance, weights: Weights) -> Answer | None:
        """Minimise a weighted sum of loss and time; see `LinearSolver`."""
        value, possible = instance.values(weights), instance.tables.possible
        optimizer = z3.Optimize()
        optimizer.set("timeout", round(self.timeout_s * 1000))
        cells = [{int(s): z3.Bool(f"x_{g}_{s}") for s in np.flatnonzero(row)} for g, row in enumerate(possible)]
        for row in cells:
            optimizer.add(z3.PbEq([(x, 1) for x in row.values()], 1))
        for name, cap in instance.caps.items():
            optimizer.add(_sum(instance.tables.resource(name), cells) <= _rational(cap))
        optimizer.minimize(_sum(value, cells))
        status = optimizer.check()
        if status == z3.unsat:
            return None
        if status != z3.sat:
            way_out = "raise timeout_s, or use solver='lagrangian'"
            raise SolverFailed(solver=self.name, status=optimizer.reason_unknown(), way_out=way_out)
        model = optimizer.model()
        taken = [next(s for s, x in row.items() if z3.is_true(model.eval(x, model_completion=True))) for row in cells]
        choice = np.array(taken, dtype=np.int64)
        return Answer(choice, float(value[np.arange(choice.size), choice].sum()))


def _sum(table: Floats, cells: list[dict[int, Any]]) -> Any:  # noqa: ANN401  # z3 ships no types
    flat = [(x, float(table[g, s])) for g, row in enumerate(cells) for s, x in row.items()]
    return z3.Sum([z3.If(x, _rational(value), _rational(0.0)) for x, value in flat])


def _rational(value: float) -> Any:  # noqa: ANN401  # z3 ships no types
    exact = Fraction(value)
    return z3.Q(exact.numerator, exact.denominator)
