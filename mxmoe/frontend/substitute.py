"""
Putting compiled banks in the place of experts, and taking them out again.

Every bank, however its module is called, is replaced by one kind of callable:

    run(hidden [T, H], top_k_index [T, k] int64, top_k_weights [T, k]) -> [T, H]

which is what an executable offers for a bank. A thin module around it keeps the call signature of what it replaces, so
the block's own forward, its router and the gate of its shared expert stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxmoe.frontend.joined import JoinedCalls
from mxmoe.frontend.lifted import Lifted, LiftedBank, LiftedBlock
from mxmoe.frontend.structure import entries_of

BankRun = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H] in the dtype of hidden."""


@dataclass(frozen=True)
class Replacement:
    """What `replace_banks` did."""

    root: nn.Module
    """The module to call from now on: the lifted root, or the new module where the root itself was the experts."""
    changes: tuple[tuple[nn.Module, str, nn.Module], ...]
    """(parent, name, module that was there), in the order of change."""

    def undo(self) -> None:
        """Put the original modules back; doing it again changes nothing."""
        for parent, name, old in reversed(self.changes):
            parent.add_module(name, old)


def replace_banks(lifted: Lifted, make: Callable[[LiftedBlock, str], BankRun]) -> Replacement:
    """
    Replace every bank of a lifted module by what `make(block, bank name)` gives, in place.

    `make` is asked once per bank, before anything changes. A module that it returns becomes a submodule of the
    replacement. Modules that occur at several places of the tree are replaced at all of them.
    """
    swaps: dict[nn.Module, nn.Module] = {}
    for block in lifted.blocks:
        for name, bank in block.banks.items():
            swaps.update(_adapters(bank, block.shape.hidden, make(block, name)))
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in tuple(lifted.root.modules()):
        # not named_children: it leaves out the second name of a module that is held twice
        held = tuple(parent._modules.items())  # pyright: ignore[reportPrivateUsage]
        for name, child in held:
            if child is not None and child in swaps:
                parent.add_module(name, swaps[child])
                changes.append((parent, name, child))
    return Replacement(swaps.get(lifted.root, lifted.root), tuple(changes))


def _adapters(bank: LiftedBank, hidden: int, run: BankRun) -> dict[nn.Module, nn.Module]:
    match bank.kind:
        case "routed":
            return {bank.module: RoutedCall(bank, run)}
        case "routed_norm":
            return {bank.module: NormedCall(bank, run)}
        case "shared":
            return {bank.module: ExpertCall(run, 0, hidden)}
        case "shared_stack":
            return {bank.module: WeightedCall(run, bank.shape.experts, hidden)}
        case "module_list":
            return {entry: ExpertCall(run, index, hidden) for index, entry in enumerate(entries_of(bank.module))}


class _Call(nn.Module):
    """Around a bank; holds it as a submodule if it is a module, so that `to` and `state_dict` reach it."""

    def __init__(self, run: BankRun) -> None:
        super().__init__()
        self.run = run


class RoutedCall(_Call):
    """Called like experts: (hidden [..., H], top_k_index [T, k], top_k_weights [T, k]) -> [..., H]."""

    def __init__(self, bank: LiftedBank, run: BankRun) -> None:
        """Take the signature and the number of experts from the bank's module."""
        super().__init__(run)
        self.__signature__ = inspect.signature(bank.module.forward)
        self.num_experts = bank.shape.experts

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Run the bank; arguments may be named as the original names them."""
        hidden, index, weights, *_ = self.__signature__.bind(*args, **named).arguments.values()
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self._weigh(rows, index, weights).reshape(hidden.shape)

    def _weigh(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.run(rows, index, weights)


class NormedCall(RoutedCall):
    """As RoutedCall, for experts with a norm behind each: every assignment runs alone, the norm stays torch."""

    def __init__(self, bank: LiftedBank, run: BankRun) -> None:
        """Keep the norm of the bank's module."""
        super().__init__(bank, run)
        self.post_expert_norm = bank.module.get_submodule("post_expert_norm")

    def _weigh(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top_k = index.shape[-1]
        alone = torch.ones_like(weights).reshape(-1, 1)
        out = self.run(rows.repeat_interleave(top_k, dim=0), index.reshape(-1, 1), alone)
        weighted = self.post_expert_norm(out) * weights.reshape(-1, 1)
        return weighted.reshape(len(rows), top_k, -1).sum(dim=1).to(rows.dtype)


class ExpertCall(_Call):
    """Called like one MLP: x [..., H] -> [..., H]; a shared MLP, or one entry of a list."""

    def __init__(self, run: BankRun, expert: int, hidden: int) -> None:
        """Stand for one expert of a bank."""
        super().__init__(run)
        self.expert = expert
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        """Send every row to this expert with weight one."""
        rows = x.reshape(-1, self.hidden)
        joined: JoinedCalls | None = getattr(self.run, "joined", None)
        if joined is not None and (out := joined.shared(rows, is_watched=bool(self._forward_hooks))) is not None:
            return out.reshape(x.shape)
        index = torch.full((len(rows), 1), self.expert, device=x.device)
        return self.run(rows, index, torch.ones_like(index, dtype=x.dtype)).reshape(x.shape)


class WeightedCall(_Call):
    """Called like a stack of shared experts: (x [..., H], gammas [..., n]) -> [..., H]; all n run."""

    def __init__(self, run: BankRun, experts: int, hidden: int) -> None:
        """Stand for all experts of a bank."""
        super().__init__(run)
        self.experts = experts
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        """Send every row to every expert."""
        rows = hidden_states.reshape(-1, self.hidden)
        index = torch.arange(self.experts, device=rows.device).expand(len(rows), -1)
        return self.run(rows, index, gammas.reshape(-1, self.experts)).reshape(hidden_states.shape)
