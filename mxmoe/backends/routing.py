"""What every backend does first: check a call, and put the router's output in a form that experts can be run from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxmoe.errors import BadHidden, BadRouting

_INDEX_TYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """
    The assignments of tokens to experts, padding left out, in the order of experts and within an expert of tokens.

    Index [[2, 0], [2, 3]] with 3 experts (so 3 is padding) -> token 0 0 1, slot 1 0 0, expert 0 2 2, counts 1 0 2.
    """

    token: Tensor
    """int64 [assignments], row of the hidden states."""
    slot: Tensor
    """int64 [assignments], position within the token's top-k."""
    expert: Tensor
    """int64 [assignments], ascending."""
    counts: Tensor
    """int64 [experts], assignments of each."""
    weight: Tensor
    """float32 [assignments], router weight."""


def check_shapes(block: str, width: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    """
    Check the arguments of an executable without reading them, so that nothing waits for a device.

    Raises:
        BadHidden: hidden states are not [tokens, width] of a float type.
        BadRouting: index or weights of another shape or type.
    """
    if hidden.dim() != 2 or hidden.shape[1] != width or not hidden.is_floating_point():
        raise BadHidden(block=block, found=f"{hidden.dtype} {list(hidden.shape)}", hidden=width)
    if index.dim() != 2 or len(index) != len(hidden) or index.dtype not in _INDEX_TYPES:
        wanted = f"int64 [{len(hidden)}, top_k]"
        raise BadRouting(block=block, what="top_k_index", found=f"{index.dtype} {list(index.shape)}", wanted=wanted)
    if weights.shape != index.shape or not weights.is_floating_point():
        found = f"{weights.dtype} {list(weights.shape)}"
        raise BadRouting(
            block=block, what="top_k_weights", found=found, wanted=f"a float type of shape {list(index.shape)}"
        )


def check_call(block: str, width: int, experts: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    """
    Check the arguments of an executable.

    Raises:
        BadHidden, BadRouting: as `check_shapes`; or an index outside 0 to `experts` (which is padding).
    """
    check_shapes(block, width, hidden, index, weights)
    if index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high > experts:
            wanted = f"within 0 to {experts}, where {experts} is padding"
            raise BadRouting(block=block, what="top_k_index", found=f"from {low} to {high}", wanted=wanted)


def sort_assignments(index: Tensor, weights: Tensor, experts: int) -> Routing:
    """Order the assignments of a checked router output [tokens, top_k] by expert."""
    flat = index.reshape(-1).to(torch.int64)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)
    order = order[: len(flat) - int(counts[experts])]
    token = torch.div(order, max(index.shape[1], 1), rounding_mode="floor")
    return Routing(
        token=token,
        slot=order - token * index.shape[1],
        expert=flat[order],
        counts=counts[:experts],
        weight=weights.reshape(-1)[order].to(torch.float32),
    )
