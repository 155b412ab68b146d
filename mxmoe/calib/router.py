"""The router of a block: the matrix with one row for each expert, wherever the block keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mxmoe.calib.like import BlockLike


@dataclass(frozen=True)
class Router:
    """A module that scores experts: logits = x W^T + b."""

    module: nn.Module
    """Called with the tokens."""
    weight: nn.Parameter
    """[experts, hidden]."""
    bias: nn.Parameter | None
    """[experts], if it has one."""


def find_router(block: BlockLike) -> Router | None:
    """
    Find the router of a block's routed experts: the one module outside the banks with a weight [experts, hidden].

    None where there is none, or more than one: who cannot be told apart is not guessed.
    """
    bank = block.banks.get("routed")
    if bank is None or bank.module is block.block:
        return None
    shape = (bank.shape.experts, block.shape.hidden)
    inside = {id(part) for other in block.banks.values() for entry in other.entries for part in entry.modules()}
    found = [
        Router(module, parameter, _bias(module, shape[0]))
        for module in block.block.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
        if tuple(parameter.shape) == shape
    ]
    return found[0] if len(found) == 1 else None


def _bias(module: nn.Module, experts: int) -> nn.Parameter | None:
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return bias if bias is not None and tuple(bias.shape) == (experts,) else None
