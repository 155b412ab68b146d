"""Laws of longest-first scheduling."""

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.cost import longest_first
from mxmoe.errors import BadWorkload

DURATIONS = st.lists(st.floats(0, 1e3, allow_nan=False), max_size=40)
SLOTS = st.integers(1, 9)


def test_example() -> None:
    got = longest_first([3, 3, 2, 2, 2], 2)
    assert (got.makespan_us, got.busy_us, got.waves, got.tail_us) == (7, 12, 2.5, 1)
    assert got.assignment == (0, 1, 0, 1, 0)


@settings(max_examples=100, deadline=None)
@given(DURATIONS, SLOTS)
def test_makespan_bounds(durations: list[float], slots: int) -> None:
    got = longest_first(durations, slots)
    loads = np.zeros(slots)
    for tile, slot in enumerate(got.assignment):
        loads[slot] += durations[tile]
    assert got.makespan_us == pytest.approx(loads.max(), rel=1e-12)
    assert got.makespan_us >= max([*durations, sum(durations) / slots]) * (1 - 1e-12)
    # Graham's bound for any list schedule, in terms that need no optimum
    assert got.makespan_us <= sum(durations) / slots + max(durations, default=0) * (1 + 1e-9)
    assert got.tail_us >= -1e-9 * got.makespan_us


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_within_four_thirds_of_the_optimum(durations: list[int], slots: int) -> None:
    best = min(
        max(sum(d for d, s in zip(durations, slots_of, strict=True) if s == slot) for slot in range(slots))
        for slots_of in itertools.product(range(slots), repeat=len(durations))
    )
    assert longest_first(durations, slots).makespan_us <= (4 / 3 - 1 / (3 * slots)) * best + 1e-9


@settings(max_examples=100, deadline=None)
@given(DURATIONS, SLOTS, st.randoms())
def test_order_of_the_tiles_does_not_matter(durations: list[float], slots: int, random: Random) -> None:
    shuffled = random.sample(durations, len(durations))
    one, other = longest_first(durations, slots), longest_first(shuffled, slots)
    assert (one.makespan_us, one.busy_us) == (other.makespan_us, other.busy_us)


def test_no_tiles_take_no_time() -> None:
    assert longest_first([], 4).makespan_us == 0
    assert longest_first([], 4).waves == 0


def test_an_impossible_tile_makes_the_launch_impossible() -> None:
    got = longest_first([1, np.inf], 2)
    assert got.makespan_us == np.inf
    assert got.tail_us == np.inf


@pytest.mark.parametrize(("durations", "slots"), [([1.0], 0), ([-1.0], 1), ([np.nan], 1)])
def test_nonsense_is_refused(durations: list[float], slots: int) -> None:
    with pytest.raises(BadWorkload):
        longest_first(durations, slots)
