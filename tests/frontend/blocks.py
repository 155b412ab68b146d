"""Blocks as one meets them outside of transformers 5: lists of MLPs, and stacks without its decorator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """A gated MLP under given names."""

    def __init__(
        self, hidden: int, width: int, names: tuple[str, str, str], act: nn.Module, bias: bool = False
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(hidden, width, bias=bias))
        self.add_module(names[1], nn.Linear(hidden, width, bias=bias))
        self.add_module(names[2], nn.Linear(width, hidden, bias=bias))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


PROJ = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


class ListBlock(nn.Module):
    """A router and a list of MLPs, with the loop over experts in the block, as Mixtral was first published."""

    def __init__(
        self,
        experts: int = 4,
        hidden: int = 16,
        width: int = 24,
        top_k: int = 2,
        names: tuple[str, str, str] = PROJ,
        act: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(MLP(hidden, width, names, act(), bias) for _ in range(experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, index = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.reshape(hidden_states.shape)


class Stack(nn.Module):
    """Experts in 3-D parameters, stored in any of the ways that the flags of transformers 5 name."""

    def __init__(
        self,
        experts: int = 4,
        hidden: int = 16,
        width: int = 24,
        *,
        is_transposed: bool = False,
        is_concatenated: bool = True,
        has_bias: bool = False,
        has_gate: bool = True,
        is_split: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.has_bias, self.has_gate, self.is_split = has_bias, has_gate, is_split
        self.act_fn = nn.SiLU()
        rows = {"down_proj": (hidden, width), "up_proj": (width, hidden)}
        if is_split and has_gate:
            rows["gate_proj"] = (width, hidden)
        elif has_gate:
            rows = {"down_proj": (hidden, width), "gate_up_proj": (2 * width, hidden)}
        for name, (n, k) in rows.items():
            setattr(self, name, nn.Parameter(torch.randn(experts, *((k, n) if is_transposed else (n, k))) / 4))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, n)))

    def _linear(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else 0
        return x @ (weight if self.is_transposed else weight.T) + bias

    def inner(self, x: Tensor, expert: int) -> tuple[Tensor | None, Tensor]:
        """Gate and up of one expert."""
        if not self.has_gate:
            return None, self._linear("up_proj", x, expert)
        if self.is_split:
            return self._linear("gate_proj", x, expert), self._linear("up_proj", x, expert)
        both = self._linear("gate_up_proj", x, expert)
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return gate, up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate, up = self.inner(hidden_states[token], expert)
            y = self._linear("down_proj", F.silu(up) if gate is None else F.silu(gate) * up, expert)
            out.index_add_(0, token, y * top_k_weights[token, slot, None])
        return out


class StackBlock(nn.Module):
    """A router and a stack."""

    def __init__(self, stack: nn.Module | None = None, top_k: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.experts = Stack(hidden=hidden) if stack is None else stack
        self.gate = nn.Linear(hidden, self.experts.num_experts, bias=False)
        self.top_k = top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, index = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        return self.experts(rows, index, weights).reshape(hidden_states.shape)
