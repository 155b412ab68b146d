"""The values at the door of the solver: what is to be chosen, within which limits, for what, and the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe.errors import BadBudget, BadObjective, BadProblem
from mxmoe.registry import near_names

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SLACK = 1e-9
"""A plan meets a limit when it exceeds it by at most this fraction: sums of 40,000 floats are not exact."""


def _table(
    name: str, value: ArrayLike, shape: tuple[int, ...] | None, labels: Sequence[object] | None = None
) -> Floats:
    """Check one array of floats, none of them NaN or negative, and freeze a copy; `labels` name the rows."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadProblem(reason=f"{name} is not an array of numbers: {error}") from error
    if shape is not None and array.shape != shape:
        raise BadProblem(reason=f"{name} has shape {array.shape} and should have {shape}, like loss [row, scheme]")
    bad = np.argwhere(np.isnan(array) | (array < 0))
    if bad.size:
        where = tuple(int(i) for i in bad[0])
        label = f" ({labels[where[0]]})" if labels is not None and where and where[0] < len(labels) else ""
        raise BadProblem(reason=f"{name}{list(where)}{label} is {array[where]}; {_WAY_OUT[name]}")
    array.setflags(write=False)
    return array


_WAY_OUT = {
    "loss": "write inf for an impossible cell, and add a constant to a row that has negative values",
    "cost": "write inf for an impossible cell, microseconds otherwise",
    "bits": "write effective bits per weight, finite and not negative",
    "numel": "write the number of weights of each row, finite and positive",
}


@dataclass(frozen=True, eq=False)
class Problem:
    """
    One scheme is to be chosen for every row; the table says what each choice costs.

    `Problem([[9.0, 1.0], [4.0, 0.5]], [4.25, 8.0])` has two rows, two schemes, and needs 4.25 to 8 bits per weight.
    Arrays are copied and read-only. An `inf` in `loss` or `cost` makes that cell impossible, whatever is minimised.

    Raises:
        BadProblem: shapes that do not fit, NaN, negative values, a row count or scheme count of zero.
    """

    loss: Floats
    """[row, scheme], any unit, not negative; summed over rows. Errors that are independent add when squared."""
    bits: Floats
    """[row, scheme] effective bits per weight, scales and zeros included; a [scheme] vector is taken for every row."""
    cost: Floats | None = None
    """[row, scheme] microseconds, summed over rows; None when time plays no part."""
    numel: Floats | None = None
    """[row] number of weights; None means that all rows are of one size, and bytes are then those of 1 weight a row."""
    groups: Ints | None = None
    """[row] any integers: rows with the same one get the same scheme (see `tie`); None ties nothing."""
    labels: Sequence[object] | None = None
    """[row] names of the rows, for messages only."""

    def __post_init__(self) -> None:
        loss = _table("loss", self.loss, None, self.labels)
        if loss.ndim != 2 or 0 in loss.shape:
            raise BadProblem(reason=f"loss has shape {loss.shape} and should be [row, scheme], at least one of each")
        bits = np.asarray(self.bits)
        given = np.broadcast_to(bits, loss.shape) if bits.shape == loss.shape[1:] else bits
        checked: dict[str, object] = {"loss": loss, "bits": _table("bits", given, loss.shape, self.labels)}
        if self.cost is not None:
            checked["cost"] = _table("cost", self.cost, loss.shape, self.labels)
        if self.numel is not None:
            checked["numel"] = _table("numel", self.numel, loss.shape[:1], self.labels)
        for name in ("bits", "numel"):
            self._refuse(name, checked.get(name))
        if self.groups is not None:
            checked["groups"] = self._groups(loss.shape[0])
        if self.labels is not None and len(self.labels) != loss.shape[0]:
            raise BadProblem(reason=f"{len(self.labels)} labels for {loss.shape[0]} rows")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def _refuse(name: str, array: object) -> None:
        if isinstance(array, np.ndarray):
            bad = ~np.isfinite(array) | ((array == 0) if name == "numel" else False)
            if bad.any():
                raise BadProblem(reason=f"{name} holds {array[bad].flat[0]}; {_WAY_OUT[name]}")

    def _groups(self, rows: int) -> Ints:
        groups = np.array(self.groups)
        if groups.shape != (rows,) or not np.issubdtype(groups.dtype, np.integer):
            raise BadProblem(reason=f"groups is {groups.dtype}{list(groups.shape)} and should be one integer per row")
        groups = groups.astype(np.int64)
        groups.setflags(write=False)
        return groups

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.loss.shape[0]

    @property
    def n_schemes(self) -> int:
        """Number of schemes."""
        return self.loss.shape[1]

    def label(self, row: int) -> str:
        """Name one row for a message."""
        return f"row {row}" if self.labels is None else str(self.labels[row])


@dataclass(frozen=True, slots=True)
class Budget:
    """
    Upper limits, alone or together; `Budget()` limits nothing. A plan may exceed a limit by a relative 1e-9.

    `Budget(weight_bits=4.25, latency_us=900.0)` asks for both. `Budget.of(4.25)` is `Budget(weight_bits=4.25)`.

    Raises:
        BadBudget: a limit that is not a number, or negative.
    """

    weight_bits: float | None = None
    """Average effective bits per weight: sum(numel * bits) / sum(numel)."""
    bytes: float | None = None
    """Bytes of codes, scales and zeros: sum(numel * bits) / 8."""
    latency_us: float | None = None
    """Microseconds: the sum of the costs of the cells chosen."""

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise BadBudget(reason=f"{name}={value!r} is not a number") from None
            if not number >= 0:
                raise BadBudget(reason=f"{name}={value!r} is no upper limit of anything")
            object.__setattr__(self, name, number)

    @classmethod
    def of(cls, value: Budget | float | Mapping[str, float | None] | None) -> Budget:
        """Take a budget as people write it: a number is `weight_bits`, a mapping holds the limits by name."""
        if isinstance(value, Budget):
            return value
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            known = [f.name for f in fields(cls)]
            for name in value:
                if name not in known:
                    raise BadBudget(reason=f"there is no limit {name!r}; {near_names(str(name), known)}")
            return cls(**value)
        return cls(weight_bits=value)

    def limits(self) -> dict[str, float]:
        """Name the limits that are set."""
        values = {"weight_bits": self.weight_bits, "bytes": self.bytes, "latency_us": self.latency_us}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Objective:
    """
    What is minimised: loss^r * time^(1-r), where loss and time are the sums over the rows.

    r = 1 is the loss, r = 0 the time; MxMoE (ICML 2025, eq. 5) uses 0.75. `Objective.of(str(o)) == o`.

    Raises:
        BadObjective: an unknown name, or r outside 0 to 1.
    """

    r: float = 1.0
    """Exponent of the loss, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.r <= 1:
            raise BadObjective(value=self.r)

    @classmethod
    def of(cls, value: Objective | str | float) -> Objective:
        """Take an objective as people write it: "loss", "time", or r as a number or its text."""
        if isinstance(value, Objective):
            return value
        named = {"loss": 1.0, "time": 0.0}
        try:
            return cls(named[value] if isinstance(value, str) and value in named else float(value))
        except (TypeError, ValueError):
            raise BadObjective(value=value) from None

    def __str__(self) -> str:
        return {1.0: "loss", 0.0: "time"}.get(self.r, repr(float(self.r)))

    def value(self, loss: float, latency_us: float) -> float:
        """Evaluate for one plan; 0 when a factor with a positive exponent is 0."""
        if self.r == 1:
            return loss
        if self.r == 0:
            return latency_us
        if min(loss, latency_us) <= 0:
            return 0.0
        return math.exp(self.r * math.log(loss) + (1 - self.r) * math.log(latency_us))


@dataclass(frozen=True, eq=False)
class Solution:
    """One scheme per row, what it is worth, and how much better any other plan could be."""

    choice: Ints
    """[row] index of the scheme chosen; read-only."""
    objective: float
    """Value reached, in the objective's own unit."""
    bound: float
    """Proved: no plan within the budget has a smaller objective."""
    gap: float
    """(objective - bound) / objective, 0 when both are 0; how much is at most left to gain."""
    loss: float
    """Sum of the losses chosen."""
    latency_us: float | None
    """Sum of the costs chosen in microseconds; None when the problem has no costs."""
    weight_bits: float
    """Average effective bits per weight."""
    bytes: float
    """sum(numel * bits) / 8."""
    seconds: float
    """Wall time of the solve."""
    solver: str
    """Name of the solver."""
    budget: Budget
    """The limits it was solved for."""
