"""Scripts are no package: their folder goes onto the path, as it is when they run. And a backend that needs no GPU."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))


@dataclass(frozen=True)
class GemmShape:
    """As the benchmarks give it to the backend."""

    experts: int
    k: int
    n: int
    top_k: int
    fused_gate_up: bool


class FakeProduct:
    """Dense weights, an expert at a time; rows by token and slot, zero for padding."""

    def __init__(self, shape: GemmShape, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn((shape.experts, shape.n, shape.k), generator=generator) / shape.k**0.5
        self.shape, self.last = shape, torch.zeros(0)

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        del top_k_weights
        ids = top_k_index.flatten()
        rows = hidden if hidden.shape[0] == ids.numel() else hidden.repeat_interleave(top_k_index.shape[1], 0)
        self.last = torch.zeros((ids.numel(), self.shape.n))
        for expert in range(self.shape.experts):
            self.last[ids == expert] = rows[ids == expert].float() @ self.weight[expert].T
        return self.last.bfloat16()

    def reference(self, rows: Tensor) -> Tensor:
        return self.last[rows]


class FakeBlock:
    """Two products and what stands between and behind them."""

    def __init__(self, gate_up: GemmShape, down: GemmShape, seed: int) -> None:
        self.gate_up, self.down, self.last = FakeProduct(gate_up, seed), FakeProduct(down, seed + 1), torch.zeros(0)

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate, up = self.gate_up.run(hidden, top_k_index, top_k_weights).float().chunk(2, -1)
        rows = self.down.run(torch.nn.functional.silu(gate) * up, top_k_index, top_k_weights).float()
        self.last = (rows.view(*top_k_index.shape, -1) * top_k_weights[..., None]).sum(1)
        return self.last.bfloat16()

    def reference(self, rows: Tensor) -> Tensor:
        return self.last[rows]


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stands in for the Triton backend; gives the schemes that were asked for, in order."""
    asked: list[tuple[str, ...]] = []

    def prepare(shape: GemmShape, schemes: list[str], *, tokens: int, seed: int) -> FakeProduct:
        assert len(schemes) == shape.experts
        assert tokens > 0
        asked.append(tuple(schemes))
        return FakeProduct(shape, seed)

    def prepare_block(
        gate_up: GemmShape, down: GemmShape, first: list[str], second: list[str], *, tokens: int, seed: int
    ) -> FakeBlock:
        assert gate_up.fused_gate_up
        assert not down.fused_gate_up
        assert len(first) == len(second) == gate_up.experts
        assert tokens > 0
        asked.append((*first, *second))
        return FakeBlock(gate_up, down, seed)

    module = types.ModuleType("mxmoe.backends.triton.bench")
    vars(module).update(GemmShape=GemmShape, prepare=prepare, prepare_block=prepare_block)
    monkeypatch.setitem(sys.modules, "mxmoe.backends.triton.bench", module)
    return asked
