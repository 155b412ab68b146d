"""The product objective loss^r * time^(1-r), for any solver that can minimise a weighted sum of loss and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mxmoe.solver.instance import Answer, Instance, Point, Weights
from mxmoe.solver.problem import Floats, Ints, Objective

Minimise = Callable[[Weights], Answer | None]
"""Weights -> a plan within the limits and a lower bound of weight_loss * loss + weight_time * time; None: no plan."""

_LINES = 96
_ENOUGH = 1e-9


@dataclass(eq=False)
class _Front:
    """Lines that no plan lies below, and the plans found on the way."""

    instance: Instance
    weights: list[Weights] = field(default_factory=list[Weights])
    bounds: list[float] = field(default_factory=list[float])
    points: list[Point] = field(default_factory=list[Point])
    plans: list[Ints] = field(default_factory=list["Ints"])

    def add(self, weights: Weights, answer: Answer) -> None:
        """Take one answer in."""
        self.weights.append(weights)
        self.bounds.append(answer.bound)
        self.points.append(self.instance.measure(answer.choice))
        self.plans.append(answer.choice)

    def value(self, point: Point) -> float:
        return Objective(self.instance.r).value(point.loss, point.latency_us)

    def doubt(self, lines: Ints) -> float:
        """Say how far below the plans found on them two lines lie, relatively: more precise no corner of theirs is."""
        reached = [np.dot(self.weights[i], self.points[i][:2]) for i in lines]
        return max(1 - self.bounds[i] / total if total > 0 else 0.0 for total, i in zip(reached, lines, strict=True))

    def corners(self) -> tuple[Floats, Ints]:
        """Find the corners of the region above all lines: [corner, (loss, time)] and the two lines through each."""
        normal, offset = np.array(self.weights), np.array(self.bounds)
        first, second = np.triu_indices(offset.size, 1)
        det = normal[first, 0] * normal[second, 1] - normal[first, 1] * normal[second, 0]
        keep = det != 0
        first, second, det = first[keep], second[keep], det[keep]
        loss = (offset[first] * normal[second, 1] - normal[first, 1] * offset[second]) / det
        time = (normal[first, 0] * offset[second] - offset[first] * normal[second, 0]) / det
        found = np.stack([loss, time], axis=1)
        # A corner admitted by rounding only lowers the bound.
        inside = (found @ normal.T >= offset - 1e-12 * np.abs(offset)).all(axis=1)
        return found[inside], np.stack([first, second], axis=1)[inside]


def minimise_product(instance: Instance, minimise: Minimise, guess: float = 0.0) -> Answer | None:
    """
    Minimise loss^r * time^(1-r), 0 < r < 1, by a sweep of weighted sums.

    The objective is concave in (loss, time), so over the plans within the limits it is least at a vertex of the lower
    convex hull of their points, and every such vertex minimises some weighted sum under the same limits. Each
    weighted sum solved gives a line that no plan lies below; the objective, concave and increasing, is least over the
    region above all lines at one of its corners, and that is the bound. The next sum is the one that cuts off the
    lowest corner, until no corner is lower than the best plan by more than a relative 1e-9.

    What this guarantees: with a solver whose sums are exact the plan is optimal (gap below 1e-9). With a relaxation,
    a limit that binds makes the lines those of the relaxed hull: the bound stays proved, and the gap says what the
    plan could lose at most. Without limits the relaxation is exact. Should 96 sums not close the gap, it is reported.
    `guess` is the `tangent` at the answer to a similar question, if one is known.
    """
    front = _Front(instance)
    for weights in ((1.0, 0.0), (0.0, 1.0), (guess, 1.0))[: 3 if 0 < guess < np.inf else 2]:
        answer = minimise(weights)
        if answer is None:
            return None
        front.add(weights, answer)
    closed: set[tuple[int, int]] = set()
    while True:
        values = [front.value(point) for point in front.points]
        best = int(np.argmin(values))
        if values[best] == 0:
            return Answer(front.plans[best], 0.0)
        corners, lines = front.corners()
        heights = [front.value(Point(max(loss, 0.0), max(time, 0.0), 0.0)) for loss, time in corners.tolist()]
        bound = min(heights, default=0.0)
        open_corners = [
            i
            for i in np.argsort(heights).tolist()
            if 1 - heights[i] / values[best] > max(_ENOUGH, 2 * front.doubt(lines[i])) and _key(lines[i]) not in closed
        ]
        if not open_corners or len(front.weights) >= _LINES:
            return Answer(front.plans[best], min(bound, values[best]))
        corner = open_corners[0]
        weights = _next_weights(front, best, corners[corner], lines[corner])
        answer = None if weights is None else minimise(weights)
        if weights is None or answer is None:
            closed.add(_key(lines[corner]))
            continue
        reached = weights[0] * corners[corner, 0] + weights[1] * corners[corner, 1]
        if answer.bound <= reached * (1 + 1e-12):
            closed.add(_key(lines[corner]))
        front.add(weights, answer)


def tangent(instance: Instance, choice: Ints) -> float:
    """Give the weight of the loss, that of time being 1, at which the objective is constant around a plan."""
    point = instance.measure(choice)
    return _ratio(instance.r * point.latency_us, (1 - instance.r) * point.loss)


def _key(lines: Ints) -> tuple[int, int]:
    return int(lines[0]), int(lines[1])


def _next_weights(front: _Front, best: int, corner: Floats, lines: Ints) -> Weights | None:
    """
    Pick weights between those of the two lines through a corner.

    The tangent of the objective at the best plan comes first: a plan that is better in that sum is better in the
    objective. Then the tangent at the corner itself, which cuts deepest where the objective is low, and the chord
    between the plans found on the two lines.
    """
    (low, high) = sorted(_slope(front.weights[line]) for line in lines)
    a, b = (front.points[line] for line in lines)
    point, r = front.points[best], front.instance.r
    chord = _ratio(a.latency_us - b.latency_us, b.loss - a.loss)
    tangents = (_ratio(r * time, (1 - r) * loss) for loss, time in (point[:2], corner))
    slopes = [*tangents, chord]
    if np.isfinite(high):
        slopes.append(np.sqrt(low * high) if low > 0 else high / 16)
    else:
        slopes.append(max(low, 1e-12) * 16)
    known = np.array([_slope(weights) for weights in front.weights])
    for slope in slopes:
        if low * (1 + 1e-9) < slope < high * (1 - 1e-9) and not np.isclose(known, slope, rtol=1e-9, atol=0).any():
            return float(slope), 1.0
    return None


def _slope(weights: Weights) -> float:
    return _ratio(weights[0], weights[1])


def _ratio(above: float, below: float) -> float:
    """Divide; inf when there is nothing to divide by, and -1, which lies between no two slopes, when both vanish."""
    if below == 0:
        return np.inf if above > 0 else -1.0
    return float(above / below)
