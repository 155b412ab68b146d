"""Granularity: which rows share one choice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np

from mxmoe.errors import UnknownName
from mxmoe.registry import near_names
from mxmoe.solver.problem import Ints

Key = tuple[str, str, str, int]
"""(block, bank, role, expert)."""

GRANULARITIES: dict[str, Callable[[str, str, str, int], Hashable]] = {
    "model": lambda block, bank, role, expert: (),
    "layer": lambda block, bank, role, expert: block,
    "role": lambda block, bank, role, expert: (block, role),
    "expert": lambda block, bank, role, expert: (block, bank, expert),
    "linear": lambda block, bank, role, expert: (block, bank, role, expert),
}
"""What the rows of one choice have in common, coarsest first; "linear" is expert x role."""


def tie(keys: Iterable[Key], granularity: str = "linear", *, gate_up: bool = True) -> Ints:
    """
    Make `Problem.groups` from the keys (block, bank, role, expert) of the rows.

    `gate_up` ties the gate and up rows of one expert, which one kernel computes together; rows of an expert without
    a gate are left alone. Keys ("b", "routed", "gate", 0), (..., "up", 0), (..., "down", 0) give [0, 0, 1] for
    "linear", [0, 1, 2] without the tie, and [0, 0, 0] for "expert".

    Returns:
        [row] int64, numbered from 0 in order of first appearance.

    Raises:
        UnknownName: a granularity outside the table.
    """
    if granularity not in GRANULARITIES:
        raise UnknownName(kind="granularity", name=granularity, near=near_names(granularity, GRANULARITIES))
    common = GRANULARITIES[granularity]
    merged = {"gate": "gate_up", "up": "gate_up"} if gate_up else {}
    numbers: dict[Hashable, int] = {}
    shared = (common(block, bank, merged.get(role, role), expert) for block, bank, role, expert in keys)
    return np.array([numbers.setdefault(key, len(numbers)) for key in shared], dtype=np.int64)
