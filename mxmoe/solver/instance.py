"""A problem as solvers see it: one row per choice to be made, linear limits, and tables without holes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mxmoe.errors import MissingCost, NoPossibleScheme
from mxmoe.solver.problem import SLACK, Budget, Floats, Ints, Objective, Problem

Weights = tuple[float, float]
"""(weight of the loss, weight of the time) of a linear objective."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The sums over the rows of each group, which all budgets share."""

    loss: Floats
    """[group, scheme], 0 where impossible."""
    cost: Floats | None
    """[group, scheme] microseconds, 0 where impossible."""
    storage: Floats
    """[group, scheme] bits of codes, scales and zeros."""
    possible: NDArray[np.bool_]
    """[group, scheme]; every group has at least one possible scheme."""
    group: Ints
    """[row] -> group."""
    weights: float
    """Number of weights in all."""

    @classmethod
    def of(cls, problem: Problem) -> Tables:
        """
        Sum the rows of each group.

        Raises:
            NoPossibleScheme: a group without a scheme that is possible for all of its rows.
        """
        numel = np.ones(problem.n_rows) if problem.numel is None else problem.numel
        group = np.arange(problem.n_rows)
        if problem.groups is not None:
            group = np.unique(problem.groups, return_inverse=True)[1].astype(np.int64)
        order, starts = _runs(group)
        loss = np.add.reduceat(problem.loss[order], starts, axis=0)
        cost = None if problem.cost is None else np.add.reduceat(problem.cost[order], starts, axis=0)
        storage = np.add.reduceat((problem.bits * numel[:, None])[order], starts, axis=0)
        possible = np.isfinite(loss) if cost is None else np.isfinite(loss) & np.isfinite(cost)
        hopeless = np.flatnonzero(~possible.any(axis=1))
        if hopeless.size:
            rows = np.flatnonzero(group == hopeless[0])
            names = ", ".join(problem.label(int(row)) for row in rows[:4])
            more = f" and {rows.size - 4} more rows tied to them" if rows.size > 4 else ""
            raise NoPossibleScheme(rows=names + more)
        finite_cost = None if cost is None else np.where(possible, cost, 0.0)
        return cls(np.where(possible, loss, 0.0), finite_cost, storage, possible, group, float(numel.sum()))

    @property
    def shape(self) -> tuple[int, int]:
        """(groups, schemes)."""
        groups, schemes = self.loss.shape
        return groups, schemes

    def resource(self, name: str) -> Floats:
        """Return the [group, scheme] table that a limit adds up: bits for "storage", microseconds for "latency"."""
        if name == "storage":
            return self.storage
        assert self.cost is not None, "checked by Instance.of"
        return self.cost


def _runs(group: Ints) -> tuple[Ints, Ints]:
    """Sort rows by group: the order, and where each group starts in it."""
    order = np.argsort(group, kind="stable")
    return order, np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])


class Point(NamedTuple):
    """What a plan adds up to."""

    loss: float
    latency_us: float
    storage: float
    """Bits."""


class Answer(NamedTuple):
    """What a solver returns: a plan within the limits, and a proved lower bound of what was minimised."""

    choice: Ints
    """[group] index of the scheme."""
    bound: float


@dataclass(frozen=True, eq=False)
class Instance:
    """Minimise loss^r * time^(1-r) over one scheme per group, within upper limits of linear sums."""

    tables: Tables
    r: float
    """Exponent of the loss."""
    caps: Mapping[str, float]
    """Limits by resource, "storage" in bits and "latency" in microseconds, loosened by half of SLACK."""

    @classmethod
    def of(cls, tables: Tables, budget: Budget, objective: Objective) -> Instance:
        """
        Bring budget and objective to the terms of the tables: average bits and bytes are one limit, the lower one.

        Raises:
            MissingCost: time is limited or minimised and there are no costs.
        """
        if tables.cost is None and objective.r < 1:
            raise MissingCost(what=f"objective {str(objective)!r}")
        if tables.cost is None and budget.latency_us is not None:
            raise MissingCost(what="a latency budget")
        both = ((budget.weight_bits, tables.weights), (budget.bytes, 8.0))
        bits = [cap * scale for cap, scale in both if cap is not None]
        caps = {"storage": min(bits)} if bits else {}
        if budget.latency_us is not None:
            caps["latency"] = budget.latency_us
        finite = {name: cap * (1 + SLACK / 2) for name, cap in caps.items() if np.isfinite(cap)}
        return cls(tables, objective.r, finite)

    @property
    def weights(self) -> Weights | None:
        """Weights of the objective when it is linear, else None."""
        return {1.0: (1.0, 0.0), 0.0: (0.0, 1.0)}.get(self.r)

    def values(self, weights: Weights) -> Floats:
        """Price the cells of a linear objective: [group, scheme], inf where impossible."""
        total = weights[0] * self.tables.loss
        if weights[1] and self.tables.cost is not None:
            total += weights[1] * self.tables.cost
        total[~self.tables.possible] = np.inf
        return total

    def measure(self, choice: Ints) -> Point:
        """Add up a plan."""
        rows = np.arange(choice.size)
        tables = (self.tables.loss, self.tables.cost, self.tables.storage)
        return Point(*(0.0 if table is None else float(table[rows, choice].sum()) for table in tables))

    def value(self, choice: Ints) -> float:
        """Evaluate the objective of a plan."""
        point = self.measure(choice)
        return Objective(self.r).value(point.loss, point.latency_us)

    def is_feasible(self, choice: Ints) -> bool:
        """Whether a plan is possible in every cell and meets every limit."""
        if not self.tables.possible[np.arange(choice.size), choice].all():
            return False
        rows = np.arange(choice.size)
        used = {name: float(self.tables.resource(name)[rows, choice].sum()) for name in self.caps}
        # The other half of the slack is for the order in which solvers sum.
        return all(used[name] <= cap * (1 + SLACK / 4) for name, cap in self.caps.items())

    def without(self, *names: str) -> Instance:
        """Lift limits."""
        return replace(self, caps={name: cap for name, cap in self.caps.items() if name not in names})


def best_uniform(instance: Instance) -> Ints | None:
    """Find the best plan that gives every group the same scheme, or None when no such plan meets the limits."""
    tables, objective = instance.tables, Objective(instance.r)
    fits = np.all(tables.possible, axis=0).reshape(-1)
    for name, cap in instance.caps.items():
        fits &= tables.resource(name).sum(axis=0) <= cap
    loss, time = tables.loss.sum(axis=0), np.zeros(fits.size) if tables.cost is None else tables.cost.sum(axis=0)
    value = [objective.value(float(loss[s]), float(time[s])) if fits[s] else np.inf for s in range(fits.size)]
    best = int(np.argmin(value))
    return np.full(tables.shape[0], best, dtype=np.int64) if fits[best] else None
