"""The last step to the optimum: an exact search over the few groups that the relaxation leaves open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe.solver.dual import price
from mxmoe.solver.problem import Floats, Ints


@dataclass(frozen=True, eq=False)
class _Core:
    """The open groups alone."""

    regret: Floats
    """[group, scheme] reduced cost above the relaxation."""
    resources: Floats
    """[limit, group, scheme]."""
    alive: NDArray[np.bool_]
    """[group, scheme] cells that a better plan may hold."""
    room: Floats
    """[limit] what the other groups leave."""
    window: float
    """Most regret that a better plan may gather."""
    multipliers: Floats
    """[limit]."""


@dataclass(frozen=True, eq=False)
class _States:
    """Partial plans over the core groups seen so far."""

    regret: Floats
    """[state] reduced cost above the relaxation."""
    used: Floats
    """[limit, state]."""
    parent: Ints
    """[state] index in the step before."""
    cell: Ints
    """[state] scheme chosen in this step."""


def open_cells(
    value: Floats, resources: Floats, caps: Floats, multipliers: Floats, choice: Ints
) -> tuple[NDArray[np.bool_], float]:
    """
    Find the cells that a plan better than `choice` may hold: [group, scheme], the chosen ones included; and the bound.

    A cell whose reduced cost exceeds the distance between the plan and its bound is in no better plan (Dembo and
    Hammer 1980). Shapes as in `search_core`.
    """
    regret, window = _regret(value, resources, caps, multipliers, choice)
    return _open(regret, window, choice), float(value[np.arange(choice.size), choice].sum()) - window


def _open(regret: Floats, window: float, choice: Ints) -> NDArray[np.bool_]:
    alive = regret <= window
    alive[np.arange(choice.size), choice] = True
    return alive


def _regret(value: Floats, resources: Floats, caps: Floats, multipliers: Floats, choice: Ints) -> tuple[Floats, float]:
    """Compute what each cell costs above the relaxation, and how much of that a better plan can have in all."""
    rows = np.arange(choice.size)
    priced = price(value, resources, multipliers)
    regret = priced - priced[rows, priced.argmin(axis=1)][:, None]
    spare = caps - resources[:, rows, choice].sum(axis=1)
    # Sums of values are exact to about 1e-13 of themselves; a window narrower than that would shut out equals.
    slack = 1e-12 * float(np.abs(value[rows, choice]).sum())
    return regret, float(regret[rows, choice].sum() + multipliers @ spare) + slack


def search_core(
    value: Floats,
    resources: Floats,
    caps: Floats,
    multipliers: Floats,
    choice: Ints,
    *,
    groups: int,
    states: int,
) -> tuple[Ints, bool]:
    """
    Improve a plan by choosing anew, all at once, in the groups where the relaxation is least decided.

    Few groups have more than one open cell. Dynamic programming over those, cut off by the distance between plan and
    bound and by what the limits leave, finds the best plan among them (the core of Pisinger, "A minimal algorithm for
    the multiple-choice knapsack problem", European Journal of Operational Research 83, 1995).

    Args:
        value: [group, scheme], inf where impossible.
        resources: [limit, group, scheme].
        caps: [limit].
        multipliers: [limit], from the relaxation.
        choice: [group], within the limits.
        groups: most groups to open.
        states: most partial plans to keep after each group.

    Returns:
        A plan that is no worse, and whether it is proved optimal: nothing open was left out.
    """
    rows = np.arange(choice.size)
    regret, window = _regret(value, resources, caps, multipliers, choice)
    spare = caps - resources[:, rows, choice].sum(axis=1)
    alive = _open(regret, window, choice)
    is_open = alive.sum(axis=1) > 1
    if not is_open.any():
        return choice, True
    ambiguity = np.where(alive & (choice[:, None] != np.arange(value.shape[1])), regret, np.inf).min(axis=1)
    ranked = np.flatnonzero(is_open)
    complete = ranked.size <= groups
    if not complete:
        near = np.argpartition(ambiguity[ranked], groups)[:groups]
        ranked = np.sort(ranked[near])
    # Large moves first: small ones then fill what is left.
    core = ranked[np.argsort(-np.ptp(resources[:, ranked], axis=2).sum(axis=0), kind="stable")] if caps.size else ranked
    room = spare + resources[:, core, choice[core]].sum(axis=1)
    start = float(regret[rows, choice].sum() - regret[core, choice[core]].sum())
    table = _Core(regret[core], resources[:, core], alive[core], room, window - start, multipliers)
    steps, kept_all = _expand(table, states)
    plan = _best(steps, multipliers, room)
    if plan is None:
        return choice, complete and kept_all
    found = choice.copy()
    found[core] = plan
    better = value[rows, found].sum() < value[rows, choice].sum()
    return (found if better else choice), complete and kept_all


def _expand(core: _Core, most: int) -> tuple[list[_States], bool]:
    """Choose group after group; keep at most `most` states each time and say whether none was dropped."""
    limits = core.room.size
    least = np.where(core.alive, core.resources, np.inf).min(axis=2)
    ahead = np.concatenate([np.cumsum(least[:, ::-1], axis=1)[:, ::-1][:, 1:], np.zeros((limits, 1))], axis=1)
    none = np.zeros(1, dtype=np.int64)
    states, steps, kept_all = _States(np.zeros(1), np.zeros((limits, 1)), none, none), list[_States](), True
    for group in range(core.regret.shape[0]):
        cells = np.flatnonzero(core.alive[group])
        total = (states.regret[:, None] + core.regret[group, cells]).ravel()
        used = (states.used[:, :, None] + core.resources[:, group, cells][:, None, :]).reshape(limits, -1)
        fits = (used <= (core.room - ahead[:, group])[:, None] + 1e-12 * core.room[:, None]).all(axis=0)
        keep = np.flatnonzero((total <= core.window) & fits)
        keep = keep[_undominated(total[keep] - core.multipliers @ used[:, keep], used[:, keep])]
        if keep.size > most:
            kept_all = False
            keep = keep[np.argpartition(total[keep], most)[:most]]
        states = _States(total[keep], used[:, keep], keep // cells.size, cells[keep % cells.size])
        steps.append(states)
    return steps, kept_all


def _undominated(value: Floats, used: Floats) -> Ints:
    """Drop states that another one matches in value and in use; with two limits only exact doubles are dropped."""
    if not value.size:
        return np.zeros(0, dtype=np.int64)
    if used.shape[0] == 1:
        order = np.lexsort((value, used[0]))
        ranked = value[order]
        return order[np.r_[True, ranked[1:] < np.minimum.accumulate(ranked)[:-1]]]
    order = np.lexsort((*used, value))
    keys = np.vstack([value, used])[:, order]
    return order[np.r_[True, (np.diff(keys, axis=1) != 0).any(axis=0)]]


def _best(steps: list[_States], multipliers: Floats, room: Floats) -> Ints | None:
    """Take the final state of least value, which is regret plus the price of what is left unused, and walk back."""
    last = steps[-1]
    if not last.regret.size:
        return None
    state = int((last.regret + multipliers @ (room[:, None] - last.used)).argmin())
    plan: list[int] = []
    for step in reversed(steps):
        plan.append(int(step.cell[state]))
        state = int(step.parent[state])
    return np.array(plan[::-1], dtype=np.int64)
