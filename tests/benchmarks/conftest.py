"""Scripts are no package: their folder goes onto the path, as it is when they run. And a backend that needs no GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_workloads import Cell

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))


@dataclass(frozen=True)
class FakeBound:
    """A launch over fixed inputs, as `random_bank.Bound`."""

    launch: Callable[[], Tensor]
    check: Callable[[], float]
    config: str = "fake"


class FakeWeights:
    """Dense weights of both products; an expert at a time; rows by token and slot, zero for padding."""

    def __init__(self, cell: Cell, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cell, model = cell, cell.model
        self.weights = [torch.randn((model.experts, n, k), generator=generator) / k**0.5 for n, k in cell.gemms]

    def product(self, which: int, rows: Tensor, ids: Tensor) -> Tensor:
        weight = self.weights[which]
        out = torch.zeros((ids.numel(), weight.shape[1]))
        for expert in range(len(weight)):
            mine = ids.flatten() == expert
            out[mine] = rows[mine].float() @ weight[expert].T
        return out

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x if self.cell.part == "down" else x.repeat_interleave(ids.shape[1], 0)
        first = self.product(0, rows, ids)
        if self.cell.part != "block":
            return first
        gate, up = first.chunk(2, -1)
        second = self.product(1, torch.nn.functional.silu(gate) * up, ids)
        return (second.view(*ids.shape, -1) * weights[..., None]).sum(1)

    def bind(self, x: Tensor, ids: Tensor, weights: Tensor) -> FakeBound:
        return FakeBound(lambda: self.run(x, ids, weights), lambda: 0.001)


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stands in for kernels and packed weights; gives the schemes that were asked for, in order."""
    asked: list[tuple[str, ...]] = []

    def prepare(cell: Cell, plan: Sequence[Sequence[str]], device: str, seed: int) -> FakeWeights:
        assert device == "cpu"
        assert [len(product) for product in plan] == [cell.model.experts] * len(cell.gemms)
        asked.append(tuple(scheme for product in plan for scheme in product))
        return FakeWeights(cell, seed)

    module = types.ModuleType("random_bank")
    vars(module).update(prepare=prepare)
    mode = types.ModuleType("mxmoe.backends.triton.mode")
    vars(mode).update(choose_mode=lambda: None)
    monkeypatch.setitem(sys.modules, "random_bank", module)
    monkeypatch.setitem(sys.modules, "mxmoe.backends.triton.mode", mode)
    return asked


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the kernels."""
    monkeypatch.setitem(sys.modules, "mxmoe.backends.triton.mode", None)
    monkeypatch.setitem(sys.modules, "random_bank", None)
