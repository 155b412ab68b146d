"""Greedy moves on a plan: into the limits when it is outside, and down in value when there is room."""

from __future__ import annotations

import numpy as np

from mxmoe.solver.dual import price
from mxmoe.solver.problem import Floats, Ints

_ROUNDS = 60
_TINY = 1e-300


def _used(resources: Floats, choice: Ints) -> Floats:
    return resources[:, np.arange(choice.size), choice].sum(axis=1)


def repair(value: Floats, resources: Floats, caps: Floats, multipliers: Floats, choice: Ints) -> Ints | None:
    """
    Move a plan into the limits at the least price, or return None when that does not work out.

    Each round takes the limit that is exceeded most and moves groups, cheapest first, until it holds. A move costs
    what it adds at the given multipliers, so a limit that is scarce is not traded away for another.

    Args:
        value: [group, scheme], inf where impossible.
        resources: [limit, group, scheme].
        caps: [limit].
        multipliers: [limit], from the relaxation.
        choice: [group], possible in every cell.
    """
    choice, rows = choice.copy(), np.arange(choice.size)
    priced = price(value, resources, multipliers)
    for _ in range(_ROUNDS):
        over = _used(resources, choice) - caps
        if (over <= 0).all():
            return choice
        worst = int((over / np.maximum(caps, _TINY)).argmax())
        relief = resources[worst][rows, choice][:, None] - resources[worst]
        dearer = np.maximum(priced - priced[rows, choice][:, None], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where((relief > 0) & np.isfinite(dearer), dearer / relief, np.inf)
        target = rate.argmin(axis=1)
        order = np.argsort(rate[rows, target], kind="stable")
        order = order[np.isfinite(rate[order, target[order]])]
        if not order.size:
            return None
        enough = np.searchsorted(np.cumsum(relief[order, target[order]]), over[worst]) + 1
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
        gain = value[rows, choice][:, None] - value
        rise = resources - resources[:, rows, choice][:, :, None]
        fits = (gain > 0) & (rise <= room[:, None, None]).all(axis=0)
        share = (np.maximum(rise, 0.0) / np.maximum(room, _TINY)[:, None, None]).sum(axis=0)
        rate = np.where(fits, gain / np.maximum(share, 1e-9), 0.0)
        target = rate.argmax(axis=1)
        order = np.argsort(-rate[rows, target], kind="stable")
        order = order[rate[order, target[order]] > 0]
        if not order.size:
            return choice
        # The first always fits alone, so every round gets further.
        fitting = (np.cumsum(rise[:, order, target[order]], axis=1) <= room[:, None]).all(axis=0)
        taken = max(1, int(np.argmin(fitting)) if not fitting.all() else fitting.size)
        choice[order[:taken]] = target[order[:taken]]
    return choice
