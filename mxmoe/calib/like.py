"""What observing needs of a lifted module, as protocols that the frontend's values fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from mxmoe.ir import BankShape, BlockShape, ModuleOp


class BankLike(Protocol):
    """One bank of a block and the module that computes it."""

    @property
    def path(self) -> str:
        """Dotted path of the module within the root; "" if it is the root."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module that holds the weights."""
        ...

    @property
    def kind(self) -> str:
        """How the module is called: routed, routed_norm, shared, shared_stack or module_list."""
        ...

    @property
    def shape(self) -> BankShape:
        """Experts, top-k, sizes, activation, names of weights."""
        ...

    @property
    def entries(self) -> tuple[nn.Module, ...]:
        """The modules that are called: one, or for a list one per expert."""
        ...


class BlockLike(Protocol):
    """One MoE block."""

    @property
    def name(self) -> str:
        """Its path."""
        ...

    @property
    def shape(self) -> BlockShape:
        """Its sizes."""
        ...

    @property
    def block(self) -> nn.Module:
        """The module that holds the banks, or the bank itself."""
        ...

    @property
    def banks(self) -> Mapping[str, BankLike]:
        """Bank name -> bank."""
        ...


class LiftedLike(Protocol):
    """A torch module and its experts, found."""

    @property
    def module(self) -> ModuleOp:
        """The experts as IR; of interest is what it rotates."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Name -> weights [experts, n, k] or biases [experts, n]."""
        ...

    @property
    def blocks(self) -> tuple[BlockLike, ...]:
        """The blocks, in order."""
        ...

    @property
    def root(self) -> nn.Module:
        """The module to run."""
        ...
