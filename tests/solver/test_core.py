"""The core search is exact when nothing is left out, and never loses anything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.solver.core import open_cells, search_core
from mxmoe.solver.dual import relax


def _case(seed: int, limits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make values, resources, caps, some multipliers, and a plan within the caps."""
    rng = np.random.default_rng(seed)
    value, resources = rng.lognormal(0, 1, (6, 3)), rng.choice([1.0, 2.0, 3.5, 4.25], (limits, 6, 3))
    plan = rng.integers(0, 3, 6)
    caps = resources[:, np.arange(6), plan].sum(axis=1) * rng.uniform(1.0, 1.2, limits)
    return value, resources, caps, rng.lognormal(-1, 1, limits), plan


def _best(value: np.ndarray, resources: np.ndarray, caps: np.ndarray) -> float:
    rows = np.arange(6)
    plans = [p for p in itertools.product(range(3), repeat=6) if (resources[:, rows, p].sum(axis=1) <= caps).all()]
    return min(float(value[rows, p].sum()) for p in plans)


SEEDS, LIMITS = st.integers(0, 2**32 - 1), st.integers(1, 2)


@settings(max_examples=80, deadline=None)
@given(SEEDS, LIMITS)
def test_with_everything_open_the_optimum_is_found_and_proved(seed: int, limits: int) -> None:
    value, resources, caps, multipliers, plan = _case(seed, limits)
    found, optimal = search_core(value, resources, caps, multipliers, plan, groups=6, states=10_000)
    assert optimal
    assert value[np.arange(6), found].sum() == pytest.approx(_best(value, resources, caps), rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(SEEDS, LIMITS, st.integers(1, 5), st.sampled_from([1, 2, 50]))
def test_with_less_open_nothing_is_lost_or_claimed(seed: int, limits: int, groups: int, states: int) -> None:
    value, resources, caps, multipliers, plan = _case(seed, limits)
    rows = np.arange(6)
    found, optimal = search_core(value, resources, caps, multipliers, plan, groups=groups, states=states)
    assert (resources[:, rows, found].sum(axis=1) <= caps * (1 + 1e-9)).all()
    assert value[rows, found].sum() <= value[rows, plan].sum() * (1 + 1e-12)
    if optimal:
        assert value[rows, found].sum() == pytest.approx(_best(value, resources, caps), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS, LIMITS)
def test_closed_cells_are_in_no_better_plan(seed: int, limits: int) -> None:
    value, resources, caps, multipliers, plan = _case(seed, limits)
    (alive, bound), rows = open_cells(value, resources, caps, multipliers, plan), np.arange(6)
    assert bound == pytest.approx(relax(value, resources, caps, multipliers)[0], rel=1e-9, abs=1e-9)
    assert alive[rows, plan].all()
    for other in itertools.product(range(3), repeat=6):
        within = (resources[:, rows, other].sum(axis=1) <= caps).all()
        if within and value[rows, other].sum() < value[rows, plan].sum() * (1 - 1e-9):
            assert alive[rows, other].all()
