"""The sorted hull steps answer the linear relaxation for every limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.solver.dual import relax
from mxmoe.solver.staircase import Staircase, bracket


def _tables(seed: int, groups: int, schemes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    value, resource = (
        rng.lognormal(0, 2, (groups, schemes)),
        rng.choice([2.25, 3.25, 4.25, 8.0, 16.0], (groups, schemes)),
    )
    value[rng.random(value.shape) < 0.1] = np.inf
    value[:, 0] = rng.random(groups)
    return value, resource


def test_the_steps_of_one_hull() -> None:
    stairs = Staircase.build(np.array([[9.0, 3.0, 2.0, 9.5]]), np.array([[1.0, 2.0, 3.0, 2.5]]))
    assert stairs.start.tolist() == [0]
    assert stairs.target.tolist() == [1, 2]
    assert stairs.slope.tolist() == [6.0, 1.0]
    assert stairs.used.tolist() == [2.0, 3.0]
    choice, multiplier = stairs.cut(2.5)
    assert (choice.tolist(), multiplier) == ([1], 1.0)
    assert stairs.cut(3.0)[1] == 0.0


def test_of_cells_of_equal_resource_the_better_one_is_the_start() -> None:
    stairs = Staircase.build(np.array([[5.0, 4.0, 1.0]]), np.array([[2.0, 2.0, 9.0]]))
    assert stairs.start.tolist() == [1]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5), st.floats(0, 1))
def test_a_cut_fits_and_its_multiplier_is_the_best_there_is(seed: int, groups: int, schemes: int, share: float) -> None:
    value, resource = _tables(seed, groups, schemes)
    stairs = Staircase.build(value, resource)
    rows = np.arange(groups)
    low = resource[rows, stairs.start].sum()
    cap = low + share * (resource.max(axis=1).sum() - low)
    choice, multiplier = stairs.cut(cap)
    assert resource[rows, choice].sum() <= cap * (1 + 1e-12)
    assert (np.diff(stairs.slope) <= 0).all()
    limits = value, resource[None], np.array([cap])
    best, at_best = relax(*limits, np.array([multiplier]))
    # The dual is piecewise linear: its maximum lies at a slope of a hull, or at zero.
    others = [relax(*limits, np.array([m]))[0] for m in [0.0, *stairs.slope.tolist()]]
    assert best >= max(others) - 1e-9 * abs(best)
    priced = value + multiplier * resource
    assert priced[rows, choice].sum() == pytest.approx(priced[rows, at_best].sum(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.sampled_from([0.0, 1e-6, 0.3, 1e6]))
def test_a_bracket_changes_nothing_but_the_time(seed: int, share: float, guess: float) -> None:
    value, resource = _tables(seed, 200, 5)
    whole = Staircase.build(value, resource)
    low = resource[np.arange(200), whole.start].sum()
    cap = low + share * (whole.used[-1] - low)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxmoe.solver.staircase._FEW", 10)
        between = bracket(value, resource, cap, guess)
    part = Staircase.build(value, resource, between)
    assert part.target.size < whole.target.size
    (choice, multiplier), (expected, best) = part.cut(cap), whole.cut(cap)
    assert multiplier == pytest.approx(best)
    assert (choice == expected).all()
