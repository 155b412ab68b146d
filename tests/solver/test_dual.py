"""Multipliers: every one bounds, and the cutting planes find the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.solver.dual import best_multipliers, price, relax


def _tables(seed: int, groups: int = 4, schemes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    value, resources = rng.lognormal(0, 1, (groups, schemes)), rng.uniform(1, 9, (2, groups, schemes))
    middle = resources[:, np.arange(groups), rng.integers(0, schemes, groups)].sum(axis=1)
    return value, resources, middle * rng.uniform(1.0, 1.1, 2)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(st.floats(0, 100), st.floats(0, 100)))
def test_any_multipliers_bound_every_plan(seed: int, multipliers: tuple[float, float]) -> None:
    value, resources, caps = _tables(seed)
    bound, _ = relax(value, resources, caps, np.array(multipliers))
    rows = np.arange(4)
    for plan in itertools.product(range(3), repeat=4):
        if (resources[:, rows, plan].sum(axis=1) <= caps).all():
            assert value[rows, plan].sum() >= bound - 1e-9 * (1 + abs(bound))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_other_multipliers_bound_better(seed: int, other: int) -> None:
    limits = _tables(seed, groups=12)
    found = best_multipliers(*limits)
    best, _ = relax(*limits, found)
    rng = np.random.default_rng(other)
    near = found * rng.lognormal(0, 0.1, (50, 2))
    far = rng.lognormal(0, 3, (50, 2))
    edges = np.concatenate([far * [1, 0], far * [0, 1], np.zeros((1, 2))])
    assert (found >= 0).all()
    for multipliers in np.concatenate([near, far, edges]):
        assert relax(*limits, multipliers)[0] <= best + 1e-7 * abs(best)


def test_limits_that_exclude_each_other_end() -> None:
    value, resources = np.array([[3.0, 1.0]]), np.array([[[4.0, 8.0]], [[9.0, 2.0]]])
    caps = np.array([5.0, 5.0])
    bound, _ = relax(value, resources, caps, best_multipliers(value, resources, caps))
    assert bound > 1e6


def test_a_price_is_the_value_and_what_is_used() -> None:
    assert price(np.array([[1.0]]), np.array([[[2.0]], [[3.0]]]), np.array([10.0, 100.0])).tolist() == [[321.0]]
    assert relax(np.array([[1.0, 5.0]]), np.array([[[2.0, 0.0]]]), np.array([1.0]), np.array([4.0]))[
        0
    ] == pytest.approx(1.0)
