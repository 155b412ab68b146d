"""How heavy the tails of activations are: what makes them hard to quantize, per block and role."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxmoe.calib import Inputs
from mxmoe.frontend import LiftedBlock, expert_views, lift
from mxmoe.transform.report import aligned
from mxmoe.transform.rows import hidden_rows, run_rows


@dataclass(frozen=True)
class RoleProfile:
    """What the linears of one role in one bank are given; means over its assignments of tokens to experts."""

    block: str
    bank: str
    role: str
    """gate_up or down."""
    rows: int
    """Assignments of a token to an expert that were seen."""
    kurtosis: float
    """Fourth central moment over the channels of a token, by the squared variance: 3 for a Gaussian."""
    peak: float
    """max|x| over median|x| of the channels of a token; inf where more than half of them are zero."""
    largest: float
    """max|x| over everything."""


@dataclass(frozen=True)
class ActivationProfile:
    """A line for each block, bank and role."""

    lines: tuple[RoleProfile, ...]

    def __str__(self) -> str:
        head = ("block", "bank", "role", "rows", "kurtosis", "max/median", "max")
        rows = [
            (one.block, one.bank, one.role, str(one.rows), *(f"{x:.1f}" for x in (one.kurtosis, one.peak, one.largest)))
            for one in self.lines
        ]
        return "\n".join(aligned(head, rows))


def activation_profile(model: nn.Module, inputs: Inputs, *, quiet: bool = False) -> ActivationProfile:
    """
    Measure outliers in what experts read, token by token: a scale per token is what schemes quantize activations with.

    Args:
        model: a model, a decoder layer or a block with dense experts; it is left as it was.
        inputs: as for `mxmoe.observe`.
        quiet: no progress bar.

    Raises:
        NoMoeBlock, BadCalibration, ...: what `mxmoe.lift` and `mxmoe.observe` raise.
    """
    lifted = lift(model)
    views = {(b.name, name): expert_views(bank) for b in lifted.blocks for name, bank in b.banks.items()}
    sums = {(*key, role): _Moments() for key in views for role in ("gate_up", "down")}

    def receive(block: LiftedBlock, bank: str, expert: int, rows: Tensor) -> None:
        key = block.name, bank
        sums[(*key, "gate_up")].add(rows.float())
        sums[(*key, "down")].add(hidden_rows(block.banks[bank].shape, views[key][expert], rows))

    run_rows(lifted, inputs, receive, title="observing", quiet=quiet)
    return ActivationProfile(tuple(moments.line(*key) for key, moments in sums.items() if moments.rows))


@dataclass
class _Moments:
    """Sums over rows."""

    rows: int = 0
    kurtosis: float = 0.0
    peak: float = 0.0
    largest: float = 0.0

    def add(self, rows: Tensor) -> None:
        kurtosis, peak = row_kurtosis(rows), row_peak(rows)
        self.rows += len(rows)
        self.kurtosis += float(kurtosis.sum())
        self.peak += float(peak.sum())
        self.largest = max(self.largest, float(rows.abs().max()))

    def line(self, block: str, bank: str, role: str) -> RoleProfile:
        return RoleProfile(block, bank, role, self.rows, self.kurtosis / self.rows, self.peak / self.rows, self.largest)


def row_kurtosis(rows: Tensor) -> Tensor:
    """Kurtosis over the channels of each row [n, width], float64 [n]; 0 for a constant row."""
    centred = rows.double() - rows.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return torch.where(variance > 0, centred.pow(4).mean(-1) / variance.square(), 0.0)


def row_peak(rows: Tensor) -> Tensor:
    """max|x| over median|x| of each row [n, width], float64 [n]; 1 for a row of zeros."""
    sizes = rows.double().abs()
    largest, middle = sizes.amax(-1), sizes.median(-1).values
    return torch.where(largest > 0, largest / middle, 1.0)
