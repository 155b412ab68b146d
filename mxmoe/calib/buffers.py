"""Rows that wait for their reduction, within a bound of memory, and the sums that they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mxmoe.calib.like import BankLike, BlockLike
from mxmoe.calib.reduce import Expert, Post, Reduction
from mxmoe.calib.stats import BankStats
from mxmoe.errors import NonFiniteObservation, NothingObserved
from mxmoe.ir import Scheme
from mxmoe.quant import Quantizer


@dataclass(frozen=True)
class Routed:
    """Some tokens' rows and where they go."""

    hidden: Tensor
    """[rows, hidden], in the module's dtype."""
    index: Tensor
    """[rows, k], experts; anything outside the bank is padding."""
    weight: Tensor
    """[rows, k], the router's weights."""
    factor: Tensor | None = None
    """[rows], what the block multiplies the bank's output with afterwards; None: nothing."""

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""
        held = (self.hidden, self.index, self.weight, self.factor)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


@dataclass
class BankBuffer:
    """One bank: the rows that wait, and the sums so far."""

    block: BlockLike
    bank: BankLike
    n_schemes: int
    waiting: list[Routed] = field(default_factory=list[Routed])
    measured_at_bank: bool = False
    n_tokens: int = 0
    macs: int = 0

    def __post_init__(self) -> None:
        shape = self.bank.shape
        self.tokens = np.zeros(shape.experts, np.int64)
        self.mass = np.zeros(shape.experts)
        self.squared_output = np.zeros(shape.experts)
        self.squared_error = {role: np.zeros((shape.experts, self.n_schemes)) for role in shape.weights}

    @property
    def n_bytes(self) -> int:
        """Memory of the waiting rows."""
        return sum(routed.n_bytes for routed in self.waiting)

    def push(self, routed: Routed) -> None:
        """Add rows of as many tokens."""
        self.n_tokens += len(routed.hidden)
        self.waiting.append(routed)

    def reduce(self, weights: Mapping[str, Tensor], schemes: Sequence[Scheme], quantizer: Quantizer, rows: int) -> None:
        """Turn what waits into sums, expert by expert, at most `rows` rows at a time."""
        if not self.waiting:
            return
        shape, waiting = self.bank.shape, self.waiting
        # asked for once per bank: a list of MLPs is copied into a stack each time
        stacks = {role: weights[name] for role, name in shape.weights.items()}
        biases = {role: weights[name] for role, name in shape.biases.items()}
        for index in range(shape.experts):
            places = [_places(routed, index) for routed in waiting]
            if not any(len(row) for _, row, _ in places):
                continue
            device = waiting[0].hidden.device
            expert = Expert(
                shape,
                {role: stack[index].to(device, torch.float32) for role, stack in stacks.items()},
                {role: stack[index].to(device, torch.float32) for role, stack in biases.items()},
                f"{self.block.name}.{self.bank.shape.name}[{index}]",
                _post(self.bank),
            )
            reduction = Reduction(expert, schemes, quantizer)
            for hidden, weight, factor in _gather(places, rows):
                self.tokens[index] += len(hidden)
                self.mass[index] += float(weight.double().sum())
                reduction.add(hidden, weight if factor is None else weight * factor)
            self.squared_output[index] += reduction.result.squared_output
            for role, error in reduction.result.squared_error.items():
                self.squared_error[role][index] += error
            self.macs += reduction.result.macs
        self.waiting = []

    def stats(self) -> BankStats:
        """
        Give the sums.

        Raises:
            NothingObserved: no row ever reached the bank.
            NonFiniteObservation: an expert's outputs are not finite.
        """
        if not self.tokens.any():
            raise NothingObserved(bank=self.bank.shape.name, block=self.block.name)
        finite = np.isfinite(self.squared_output)
        for error in self.squared_error.values():
            finite &= np.isfinite(error).all(axis=1)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise NonFiniteObservation(expert=bad, block=self.block.name, bank=self.bank.shape.name)
        return BankStats(
            self.n_tokens,
            self.tokens,
            self.mass,
            self.squared_output,
            self.squared_error,
            "bank" if self.measured_at_bank else "block",
        )


def _places(routed: Routed, expert: int) -> tuple[Routed, Tensor, Tensor]:
    """Give the rows and slots that go to one expert."""
    row, slot = torch.where(routed.index == expert)
    return routed, row, slot


def _gather(places: Sequence[tuple[Routed, Tensor, Tensor]], rows: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Collect one expert's rows over all that waits, in chunks of `rows`: hidden, weight, factor."""
    hidden = torch.cat([routed.hidden[row] for routed, row, _ in places])
    weight = torch.cat([routed.weight[row, slot].float() for routed, row, slot in places])
    ones = torch.ones_like(weight)
    factors = [ones[: len(row)] if routed.factor is None else routed.factor[row] for routed, row, _ in places]
    factor = torch.cat([part.to(weight) for part in factors])
    return list(zip(hidden.split(rows), weight.split(rows), factor.split(rows), strict=True))


def _post(bank: BankLike) -> Post | None:
    """Give the norm behind each expert, in the dtype that it has its weights in."""
    if bank.kind != "routed_norm":
        return None
    norm = bank.module.get_submodule("post_expert_norm")
    dtype = next((parameter.dtype for parameter in norm.parameters()), torch.float32)
    apply: Callable[[Tensor], Tensor] = norm
    return lambda rows: apply(rows.to(dtype)).float()
