"""List scheduling: which SM runs which tile, and when the last one ends; longest first, in order, by fixed stride."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe.errors import BadWorkload


@dataclass(frozen=True)
class Schedule:
    """
    Tiles placed on slots (SMs), and what the last wave wastes.

    Durations [3, 3, 2, 2, 2] on 2 slots: loads [7, 5], makespan 7, waves 2.5, tail 1.0 (12 / 2 would be ideal).
    """

    makespan_us: float
    """Time at which the last tile ends; inf if any tile can never run."""
    busy_us: float
    """Sum of all durations."""
    slots: int
    """Number of SMs."""
    assignment: tuple[int, ...]
    """Tile -> slot, in the order in which the tiles were given."""

    @property
    def waves(self) -> float:
        """Tiles per slot; a fraction means that the last wave is not full."""
        return len(self.assignment) / self.slots

    @property
    def over_ideal(self) -> float:
        """Makespan over that of an even spread of the work; 1 where there is no work, inf if a tile can never run."""
        if not np.isfinite(self.makespan_us):
            return np.inf
        return self.makespan_us * self.slots / self.busy_us if self.busy_us else 1.0

    @property
    def tail_us(self) -> float:
        """Makespan beyond an even spread of the work; inf if any tile can never run."""
        return self.makespan_us - self.busy_us / self.slots if np.isfinite(self.makespan_us) else np.inf


def longest_first(durations_us: Sequence[float] | NDArray[np.float64], slots: int) -> Schedule:
    """
    Give the longest remaining tile to the slot that is free first.

    The makespan is at most 4/3 - 1/(3 slots) times the best possible (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969, theorem 2), and depends on the durations only, not on their order.

    Raises:
        BadWorkload: no slot, or a duration that is negative or NaN.
    """
    durations = _checked(durations_us, slots)
    order = np.argsort(-durations, kind="stable")
    found = in_order(durations[order], slots)
    assignment = np.zeros(durations.size, dtype=np.int64)
    assignment[order] = found.assignment
    return Schedule(found.makespan_us, found.busy_us, slots, tuple(assignment.tolist()))


def in_order(durations_us: Sequence[float] | NDArray[np.float64], slots: int) -> Schedule:
    """
    Give the next tile of the list to the slot that is free first, as a GPU does with the programs of a grid.

    The makespan is at most 2 - 1/slots times the best possible (Graham 1969, theorem 1), whatever the order.

    Raises:
        BadWorkload: as for `longest_first`.
    """
    durations = _checked(durations_us, slots)
    heap = [(0.0, slot) for slot in range(min(slots, max(1, durations.size)))]
    assignment: list[int] = []
    for duration in durations.tolist():
        free_at, slot = heap[0]
        assignment.append(slot)
        heapq.heapreplace(heap, (free_at + duration, slot))
    makespan = max(end for end, _ in heap)
    return Schedule(float(makespan), float(durations.sum()), slots, tuple(assignment))


def fixed_stride(durations_us: Sequence[float] | NDArray[np.float64], slots: int) -> Schedule:
    """
    Give tile i of the list to slot i mod slots, as a persistent kernel does that steps by the size of its grid.

    Raises:
        BadWorkload: as for `longest_first`.
    """
    durations = _checked(durations_us, slots)
    assignment = np.arange(durations.size) % slots
    loads = np.bincount(assignment, weights=durations, minlength=slots)
    return Schedule(float(loads.max()), float(durations.sum()), slots, tuple(assignment.tolist()))


def start_times(durations_us: Sequence[float] | NDArray[np.float64], assignment: Sequence[int]) -> NDArray[np.float64]:
    """Start [tile] of each tile of a list, when every slot runs its own in the order of the list without a pause."""
    durations, slots = np.asarray(durations_us, dtype=np.float64), np.asarray(assignment, dtype=np.int64)
    order = np.argsort(slots, kind="stable")
    ends = np.cumsum(durations[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = slots[order][1:] != slots[order][:-1]
    before = np.repeat((ends - durations[order])[first], np.diff(np.append(np.flatnonzero(first), len(order))))
    starts = np.empty_like(durations)
    starts[order] = ends - durations[order] - before
    return starts


def _checked(durations_us: Sequence[float] | NDArray[np.float64], slots: int) -> NDArray[np.float64]:
    durations = np.asarray(durations_us, dtype=np.float64)
    if slots < 1:
        raise BadWorkload(reason=f"{slots} slots; there must be at least one")
    if durations.size and not np.all(durations >= 0):
        raise BadWorkload(reason="a tile whose duration is negative or NaN")
    return durations
