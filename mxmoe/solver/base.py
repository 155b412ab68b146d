"""What a solver is: its declared abilities, and one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from mxmoe.solver.instance import Answer, Instance, Weights
from mxmoe.solver.product import minimise_product


class Solver(Protocol):
    """
    A way to solve an `Instance`. Abilities are declared, not probed; options are the fields of the class.

    Register one under the entry point group "mxmoe.solvers".
    """

    name: ClassVar[str]
    """The name in the table."""
    exact: ClassVar[bool]
    """Whether the plan returned is optimal with default options."""
    needs: ClassVar[tuple[str, ...]]
    """Python packages that its file imports, besides numpy."""
    max_cells: ClassVar[int | None]
    """Largest number of groups times schemes; None means any."""
    max_plans: ClassVar[int | None]
    """Largest number of different plans; None means any."""

    def solve(self, instance: Instance) -> Answer | None:
        """
        Find a plan within the limits and a lower bound of its objective, or None when there is no such plan.

        `instance.tables` are [group, scheme]; `instance.r` may be anything from 0 to 1.
        """
        ...


class LinearSolver(ABC):
    """A solver that minimises weighted sums of loss and time; the product objective follows from those."""

    max_cells: ClassVar[int | None] = None
    max_plans: ClassVar[int | None] = None

    @abstractmethod
    def minimise(self, instance: Instance, weights: Weights) -> Answer | None:
        """Minimise weights[0] * loss + weights[1] * time within the limits, whatever `instance.r` is."""

    def solve(self, instance: Instance) -> Answer | None:
        """Solve for any objective."""
        if instance.weights is not None:
            return self.minimise(instance, instance.weights)
        return minimise_product(instance, lambda weights: self.minimise(instance, weights))
