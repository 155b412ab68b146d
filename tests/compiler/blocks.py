"""Small modules with experts, as users have them, and a shorter way to call `compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeSparseMoeBlock

import mxmoe
import mxmoe.compiler

HIDDEN = 32
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
TWO = ("w3a16_g32_asym", "w8a8_sym")
"""Schemes for tests that are not about them: two are observed faster than the target's six."""
STAGES = ("lifted", "annotated", "allocated", "lowered")


def seeded(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401  # as below
    """Give a module random weights of a size that keeps activations near one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return module.to(dtype).eval()


def qwen_block(dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401  # torch types every attribute as a module
    return seeded(Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**CONFIG)), dtype)


def qwen_model(dtype: torch.dtype = torch.float32, **more: bool) -> Any:  # noqa: ANN401  # as above
    return seeded(Qwen2MoeForCausalLM(Qwen2MoeConfig(**CONFIG, **more)), dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, 24, bias=False)
        self.up_proj = nn.Linear(HIDDEN, 24, bias=False)
        self.down_proj = nn.Linear(24, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(nn.Module):
    """A router, and a list of MLPs that the block loops over."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, HIDDEN)
        weights, index = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.reshape(hidden_states.shape)


class TwoStacks(nn.Module):
    """Two banks of experts with one shared MLP between them, which is therefore a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first_experts, self.second_experts = (Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)) for _ in range(2))
        self.shared_expert = MLP()
        self.top_k = 2
        self.router = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(dim=-1).topk(2, dim=-1)
        return self.second_experts(self.first_experts(rows, index, weights), index, weights) + self.shared_expert(rows)


def error(out: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())


def compiled(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # whatever a user may pass
    return mxmoe.compile(*args, quiet=True, **kwargs)
