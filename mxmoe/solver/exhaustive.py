"""The oracle: every plan, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mxmoe.solver.instance import Answer, Instance
from mxmoe.solver.problem import SLACK, Floats


@dataclass(frozen=True)
class Exhaustive:
    """Look at every plan; the definition that the other solvers are tested against."""

    name: ClassVar[str] = "exhaustive"
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    max_cells: ClassVar[int | None] = None
    max_plans: ClassVar[int | None] = 2_000_000

    def solve(self, instance: Instance) -> Answer | None:
        """Return the best plan within the limits, which is its own bound; the first of equals."""
        tables = instance.tables
        cells = [np.flatnonzero(row) for row in tables.possible]
        loss, time, storage = (_sums(t, cells) for t in (tables.loss, tables.cost, tables.storage))
        feasible = np.ones(loss.size, dtype=bool)
        for name, used in (("storage", storage), ("latency", time)):
            if name in instance.caps:
                feasible &= used <= instance.caps[name] * (1 + SLACK / 4)
        if not feasible.any():
            return None
        value = {1.0: loss, 0.0: time}.get(instance.r)
        if value is None:
            value = loss**instance.r * time ** (1 - instance.r)
        best = int(np.where(feasible, value, np.inf).argmin())
        choice = np.zeros(len(cells), dtype=np.int64)
        for row in reversed(range(len(cells))):
            best, digit = divmod(best, cells[row].size)
            choice[row] = cells[row][digit]
        return Answer(choice, instance.value(choice))


def _sums(table: Floats | None, cells: list[np.ndarray]) -> Floats:
    """Add up every combination of one cell per row, the last row running fastest."""
    total = np.zeros(1)
    for row, allowed in enumerate(cells):
        total = (total[:, None] + (np.zeros(allowed.size) if table is None else table[row, allowed])).ravel()
    return total
