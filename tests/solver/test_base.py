"""A solver of somebody else: one class, one method, one entry point."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from mxmoe.errors import InstanceTooLarge, SolverFailed
from mxmoe.solver import SOLVERS, Answer, Instance, LinearSolver, Problem, Weights, solve


@dataclass(frozen=True)
class Lazy(LinearSolver):
    """Takes the same scheme everywhere and proves nothing."""

    scheme: int = 0

    name: ClassVar[str] = "lazy"
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    max_cells: ClassVar[int | None] = 6

    def minimise(self, instance: Instance, weights: Weights) -> Answer | None:
        return Answer(np.full(instance.tables.shape[0], self.scheme), 0.0)


@pytest.fixture(autouse=True)
def entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("lazy", f"{__name__}:Lazy", "mxmoe.solvers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == "mxmoe.solvers" else [])


def test_a_solver_by_entry_point_is_used_and_held_to_the_promises() -> None:
    problem = Problem([[9.0, 1.0], [4.0, 0.5]], [4.0, 8.0], [[1.0, 2.0], [1.0, 2.0]])
    assert "lazy" in SOLVERS
    # Its plan loses 13; one scheme for all may lose 1.5, and nobody may return worse.
    solution = solve(problem, solver="lazy")
    assert (solution.solver, solution.objective, solution.gap) == ("lazy", 1.5, 1.0)
    assert solve(problem, 4.0, solver="lazy").choice.tolist() == [0, 0]
    assert solve(problem, objective=0.5, solver="lazy").bound == 0
    with pytest.raises(SolverFailed, match="outside the limits"):
        solve(problem, 5.0, solver="lazy", scheme=1)
    with pytest.raises(InstanceTooLarge, match="at most 6 cells and this instance has 8"):
        solve(Problem(np.ones((4, 2)), [4.0, 8.0]), solver="lazy")
