"""How sequences use the experts of a model, and how unevenly."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxmoe.calib.collect import read_call
from mxmoe.calib.like import BankLike, LiftedLike


class UsageMeter:
    """Counts assignments of every routed expert while a module runs."""

    def __init__(self, lifted: LiftedLike) -> None:
        """Find the routed banks."""
        named = [(block.name, bank) for block in lifted.blocks for bank in block.banks.values()]
        self.banks = [(block, bank) for block, bank in named if bank.shape.experts > 1 and bank.kind != "shared_stack"]
        self.sizes = [bank.shape.experts for _, bank in self.banks]
        self._seen: list[list[Tensor]] = [[] for _ in self.banks]

    @property
    def batches_alone(self) -> bool:
        """Whether sequences must run one at a time: a list of experts is not told which sequence a row is of."""
        return any(bank.kind == "module_list" for _, bank in self.banks)

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Hook the banks."""
        with ExitStack() as stack:
            for number, (_, bank) in enumerate(self.banks):
                for entry in bank.entries:
                    handle = entry.register_forward_pre_hook(self._recorder(number, bank), with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def take(self, sequences: int) -> Tensor:
        """
        Give what was counted since the last time: float64 [sequences, experts of all banks], on the CPU.

        The calls since then must have been of as many sequences, of one length.
        """
        found: list[Tensor] = []
        for number, size in enumerate(self.sizes):
            counts = torch.zeros((sequences, size + 1), dtype=torch.float64)
            for index in self._seen[number]:
                rows = index.reshape(sequences, -1)
                counts.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
            found.append(counts[:, :size])
            self._seen[number] = []
        return torch.cat(found, dim=1)

    def _recorder(self, number: int, bank: BankLike) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            index = read_call(module, bank, args, named).index.long().cpu()
            size = bank.shape.experts
            self._seen[number].append(torch.where((index >= 0) & (index < size), index, size))

        return record

    def imbalance(self, usage: Tensor) -> Tensor:
        """
        Measure usage [..., experts of all banks]: [...], standard deviation over the experts by their mean, then
        averaged over the banks; 0 where all are used alike, and where none is used.
        """
        parts = [part.std(dim=-1) / part.mean(dim=-1).clamp(min=1e-300) for part in usage.split(self.sizes, dim=-1)]
        return torch.stack(parts).mean(dim=0)
