"""The default solver: Lagrangian multipliers for the limits, greedy repair, and an exact search over the open core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mxmoe.errors import BadSolverOption
from mxmoe.solver.base import LinearSolver
from mxmoe.solver.core import open_cells, search_core
from mxmoe.solver.dual import best_multipliers, relax
from mxmoe.solver.instance import Answer, Instance, Weights, best_uniform
from mxmoe.solver.problem import Floats, Ints
from mxmoe.solver.product import minimise_product, tangent
from mxmoe.solver.repair import improve, repair
from mxmoe.solver.staircase import Staircase, bracket

_DEARER = (1.0, 1.001, 1.1, 4.0)
"""Factors on the multipliers: where the plan next to the best ones cannot be repaired, a thriftier one may."""


@dataclass(frozen=True)
class Lagrangian(LinearSolver):
    """
    Any size in fractions of a second, always with a proved bound; in practice optimal on small instances.

    The choice is a multiple-choice knapsack. The limits are moved into the objective with multipliers; for given ones
    each group decides alone, and the result bounds every plan from below (Fisher 1981). With one limit the best
    multiplier comes from sorting the steps of all lower hulls (Sinha and Zoltners 1979), with two from cutting planes.
    The plan next to it is repaired, improved by single moves, and searched exactly over its undecided core.

    Raises:
        BadSolverOption: `core` or `states` below 1.
    """

    core: int = 48
    """Most groups to choose anew all at once in the last step."""
    states: int = 512
    """Most partial plans kept in the last step."""
    _guess: dict[str, float] = field(default_factory=dict[str, float], init=False, repr=False, compare=False)
    """Multipliers by limit, and the slope of the product: where the next, similar question is likely answered."""

    name: ClassVar[str] = "lagrangian"
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for option in ("core", "states"):
            if getattr(self, option) < 1:
                raise BadSolverOption(solver=self.name, reason=f"{option}={getattr(self, option)} should be at least 1")

    def solve(self, instance: Instance) -> Answer | None:
        """Solve for any objective; see `minimise_product` for the product."""
        if instance.weights is not None:
            return self.minimise(instance, instance.weights)
        guess = self._guess.get("slope", 0.0)
        answer = minimise_product(instance, lambda weights: self.minimise(instance, weights), guess)
        if answer is not None:
            self._guess["slope"] = tangent(instance, answer.choice)
        return answer

    def minimise(self, instance: Instance, weights: Weights) -> Answer | None:
        """Minimise a weighted sum of loss and time; see `LinearSolver`."""
        if weights[0] == 0:
            return self._fastest(instance, weights)
        value = instance.values(weights)
        names = _binding_candidates(instance, value)
        if not names:
            return _free(value)
        if len(names) == 1:
            return self._one_limit(instance, value, names[0])
        for name in names:
            # Often one of two limits implies the other.
            choice, multiplier = self._cut(instance, value, name)
            if instance.is_feasible(choice):
                return self._finish(instance, value, names, np.where(np.array(names) == name, multiplier, 0.0), choice)
        return self._two_limits(instance, value)

    def _fastest(self, instance: Instance, weights: Weights) -> Answer | None:
        """Minimise time: a latency limit then only says whether the answer will do."""
        relaxed = instance.without("latency")
        value = relaxed.values(weights)
        answer = self._one_limit(relaxed, value, "storage") if relaxed.caps else _free(value)
        if answer is None or not instance.is_feasible(answer.choice):
            return None
        return Answer(_less_loss(relaxed, value, answer.choice), answer.bound)

    def _cut(self, instance: Instance, value: Floats, name: str) -> tuple[Ints, float]:
        """Solve the relaxation with one limit: a plan within it, and its multiplier."""
        resource, cap = instance.tables.resource(name), instance.caps[name]
        between = bracket(value, resource, cap, self._guess.get(name, 0.0))
        choice, multiplier = Staircase.build(value, resource, between).cut(cap)
        self._guess[name] = multiplier
        return choice, multiplier

    def _one_limit(self, instance: Instance, value: Floats, name: str) -> Answer | None:
        choice, multiplier = self._cut(instance, value, name)
        if not instance.is_feasible(choice):
            return None
        return self._finish(instance, value, [name], np.array([multiplier]), choice)

    def _two_limits(self, instance: Instance, value: Floats) -> Answer | None:
        """Find both multipliers, then a plan near them that meets both limits."""
        names = sorted(instance.caps)
        resources, caps = _limits(instance, names)
        multipliers = best_multipliers(value, resources, caps)
        plan = None
        for factor in _DEARER:
            if plan is None:
                nearest = relax(value, resources, caps, factor * multipliers)[1]
                plan = repair(value, resources, caps, multipliers, nearest)
        for fallback in (best_uniform, self._any_plan):
            plan = fallback(instance) if plan is None else plan
        return None if plan is None else self._finish(instance, value, names, multipliers, plan)

    def _any_plan(self, instance: Instance) -> Ints | None:
        """Look for a plan within two limits by minimising what one adds up under the other."""
        for kept, other in (("storage", "latency"), ("latency", "storage")):
            value = np.where(instance.tables.possible, instance.tables.resource(other), np.inf)
            answer = Lagrangian(self.core, self.states)._one_limit(instance.without(other), value, kept)
            if answer is not None and instance.is_feasible(answer.choice):
                return answer.choice
        return None

    def _finish(self, instance: Instance, value: Floats, names: list[str], multipliers: Floats, plan: Ints) -> Answer:
        """Improve a plan, search the core around it, and say what is proved; only open groups are looked at."""
        resources, caps = _limits(instance, names)
        alive, bound = open_cells(value, resources, caps, multipliers, plan)
        few = np.flatnonzero(alive.sum(axis=1) > 1)
        rest = np.delete(np.arange(plan.size), few)
        left = caps - resources[:, rest, plan[rest]].sum(axis=1)
        inner = np.where(alive[few], value[few], np.inf), resources[:, few], left
        better = improve(*inner, plan[few])
        better, optimal = search_core(*inner, multipliers, better, groups=self.core, states=self.states)
        plan = plan.copy()
        plan[few] = better
        reached = float(value[np.arange(plan.size), plan].sum())
        return Answer(plan, reached if optimal else min(reached, bound))


def _limits(instance: Instance, names: list[str]) -> tuple[Floats, Floats]:
    """Stack the limits of those names: [limit, group, scheme] and [limit]."""
    resources = np.stack([instance.tables.resource(name) for name in names])
    return resources, np.array([instance.caps[name] for name in names])


def _binding_candidates(instance: Instance, value: Floats) -> list[str]:
    """Name the limits that the unlimited optimum exceeds, or all of them when it exceeds any."""
    return list(instance.caps) if not instance.is_feasible(value.argmin(axis=1)) else []


def _free(value: Floats) -> Answer:
    choice = value.argmin(axis=1)
    return Answer(choice, float(value[np.arange(choice.size), choice].sum()))


def _less_loss(instance: Instance, value: Floats, choice: Ints) -> Ints:
    """Among cells as fast as the chosen one and no larger, take the one of least loss: times tie often."""
    rows, storage = np.arange(choice.size), instance.tables.storage
    equal = (value == value[rows, choice][:, None]) & (storage <= storage[rows, choice][:, None])
    return np.where(equal, instance.tables.loss, np.inf).argmin(axis=1)
