"""Several limits: the multipliers that give the best Lagrangian bound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mxmoe.solver.problem import Floats, Ints

_STEPS = 120
_ENOUGH = 1e-11
_FAR = 1e-10


def price(value: Floats, resources: Floats, multipliers: Floats) -> Floats:
    """Charge every cell for what it uses: value + sum_k multiplier_k * resource_k; shapes as in `relax`."""
    priced = value
    for multiplier, resource in zip(multipliers, resources, strict=True):
        priced = priced + multiplier * resource
    return priced


def relax(value: Floats, resources: Floats, caps: Floats, multipliers: Floats) -> tuple[float, Ints]:
    """
    Evaluate the Lagrangian relaxation, a lower bound of every plan within the caps for any multipliers >= 0.

    min over plans of value + sum_k multiplier_k * (resource_k - cap_k); Fisher, "The Lagrangian relaxation method
    for solving integer programming problems", Management Science 27, 1981.

    Args:
        value: [group, scheme], inf where impossible.
        resources: [limit, group, scheme].
        caps: [limit].
        multipliers: [limit], in units of value per unit of resource.

    Returns:
        The bound, and the [group] plan that attains it.
    """
    priced = price(value, resources, multipliers)
    choice = priced.argmin(axis=1)
    return float(priced[np.arange(choice.size), choice].sum() - multipliers @ caps), choice


def best_multipliers(value: Floats, resources: Floats, caps: Floats) -> Floats:
    """
    Maximise the relaxation over two multipliers >= 0; shapes as in `relax`.

    The dual is concave. Each evaluation rules out a half plane, and the next point is the centre of gravity of what
    is left (Levin 1965, Newman 1965), so the area shrinks by more than a third a step. The whole quadrant is one
    triangle p + q <= 1 in projective coordinates multiplier = scale * (p, q) / (1 - p - q), where half planes remain
    half planes: no bound on the multipliers is needed beforehand.
    """
    finite = np.isfinite(value)
    spread = np.where(finite, value, -np.inf).max(axis=1) - value.min(axis=1)
    scale = np.maximum(spread.sum(), 1e-300) / np.maximum(np.ptp(resources, axis=2).sum(axis=1), 1e-300)
    rows = np.arange(value.shape[0])

    def evaluate(point: Floats) -> tuple[float, Floats, Floats]:
        multipliers = scale * point / (1 - point.sum())
        bound, choice = relax(value, resources, caps, multipliers)
        return bound, resources[:, rows, choice].sum(axis=1) - caps, multipliers

    return _centre_cuts(evaluate, scale)


def _centre_cuts(evaluate: Callable[[Floats], tuple[float, Floats, Floats]], scale: Floats) -> Floats:
    """Cut the triangle at its centre of gravity until the part left can improve the bound no further."""
    region = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    best, winner = -np.inf, np.zeros(2)
    for _ in range(_STEPS):
        point = _centroid(region)
        if 1 - point.sum() < _FAR:  # no plan meets both limits, or hardly one: the bound grows without end
            break
        bound, slope, multipliers = evaluate(point)
        if bound > best:
            best, winner = bound, multipliers
        # The concave dual lies below its tangent: only where that reaches the best bound can the maximum be.
        offset = slope @ multipliers + (best - bound)
        normal = slope * scale + offset
        room = 1 - region.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            tangent = bound + (region * scale / room[:, None]) @ slope - slope @ multipliers
        region = _clip(region, region @ normal - offset)
        if len(region) < 3 or np.nanmax(np.where(room > 0, tangent, np.inf)) <= best + _ENOUGH * abs(best):
            break
    return winner


def _centroid(region: Floats) -> Floats:
    """Find the centre of gravity of a convex polygon; of its corners when it has no area left."""
    origin = region[0]
    a, b = region[1:-1] - origin, region[2:] - origin
    areas = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    if not areas.sum() > 0:
        return region.mean(axis=0)
    return origin + (areas[:, None] * (a + b)).sum(axis=0) / (3 * areas.sum())


def _clip(region: Floats, height: Floats) -> Floats:
    """Keep the part of a convex polygon where `height`, given at its corners, is not negative."""
    kept: list[Floats] = []
    for i in range(len(region)):
        j = (i + 1) % len(region)
        if height[i] >= 0:
            kept.append(region[i])
        if (height[i] >= 0) != (height[j] >= 0):
            kept.append(region[i] + (region[j] - region[i]) * (height[i] / (height[i] - height[j])))
    return np.array(kept).reshape(-1, 2)
