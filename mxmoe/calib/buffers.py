"""Rows that wait for their reduction, within a bound of memory, and the sums that they become."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

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
    gradient: Tensor | None = None
    """[rows, hidden], derivative of the loss by the bank's output; None: no loss was asked for."""

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""
        held = (self.hidden, self.index, self.weight, self.factor, self.gradient)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


@dataclass(frozen=True)
class How:
    """What a reduction is made with."""

    weights: Mapping[str, Tensor]
    """Name -> weights [experts, n, k] or biases [experts, n]."""
    schemes: Sequence[Scheme]
    quantizer: Quantizer
    rows: int
    """Rows of one expert at a time."""
    keep_bytes: float
    """Quantized weights of one expert that may be kept from chunk to chunk."""
    rotations: Mapping[str, int]
    """Weight of a down linear -> channels that are rotated together, as `mxmoe.ir.rotations` says."""
    after: Callable[[], object] = lambda: None
    """Called after each expert, for progress."""

    def watched(self, after: Callable[[], object]) -> How:
        """Return the same, with another `after`."""
        return replace(self, after=after)


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
    has_gradients: bool = False

    def __post_init__(self) -> None:
        shape = self.bank.shape
        self.tokens = np.zeros(shape.experts, np.int64)
        self.mass, self.squared_output, self.output_norm = (np.zeros(shape.experts) for _ in range(3))
        self.squared_error = {role: np.zeros((shape.experts, self.n_schemes)) for role in shape.weights}
        self.fisher_error = {role: np.zeros((shape.experts, self.n_schemes)) for role in shape.weights}

    @property
    def n_bytes(self) -> int:
        """Memory of the waiting rows."""
        return sum(routed.n_bytes for routed in self.waiting)

    def push(self, routed: Routed) -> None:
        """Add rows of as many tokens."""
        self.n_tokens += len(routed.hidden)
        self.waiting.append(routed)

    def reduce(self, how: How) -> None:
        """Turn what waits into sums, expert by expert."""
        if not self.waiting:
            return
        rows = _ByExpert(self.waiting, self.bank.shape.experts)
        self.waiting = []
        shape = self.bank.shape
        # asked for once per bank: a list of MLPs is copied into a stack each time
        stacks = {role: how.weights[name] for role, name in shape.weights.items()}
        biases = {role: how.weights[name] for role, name in shape.biases.items()}
        for index in range(shape.experts):
            if rows.count(index):
                expert = Expert(
                    shape,
                    {role: stack[index].to(rows.device, torch.float32) for role, stack in stacks.items()},
                    {role: stack[index].to(rows.device, torch.float32) for role, stack in biases.items()},
                    f"{self.block.name}.{self.bank.shape.name}[{index}]",
                    _post(self.bank),
                    how.rotations.get(shape.weights["down"]),
                )
                keep = how.keep_bytes if rows.count(index) > how.rows else 0
                reduction = Reduction(expert, how.schemes, how.quantizer, keep_bytes=keep)
                with _products(rows.hidden, next(iter(stacks.values()))):
                    self._add(index, rows, reduction, how.rows)
            how.after()

    def _add(self, index: int, rows: _ByExpert, reduction: Reduction, at_once: int) -> None:
        """Reduce the rows of one expert."""
        is_list = self.bank.kind == "module_list"
        self.tokens[index] += rows.count(index)
        for hidden, weight, factor, gradient in rows.of(index, at_once):
            # a block that calls a list of experts weighs their rows itself: its factor is the router's weight
            self.mass[index] += float((weight * factor if is_list else weight).double().sum())
            slope = None if gradient is None else gradient * weight[:, None]
            reduction.add(hidden, weight * factor, slope)
            self.has_gradients |= slope is not None
        result = reduction.result
        self.squared_output[index] += result.squared_output
        self.output_norm[index] += result.output_norm
        for role in result.squared_error:
            self.squared_error[role][index] += result.squared_error[role]
            self.fisher_error[role][index] += result.fisher_error[role]
        self.macs += result.macs

    def stats(self, facts: Mapping[str, Mapping[str, np.ndarray]]) -> BankStats:
        """
        Give the sums, and what is known of the weights.

        Raises:
            NothingObserved: no row ever reached the bank.
            NonFiniteObservation: an expert's outputs are not finite.
        """
        if not self.tokens.any():
            raise NothingObserved(bank=self.bank.shape.name, block=self.block.name)
        finite = np.isfinite(self.squared_output)
        for error in (*self.squared_error.values(), *self.fisher_error.values()):
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
            self.output_norm,
            self.fisher_error if self.has_gradients else {},
            facts,
        )


class _ByExpert:
    """Waiting rows in one piece, and where each expert's are: one sort and one transfer for the whole bank."""

    def __init__(self, waiting: Sequence[Routed], experts: int) -> None:
        self.hidden = _joined([routed.hidden for routed in waiting])
        self.weight = _joined([routed.weight.float() for routed in waiting])
        self.factor = _joined([_factor(routed) for routed in waiting])
        gradients = [routed.gradient for routed in waiting if routed.gradient is not None]
        self.gradient = _joined(gradients) if len(gradients) == len(waiting) else None
        self.device, self.k = self.hidden.device, self.weight.shape[1]
        index = _joined([routed.index for routed in waiting]).flatten()
        ranked, self.order = index.sort(stable=True)
        edges = torch.arange(experts + 1, device=index.device, dtype=index.dtype)
        self.starts: list[int] = torch.searchsorted(ranked, edges).tolist()

    def count(self, expert: int) -> int:
        return self.starts[expert + 1] - self.starts[expert]

    def of(self, expert: int, at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Give one expert's rows in chunks: hidden, weight, factor, gradient."""
        for places in self.order[self.starts[expert] : self.starts[expert + 1]].split(at_once):
            row = places // self.k
            gradient = None if self.gradient is None else self.gradient[row].float()
            yield self.hidden[row], self.weight.flatten()[places], self.factor[row], gradient


@contextmanager
def _products(*factors: Tensor) -> Generator[None]:
    """Multiply in TF32 on a GPU where all factors came in 16 bits: it holds them exactly."""
    if not all(factor.is_cuda and factor.element_size() == 2 for factor in factors):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _factor(routed: Routed) -> Tensor:
    ones = torch.ones(len(routed.hidden), device=routed.hidden.device)
    return ones if routed.factor is None else routed.factor.to(ones)


def _post(bank: BankLike) -> Post | None:
    """Give the norm behind each expert, in the dtype that it has its weights in."""
    if bank.kind != "routed_norm":
        return None
    norm = bank.module.get_submodule("post_expert_norm")
    dtype = next((parameter.dtype for parameter in norm.parameters()), torch.float32)
    apply: Callable[[Tensor], Tensor] = norm
    return lambda rows: apply(rows.to(dtype)).float()
