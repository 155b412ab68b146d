"""Longest-first list scheduling: which SM runs which tile, and when the last one ends."""

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
    durations = np.asarray(durations_us, dtype=np.float64)
    if slots < 1:
        raise BadWorkload(reason=f"{slots} slots; there must be at least one")
    if durations.size and not np.all(durations >= 0):
        raise BadWorkload(reason="a tile whose duration is negative or NaN")
    order = np.argsort(-durations, kind="stable")
    heap = [(0.0, slot) for slot in range(min(slots, max(1, durations.size)))]
    assignment = np.zeros(durations.size, dtype=np.int64)
    for tile, duration in zip(order.tolist(), durations[order].tolist(), strict=True):
        free_at, slot = heap[0]
        assignment[tile] = slot
        heapq.heapreplace(heap, (free_at + duration, slot))
    makespan = max(end for end, _ in heap)
    # summed in sorted order, so that a permutation of the tiles cannot move the last bit
    return Schedule(float(makespan), float(durations[order].sum()), slots, tuple(assignment.tolist()))
