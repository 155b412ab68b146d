"""Models to transform: decoder layers of our own in float64, and small ones of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 24, 4, 2


class RmsNorm(nn.Module):
    """In the dtype that it is given; `offset` 1 stores the weight as Gemma does."""

    def __init__(self, offset: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5 - offset)
        self.bias = nn.Parameter(torch.randn(HIDDEN)) if bias else None
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        gain = self.offset + self.weight
        out = gain * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return out if self.bias is None else out + self.bias


class Mlp(nn.Module):
    """A gated MLP; its names are those of Mixtral as first published, or those of today."""

    def __init__(self, names: tuple[str, str, str], bias: bool = False) -> None:
        super().__init__()
        self.names = names
        for name, (k, n) in zip(names, [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)], strict=True):
            self.add_module(name, nn.Linear(k, n, bias=bias))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Stack(nn.Module):
    """Experts in 3-D parameters, stored in the ways that flags of transformers name."""

    def __init__(self, *, is_odd: bool = False, is_split: bool = False, is_gated: bool = True) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.is_transposed, self.is_concatenated, self.has_bias = is_odd, not is_odd, is_odd
        self.has_gate, self.act_fn = is_gated, nn.SiLU()
        names = ["up_proj"] if not is_gated else ["gate_proj", "up_proj"] if is_split else ["gate_up_proj"]
        for name in names:
            rows = WIDTH * (2 if name == "gate_up_proj" else 1)
            self._parameter(name, rows, HIDDEN)
        self._parameter("down_proj", HIDDEN, WIDTH)

    def _parameter(self, name: str, n: int, k: int) -> None:
        shape = (k, n) if self.is_transposed else (n, k)
        setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape) / 4))
        if self.has_bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n)))

    def _linear(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else 0
        return x @ (weight if self.is_transposed else weight.T) + bias

    def _inner(self, x: Tensor, expert: int) -> Tensor:
        if not self.has_gate:
            return self.act_fn(self._linear("up_proj", x, expert))
        if hasattr(self, "gate_proj"):
            return self.act_fn(self._linear("gate_proj", x, expert)) * self._linear("up_proj", x, expert)
        both = self._linear("gate_up_proj", x, expert)
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            y = self._linear("down_proj", self._inner(hidden_states[token], expert), expert)
            out.index_add_(0, token, y * top_k_weights[token, slot, None])
        return out


MIXTRAL, PROJ = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")

FORMS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: nn.ModuleList(Mlp(MIXTRAL) for _ in range(EXPERTS)),
    "biased list": lambda: nn.ModuleList(Mlp(PROJ, bias=True) for _ in range(EXPERTS)),
    "stack": Stack,
    "transposed, interleaved, biased": lambda: Stack(is_odd=True),
    "split": lambda: Stack(is_split=True),
    "ungated": lambda: Stack(is_gated=False),
}
"""Ways of storing experts -> how to make some."""


class Block(nn.Module):
    """A router, experts in any form, and a shared expert."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.experts = FORMS[form]()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.shared_expert = Mlp(PROJ)
        self.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, HIDDEN)
        weights, index = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        if isinstance(self.experts, nn.ModuleList):
            out = torch.zeros_like(rows)
            for number, expert in enumerate(self.experts):
                token, slot = torch.where(index == number)
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        else:
            out = self.experts(rows, index, weights)
        out = out + torch.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        return out.reshape(hidden_states.shape)


class Layer(nn.Module):
    """A residual connection around norm and block; `parallel` reads the norm's output beside the block, too."""

    def __init__(self, block: nn.Module, norm: nn.Module | None = None, parallel: nn.Module | None = None) -> None:
        super().__init__()
        self.mlp = block
        self.post_attention_layernorm = norm or RmsNorm()
        self.parallel = parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.post_attention_layernorm(hidden_states)
        out = hidden_states + self.mlp(x)
        return out if self.parallel is None else out + self.parallel(x)


class Model(nn.Module):
    """Token ids to logits through a few layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, 32, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def own_model(form: str, norm: Callable[[], nn.Module] = RmsNorm, seed: int = 0, n_layers: int = 2) -> Model:
    """A model in float64 with experts in one form and two layers."""
    torch.manual_seed(seed)
    return Model([Layer(Block(form), norm()) for _ in range(n_layers)]).double().eval()


def ids_of(seed: int, tokens: int = 96) -> Tensor:
    """Token ids [2, tokens / 2]."""
    return torch.randint(32, (2, tokens // 2), generator=torch.Generator().manual_seed(seed))


def qwen(dtype: torch.dtype = torch.float32, **further: object) -> PreTrainedModel:
    """Qwen2-MoE with a shared expert, weights large enough that every part matters."""
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        use_cache=False,
        **further,
    )
    return _filled(Qwen2MoeForCausalLM(config), dtype)


def mixtral(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Mixtral, whose router has jitter while training."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_jitter_noise=0.1,
        use_cache=False,
    )
    return _filled(MixtralForCausalLM(config), dtype)


def _filled(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.to(dtype).eval()


TRANSFORMERS: dict[str, Callable[..., PreTrainedModel]] = {"qwen": qwen, "mixtral": mixtral}


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits."""
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())
