"""What a lift gives: the IR, the weights by name, and where in the torch module every bank is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mxmoe.frontend.report import LiftReport, Skipped, Taken
from mxmoe.frontend.structure import entries_of
from mxmoe.ir import BankShape, BlockShape, ModuleOp
from mxmoe.quant import Weights

BankKind = Literal["routed", "routed_norm", "shared", "shared_stack", "module_list"]
"""How a bank's module is called; T tokens, H hidden, k experts per token, n experts:

    routed        module(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]; index n is padding
    routed_norm   the same; `module.post_expert_norm` is applied to every expert's output before its weight
    shared        module(x [..., H]) -> [..., H]
    shared_stack  module(x [..., H], gammas [..., n]) -> [..., H]; every expert, weighted
    module_list   each entry is called by the block on its own tokens: entry(x [..., H]) -> [..., H]
"""


@dataclass(frozen=True)
class LiftedBank:
    """One bank of a block and the module that computes it."""

    path: str
    """Dotted path of the module within the root; "" if it is the root."""
    module: nn.Module
    """What `replace_banks` replaces: the experts, the shared MLP, or the list whose entries are replaced."""
    kind: BankKind
    shape: BankShape

    @property
    def entries(self) -> tuple[nn.Module, ...]:
        """The modules that are called: one, or for a list one per expert."""
        return tuple(entries_of(self.module)) if self.kind == "module_list" else (self.module,)


@dataclass(frozen=True)
class LiftedBlock:
    """One MoE block."""

    name: str
    """Path of the block in the root; `moe` where the root is the block."""
    shape: BlockShape
    block: nn.Module
    """The module that holds the bank; the experts themselves where they are the root."""
    banks: Mapping[str, LiftedBank]
    """`routed` and `shared` -> bank; a shared MLP that belongs to no single routed bank is a block of its own."""


@dataclass(frozen=True)
class Lifted:
    """A torch module and its experts as IR."""

    module: ModuleOp
    """Stage lifted: one `mxmoe.moe` per block, in module order."""
    weights: Weights
    """"<block>.<bank>.<role>" -> views [experts, n, k] of the module's own storage; its ".bias" [experts, n]."""
    blocks: tuple[LiftedBlock, ...]
    """In module order."""
    root: nn.Module
    """What was given to `lift`; it is not changed."""
    skipped: tuple[Skipped, ...]
    """What is near experts and not in the IR, with the reason."""

    def report(self) -> LiftReport:
        """Count the bytes of expert weights found and lifted, and list what was left."""
        seen: dict[int, int] = {}
        taken: list[Taken] = []
        for block in self.blocks:
            for name, bank in block.banks.items():
                own = {id(p): p.nbytes for entry in bank.entries for p in _expert_parameters(bank, entry)}
                seen |= own
                taken.append(Taken(bank.path, block.name, name, bank.shape.experts, sum(own.values())))
        return LiftReport(tuple(taken), self.skipped, sum(seen.values()))


def _expert_parameters(bank: LiftedBank, entry: nn.Module) -> list[nn.Parameter]:
    left = "post_expert_norm." if bank.kind == "routed_norm" else None
    return [p for name, p in entry.named_parameters() if left is None or not name.startswith(left)]
