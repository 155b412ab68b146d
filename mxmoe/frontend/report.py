"""What a lift found, what it took, and what it left, with the reason: nothing is left silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SkipKind = Literal["experts", "dense", "torch"]


@dataclass(frozen=True)
class Taken:
    """One bank that is in the IR."""

    path: str
    """Of the module that holds it."""
    block: str
    bank: str
    experts: int
    n_bytes: int
    """Weights and biases, in their own element type."""


@dataclass(frozen=True)
class Skipped:
    """Something near experts that is not in the IR."""

    path: str
    cls: str
    kind: SkipKind
    """experts: looks like experts in a structure that is not known; dense: an MLP that is no expert; torch: a part of
    an MoE block that stays as it is."""
    n_bytes: int
    """Of its parameters."""
    reason: str


@dataclass(frozen=True)
class LiftReport:
    """
    Bytes of expert weights found, and bytes of them in the IR, each counted once however often they are shared.

    `bytes_lifted == bytes_found` unless `skipped` has lines of kind "experts".
    """

    taken: tuple[Taken, ...]
    skipped: tuple[Skipped, ...]
    bytes_lifted: int

    @property
    def bytes_found(self) -> int:
        """Bytes of everything that is, or looks like, an expert."""
        return self.bytes_lifted + sum(skip.n_bytes for skip in self.skipped if skip.kind == "experts")

    def __str__(self) -> str:
        """Write one line for the sums, then one for each bank taken and each thing left."""
        share = self.bytes_lifted / self.bytes_found if self.bytes_found else 0.0
        lines = [f"lifted {self.bytes_lifted:,} of {self.bytes_found:,} bytes of expert weights ({share:.1%})"]
        lines += [f"  {t.block} {t.bank}: {t.experts} x {t.path or '(root)'}, {t.n_bytes:,} bytes" for t in self.taken]
        lines += [f"  left {s.path} ({s.cls}, {s.n_bytes:,} bytes): {s.reason}" for s in self.skipped]
        return "\n".join(lines)
