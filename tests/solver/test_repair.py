"""Greedy moves stay within the limits and never make a plan worse."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.solver.repair import improve, repair


def _case(seed: int, limits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make values, resources, caps, some multipliers, and a plan within the caps."""
    rng = np.random.default_rng(seed)
    value, resources = rng.lognormal(0, 1, (6, 3)), rng.choice([1.0, 2.0, 3.5, 4.25], (limits, 6, 3))
    plan = rng.integers(0, 3, 6)
    caps = resources[:, np.arange(6), plan].sum(axis=1) * rng.uniform(1.0, 1.2, limits)
    return value, resources, caps, rng.lognormal(-1, 1, limits), plan


SEEDS, LIMITS = st.integers(0, 2**32 - 1), st.integers(1, 2)


@settings(max_examples=60, deadline=None)
@given(SEEDS, LIMITS)
def test_improving_stops_where_no_single_move_helps(seed: int, limits: int) -> None:
    value, resources, caps, _, plan = _case(seed, limits)
    found, rows = improve(value, resources, caps, plan), np.arange(6)
    assert value[rows, found].sum() <= value[rows, plan].sum()
    assert (resources[:, rows, found].sum(axis=1) <= caps).all()
    for group, cell in itertools.product(range(6), range(3)):
        moved = found.copy()
        moved[group] = cell
        fits = (resources[:, rows, moved].sum(axis=1) <= caps).all()
        assert not fits or value[group, cell] >= value[group, found[group]] * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_a_plan_outside_one_limit_is_always_brought_inside(seed: int) -> None:
    value, resources, caps, multipliers, _ = _case(seed, 1)
    found = repair(value, resources, caps, multipliers, value.argmin(axis=1))
    assert found is not None
    assert resources[0, np.arange(6), found].sum() <= caps[0] * (1 + 1e-12)


def test_a_limit_that_nothing_meets_is_not_repaired() -> None:
    value, resources = np.array([[1.0, 2.0]]), np.array([[[3.0, 2.0]]])
    assert repair(value, resources, np.array([1.0]), np.array([1.0]), np.array([0])) is None
