"""A compiled block on the GPU: its banks, and the call that runs them in fused launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxmoe.backends.routing import check_shapes
from mxmoe.backends.triton.bank import Bank
from mxmoe.backends.triton.joint import MOST_ROWS, Joint
from mxmoe.backends.triton.op import hold
from mxmoe.errors import NoSuchBank, WrongDevice
from mxmoe.quant import Packed, pack

MAX_ROWS = MOST_ROWS
"""Assignments that are run at once; more tokens are run in turns, which bounds the memory between the GEMMs."""


@dataclass(frozen=True, eq=False)
class TritonExecutable:
    """A block whose experts run in Triton. Deterministic: equal calls give equal bits."""

    block: str
    hidden: int
    banks: Mapping[str, Bank]
    joint: Joint | None = None
    """Both banks in the same launches, where they can be."""
    held: int = field(init=False)
    """The number under which a graph calls this executable."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", hold(self))

    def packed(self, name: str, expert: int) -> Packed:
        """See `mxmoe.target.Executable`."""
        for bank in self.banks.values():
            for one, names in zip(bank.gemms, bank.names, strict=True):
                if name in names:
                    return pack(one.read(names.index(name), expert))
        raise KeyError(name)

    def bias(self, name: str) -> Tensor:
        """See `mxmoe.target.Executable`."""
        for bank in self.banks.values():
            for one, names in zip(bank.gemms, bank.bias_names, strict=True):
                if name in names and one.bias is not None:
                    return one.bias[names.index(name)]
        raise KeyError(name)

    def op(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run one bank as a single node of a traced graph."""
        return torch.ops.mxmoe.run_bank(self.held, bank, hidden, top_k_index, top_k_weights)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales, zero points and biases held; there is no other copy of the weights."""
        return sum(bank.nbytes for bank in self.banks.values())

    def devices(self) -> Iterator[torch.device]:
        """Where each bank's weights are."""
        for bank in self.banks.values():
            yield bank.down.arena.data.device

    @torch.no_grad()
    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Run one bank; see `mxmoe.target.Executable`. An index that is no expert is padding: nothing waits for the
        device to say so.

        Raises:
            NoSuchBank: the block has no such bank.
            BadHidden, BadRouting, WrongDevice: arguments that do not fit the block.
        """
        compiled = self._checked(bank, hidden, top_k_index, top_k_weights)
        hidden = hidden.contiguous()
        index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
        step = max(1, MAX_ROWS // max(1, index.shape[1]))
        if 0 < len(hidden) <= step:
            return compiled.run(hidden, index, weights, compiled.configs(*index.shape))["out"]
        out = torch.empty_like(hidden)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            configs = compiled.configs(len(hidden[part]), index.shape[1])
            out[part] = compiled.run(hidden[part], index[part], weights[part], configs)["out"]
        return out

    def joins(self, tokens: int) -> bool:
        """Say whether `run_block` runs both banks of so many tokens in the same launches."""
        return self.joint is not None and self.joint.takes(tokens, self.joint.top_k)

    @torch.no_grad()
    def run_block(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Run the routed bank and the shared one, which sees every token with weight one; together where that is `joins`.

        Args:
            hidden: [tokens, hidden].
            top_k_index: [tokens, top_k] of the routed bank; what is no expert is padding.
            top_k_weights: [tokens, top_k].
            shared: contiguous [tokens, hidden] to write what the shared bank makes, if it is there already.

        Returns:
            `routed` and `shared` -> [tokens, hidden], in the dtype of `hidden`.

        Raises:
            NoSuchBank: the block has no such banks.
            BadHidden, BadRouting, WrongDevice: arguments that do not fit the block.
        """
        self._checked("routed", hidden, top_k_index, top_k_weights)
        shared = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if shared is None else shared
        if self.joint is not None and self.joint.takes(*top_k_index.shape):
            routed = torch.empty_like(shared)
            args = (hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
            self.joint.run(*args, routed, shared)
            return {"routed": routed, "shared": shared}
        alone = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
        shared.copy_(self("shared", hidden, alone, torch.ones_like(alone, dtype=hidden.dtype)))
        return {"routed": self("routed", hidden, top_k_index, top_k_weights), "shared": shared}

    def trace(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> dict[str, Tensor]:
        """Run one bank and give what every step made; see `Bank.run`."""
        compiled = self._checked(bank, hidden, top_k_index, top_k_weights)
        configs = compiled.configs(*top_k_index.shape)
        args = (hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
        made = compiled.apart().run(*args, configs if compiled.is_apart else (configs[0], *configs))
        made["down"] = made["down"].sum(0)
        real = int((top_k_index < compiled.experts).sum())
        return {role: y.float() if role == "out" else y[:real].float() for role, y in made.items()}

    def _checked(self, bank: str, hidden: Tensor, index: Tensor, weights: Tensor) -> Bank:
        if bank not in self.banks:
            raise NoSuchBank(block=self.block, bank=bank, known=", ".join(self.banks))
        compiled = self.banks[bank]
        check_shapes(self.block, self.hidden, hidden, index, weights)
        device = compiled.down.arena.data.device
        for tensor in (hidden, index, weights):
            if tensor.device != device:
                raise WrongDevice(backend="triton", block=self.block, home=device, device=tensor.device)
        return compiled
