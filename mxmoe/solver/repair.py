"""Greedy moves on a plan: into the limits when it is outside, and down in value when there is room."""

from __future__ import annotations

import numpy as np

from mxmoe.solver.dual import price
from mxmoe.solver.problem import SLACK, Floats, Ints

_ROUNDS = 60
_TINY = 1e-300
_NOTHING = SLACK / 10


def _used(resources: Floats, choice: Ints) -> Floats:
    return resources[:, np.arange(choice.size), choice].sum(axis=1)


def repair(value: Floats, resources: Floats, caps: Floats, multipliers: Floats, choice: Ints) -> Ints | None:
    """
    Move a plan into the limits at the least price, or return None when no single move brings it closer.

    What exceeds the limits, each as a fraction of its cap, falls with every round, so limits are not traded for one
    another without end. A move costs what it adds at the given multipliers, per excess that it takes away.

    Args:
        value: [group, scheme], inf where impossible.
        resources: [limit, group, scheme].
        caps: [limit].
        multipliers: [limit], from the relaxation.
        choice: [group], possible in every cell.
    """
    choice, rows = choice.copy(), np.arange(choice.size)
    priced = price(value, resources, multipliers)
    unit = np.maximum(caps, 1e-6 * resources.max(axis=(1, 2)) + _TINY)[:, None]
    for _ in range(_ROUNDS):
        over = (_used(resources, choice) - caps)[:, None]
        excess = float(np.maximum(over / unit, 0.0).sum())
        if excess <= _NOTHING:
            return choice
        relief = np.full_like(priced, excess)
        for resource, above, one in zip(resources, over, unit, strict=True):
            relief -= np.maximum(resource - resource[rows, choice][:, None] + above, 0.0) / one
        dearer = np.maximum(priced - priced[rows, choice][:, None], 0.0)
        helps = (relief > 1e-15 * (1 + excess)) & np.isfinite(dearer)
        rate = np.divide(dearer, relief, out=np.full_like(dearer, np.inf), where=helps)
        target = rate.argmin(axis=1)
        order = np.argsort(rate[rows, target], kind="stable")
        order = order[np.isfinite(rate[order, target[order]])]
        if not order.size:
            return None
        rises = resources[:, order, target[order]] - resources[:, order, choice[order]]
        left = np.maximum((over + np.cumsum(rises, axis=1)) / unit, 0.0).sum(axis=0)
        enough = int(left.argmin()) + 1
        choice[order[:enough]] = target[order[:enough]]
    return None


def improve(value: Floats, resources: Floats, caps: Floats, choice: Ints) -> Ints:
    """
    Spend what the limits leave, best exchange rate first, until no single move improves the plan.

    Shapes as in `repair`; `choice` is within the limits and so is the result, which is never worse.
    """
    choice, rows = choice.copy(), np.arange(choice.size)
    for _ in range(_ROUNDS):
        room = caps - _used(resources, choice)
        fits = value < value[rows, choice][:, None]
        for resource, left in zip(resources, room, strict=True):
            fits &= resource <= (resource[rows, choice] + left)[:, None]
        group, cell = np.nonzero(fits)
        if not group.size:
            return choice
        rise = resources[:, group, cell] - resources[:, group, choice[group]]
        share = (np.maximum(rise, 0.0) / np.maximum(room, _TINY)[:, None]).sum(axis=0)
        rate = (value[group, choice[group]] - value[group, cell]) / np.maximum(share, 1e-9)
        order = np.argsort(-rate, kind="stable")
        # One move a group, its best.
        order = order[np.sort(np.unique(group[order], return_index=True)[1])]
        # The first always fits alone, so every round gets further.
        fitting = (np.cumsum(rise[:, order], axis=1) <= room[:, None]).all(axis=0)
        taken = order[: max(1, int(np.argmin(fitting)) if not fitting.all() else fitting.size)]
        choice[group[taken]] = cell[taken]
    return choice
