"""One limit: the linear relaxation of the multiple-choice knapsack, solved exactly for all limits at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mxmoe.solver.problem import Floats, Ints

_STEEPEST = 1e300
_FEW = 4096
_TRIES = 48


def bracket(value: Floats, resource: Floats, cap: float, guess: float = 0.0) -> tuple[float, float]:
    """
    Find multipliers, high and low, that use at most and at least `cap`, with few groups deciding differently.

    A walk of the hulls between the two is then short. `guess` is a multiplier that was best for a similar question, if
    one is known. Small instances are not worth the search and get (inf, 0). Shapes as in `Staircase.build`.
    """
    high, low = np.inf, 0.0
    rows, few = np.arange(value.shape[0]), max(_FEW, value.shape[0] // 16)
    at_high, at_low = None, value.argmin(axis=1)
    if rows.size <= few:
        return high, low
    if guess <= 0:
        spread = value[rows, _least(value, resource)] - value[rows, at_low]
        guess = float(spread.sum() / max(float(np.ptp(resource, axis=1).sum()), 1e-300)) or 1.0
    factor = 1.2
    for _ in range(_TRIES):
        choice = (value + guess * resource).argmin(axis=1)
        if float(resource[rows, choice].sum()) <= cap:
            high, at_high = guess, choice
        else:
            low, at_low = guess, choice
        if at_high is not None and int(np.count_nonzero(at_high != at_low)) <= few:
            break
        if np.isinf(high) or low == 0:
            guess, factor = (guess * factor if np.isinf(high) else guess / factor), factor**1.5
        else:
            guess = float(np.sqrt(high * low))
    return high, low


@dataclass(frozen=True, eq=False)
class Staircase:
    """
    The moves that lead from the plan of least resource to the plan of least value, best exchange rate first.

    Each group walks the lower convex hull of its (resource, value) points; sorting the steps of all hulls by slope
    makes every prefix an optimum of the linear relaxation (Sinha and Zoltners, "The multiple-choice knapsack
    problem", Operations Research 27, 1979). Points (1, 9), (2, 3), (3, 2) of one group give the moves
    1 -> 2 with slope 6 and 2 -> 3 with slope 1; a limit of 2.5 takes the first, and its multiplier is 1.
    """

    start: Ints
    """[group] the cell of least resource, and of least value among those."""
    group: Ints
    """[move] which group moves."""
    target: Ints
    """[move] the cell it moves to."""
    slope: Floats
    """[move] value saved per unit of resource, descending."""
    low: float
    """Multiplier once all moves are made."""
    used: Floats
    """[move] resource of the plan once this move is made, ascending."""

    @classmethod
    def build(cls, value: Floats, resource: Floats, between: tuple[float, float] = (np.inf, 0.0)) -> Staircase:
        """
        Walk all hulls at once.

        Args:
            value: [group, scheme], inf where impossible.
            resource: [group, scheme].
            between: the multipliers, high and low, between which moves are wanted; all by default. Limits that lie
                between the resources used at those two are then answered as by the whole staircase.
        """
        high, low = between
        start = _least(value, resource) if np.isinf(high) else (value + high * resource).argmin(axis=1)
        rows = np.arange(start.size)
        base = float(resource[rows, start].sum())
        here = rows if low == 0 else np.flatnonzero((value + low * resource).argmin(axis=1) != start)
        steps = [(here[:0], start[:0], np.zeros(0), np.zeros(0))]
        cell, last = start[here], np.full(here.size, min(high, _STEEPEST))
        while here.size:
            slope, target, rise = _steepest(value[here], resource[here], cell)
            moves = slope > low
            here, cell, rise = here[moves], target[moves], rise[moves]
            # Rounding may turn a hull by an ulp; a step that sorts before the one it follows would be lost.
            last = np.minimum(slope[moves], last[moves])
            steps.append((here, cell, last, rise))
        group, target, slope, rise = (np.concatenate(parts) for parts in zip(*steps, strict=True))
        # Equal slopes go by group, so that the plan does not depend on where the walk began.
        order = np.lexsort((group, -slope))
        return cls(start, group[order], target[order], slope[order], low, base + np.cumsum(rise[order]))

    def cut(self, cap: float) -> tuple[Ints, float]:
        """Take all moves that fit below `cap` in order: a plan, and the multiplier that proves it nearly best."""
        taken = int(np.searchsorted(self.used, cap, side="right"))
        choice = self.start.copy()
        # Later moves of a group overwrite earlier ones.
        choice[self.group[:taken]] = self.target[:taken]
        return choice, float(self.slope[taken]) if taken < self.slope.size else self.low


def _least(value: Floats, resource: Floats) -> Ints:
    bare = np.where(np.isfinite(value), resource, np.inf)
    floor = bare[np.arange(bare.shape[0]), bare.argmin(axis=1)]
    return np.where(bare == floor[:, None], value, np.inf).argmin(axis=1)


def _steepest(value: Floats, resource: Floats, cell: Ints) -> tuple[Floats, Ints, Floats]:
    """Find each group's next hull vertex: the steepest fall in value, the farthest of equals; slope 0 ends the walk."""
    rows = np.arange(cell.size)
    fall = value[rows, cell][:, None] - value
    rise = resource - resource[rows, cell][:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slopes = np.where((fall > 0) & (rise > 0), np.minimum(fall / rise, _STEEPEST), 0.0)
    slope = slopes[rows, slopes.argmax(axis=1)]
    target = np.where(slopes == slope[:, None], rise, -np.inf).argmax(axis=1)
    return slope, target, rise[rows, target]
