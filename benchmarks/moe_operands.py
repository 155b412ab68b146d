"""Weights and activations of a cell as the peers read them, and their dequantized values for the checks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from moe_workloads import Cell, Rotation, random_values
from torch import Tensor

FP8 = torch.float8_e4m3fn


@functools.lru_cache(maxsize=2)
def stored(kind: str, n: int, k: int, experts: int, copies: int, device: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Copies of the weights [experts, n, k] of one product with their scales [experts, n], kept for the next cell."""
    found: list[tuple[Tensor, Tensor]] = []
    for copy in range(copies):
        if kind == "bf16":
            weight, scale = random_values((experts, n, k), k**-0.5, torch.bfloat16, device, copy), 1.0
        elif kind == "fp8":
            weight, scale = random_values((experts, n, k), 32.0, FP8, device, copy), k**-0.5 / 32
        else:
            weight = torch.empty((experts, n, k), dtype=torch.int8, device=device)
            weight.random_(-127, 128, generator=torch.Generator(device).manual_seed(copy))
            scale = k**-0.5 / 73
        spread = 0.5 + torch.rand((experts, n), device=device) if kind != "bf16" else torch.ones((1, 1), device=device)
        found.append((weight, spread * scale))
    return tuple(found)


def tokens_of(cell: Cell, device: str) -> Tensor:
    """[tokens, hidden] of a layer's input, or [rows, intermediate] of what down reads, by token and slot."""
    down = cell.part == "down"
    shape = (cell.rows, cell.model.intermediate) if down else (cell.tokens, cell.model.hidden)
    return random_values(shape, 1.0, torch.bfloat16, device, 77)


def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Each row over its largest value: ([rows, k] fp8 or int8, [rows, 1] float32)."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-10) / (448.0 if kind == "fp8" else 127.0)
    wide = x.float() / scale
    return (wide.to(FP8) if kind == "fp8" else wide.round().to(torch.int8)), scale


def widened(weights: tuple[Tensor, Tensor]) -> Callable[[int], Tensor]:
    """Expert -> its dequantized weight [n, k] in float32."""
    weight, scale = weights
    return lambda expert: weight[expert].float() * (scale[expert][:, None] if scale.shape[0] > 1 else 1.0)


def sorted_rows(cell: Cell, x: Tensor, turn: Rotation) -> Tensor:
    """Rows in the order of experts."""
    return x[turn.order if cell.part == "down" else turn.order // cell.model.top_k].contiguous()


def metadata(turn: Rotation, experts: int) -> tuple[Tensor, Tensor]:
    """(order [rows] int64, ends [experts] int32) from the indices alone, as a block has to make them."""
    sorted_ids, order = torch.sort(turn.ids.flatten(), stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=order.device, dtype=torch.int32), right=True)
    return order, ends.to(torch.int32)
