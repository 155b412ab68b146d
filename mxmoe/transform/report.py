"""What a transformation did, and what it left, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Folded:
    """Scales that went into one kind of input of one block."""

    block: str
    bank: str
    """`routed` or `shared`; both share their input, so it is `all` there."""
    role: str
    """gate_up: the input that gate and up read; down: the one that down reads."""
    experts: int
    """Experts whose weights were scaled."""
    low: float
    """Smallest scale that an input was divided by."""
    high: float
    alpha: float
    """Exponent of the activations; the mean over experts where each has its own."""
    error: float | None = None
    """Squared output error of the quantized linears, relative to what it was without scales; None: not measured."""


@dataclass(frozen=True)
class Unfolded:
    """An input that stayed as it was."""

    block: str
    bank: str
    role: str
    reason: str


@dataclass(frozen=True)
class TransformReport:
    """
    What was folded, what was not, and how far routing is the same.

    The function is the same up to rounding; what rounding does to routing is measured and not assumed.
    """

    folded: tuple[Folded, ...]
    skipped: tuple[Unfolded, ...]
    agreement: Mapping[str, float] = field(default_factory=dict[str, float])
    """Block -> share of the chosen experts that are chosen again on the same data; blocks that route by themselves."""

    def __str__(self) -> str:
        """Write a table of what was folded, then a line for each thing that was not."""
        head = ("block", "bank", "role", "experts", "scales", "alpha", "error", "routing")
        rows = [
            (
                one.block,
                one.bank,
                one.role,
                str(one.experts),
                f"{one.low:.3g} to {one.high:.3g}",
                f"{one.alpha:.2f}",
                "-" if one.error is None else f"{one.error:.3f}",
                f"{self.agreement[one.block]:.2%}" if one.role == "gate_up" and one.block in self.agreement else "-",
            )
            for one in self.folded
        ]
        left = [f"left {one.block} {one.bank} {one.role}: {one.reason}" for one in self.skipped]
        return "\n".join((aligned(head, rows) if rows else []) + left)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Give the lines of a table, columns two blanks apart and as wide as their widest cell."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
