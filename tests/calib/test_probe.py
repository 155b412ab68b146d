"""What a block does to its banks' outputs, asked of blocks of several makes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxmoe.calib import observe
from mxmoe.calib.probe import first_tensor, probe_assignments, probe_factors
from mxmoe.frontend import lift
from mxmoe.ir import Scheme
from mxmoe.quant import dequantize, quantize

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 16, 24, 4, 2, 60
# so coarse that the cast of the activations, which the plain replacement of a weight leaves out, does not show
COARSE = "w2a16_g8_sym"


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def tokens() -> Tensor:
    return torch.randn((TOKENS, HIDDEN), generator=torch.Generator().manual_seed(1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER)
        self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stack(nn.Module):
    """Experts in 3-D parameters; with a norm behind each, or called as shared experts are."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER))
        self.act_fn = nn.SiLU()
        self.num_experts = EXPERTS
        self.has_post_expert_norm = norm
        if norm:
            self.post_expert_norm = nn.RMSNorm(HIDDEN)

    def one(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
        y = (self.act_fn(gate) * up) @ self.down_proj[expert].T
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            row, slot = torch.where(top_k_index == expert)
            out.index_add_(0, row, self.one(hidden_states[row], expert) * top_k_weights[row, slot, None])
        return out


class SharedStack(Stack):
    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:  # type: ignore[override]
        rows = hidden_states.reshape(-1, HIDDEN)
        out = sum(self.one(rows, e) * gammas.reshape(-1, EXPERTS)[:, e, None] for e in range(EXPERTS))
        return out.reshape(hidden_states.shape)  # type: ignore[union-attr]


class Block(nn.Module):
    """A router, experts called in one of several ways, and perhaps something behind them."""

    def __init__(self, experts: nn.Module, behind: str = "scale", shared: nn.Module | None = None) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts
        self.behind = behind
        if shared is not None:
            self.shared_experts = shared
            self.shared_gate = nn.Linear(HIDDEN, EXPERTS if isinstance(shared, SharedStack) else 1)
        if behind == "project":
            self.project = nn.Linear(HIDDEN, HIDDEN)

    def mixed(self, rows: Tensor) -> Tensor:
        weights, index = self.gate(rows).softmax(dim=-1).topk(TOP_K, dim=-1)
        if isinstance(self.experts, Stack):
            return self.experts(rows, index, weights)
        # every expert's rows in an order of its own, as with a sort by expert
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):  # type: ignore[arg-type]
            row, slot = torch.where(index == number)
            order = torch.randperm(len(row), generator=torch.Generator().manual_seed(number))
            row, slot = row[order], slot[order]
            out.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return out

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        rows = hidden_states.reshape(-1, HIDDEN)
        out = self.mixed(rows)
        out = out * 2.5 if self.behind == "scale" else self.project(out)
        if hasattr(self, "shared_experts"):
            gate = self.shared_gate(rows).sigmoid()
            shared = self.shared_experts
            out = out + (shared(rows, gate) if isinstance(shared, SharedStack) else gate * shared(rows))
        return out.reshape(hidden_states.shape) + hidden_states, "and a second result"


def squared_change(block: nn.Module, x: Tensor, get: Callable[[nn.Module], Tensor], part: slice | int) -> float:
    """Change of the block's output when one weight is replaced; only the weight, its input is left as it is."""
    changed = copy.deepcopy(block)
    weight = get(changed)
    with torch.no_grad():
        weight[part] = dequantize(quantize(weight[part], Scheme.parse(COARSE)))
        return float((changed(x)[0] - block(x)[0]).double().square().sum())


@pytest.mark.parametrize("norm", [False, True])
def test_routed_experts_behind_a_scale(norm: bool) -> None:
    block, x = seeded(Block(Stack(norm))), tokens()
    stats = observe(lift(block), x, schemes=[COARSE], min_tokens=0, quiet=True)
    assert stats.bank("moe", "routed").measured_at == "block"
    got = stats.sensitivity("moe", "routed", "down")[:, 0]
    for expert in range(EXPERTS):
        want = squared_change(block, x, lambda b: b.experts.down_proj.data, expert)  # type: ignore[union-attr]
        assert got[expert] == pytest.approx(want, rel=0.03)


def test_a_list_of_mlps_in_any_order() -> None:
    block, x = seeded(Block(nn.ModuleList(MLP() for _ in range(EXPERTS)))), tokens()
    stats = observe(lift(block), list(x.split(25)), schemes=[COARSE], min_tokens=0, quiet=True)
    sums = stats.bank("moe", "routed")
    weights, index = block.gate(x).softmax(dim=-1).topk(TOP_K, dim=-1)  # type: ignore[operator]
    assert (sums.n_tokens, sums.measured_at) == (TOKENS, "block")
    assert sums.tokens.tolist() == torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
    # what the block multiplies with includes what stands behind the experts
    want = torch.zeros(EXPERTS).index_add_(0, index.flatten(), 2.5 * weights.detach().flatten())
    np.testing.assert_allclose(sums.mass, want, rtol=1e-4)
    for role in ("gate", "up", "down"):
        got = stats.sensitivity("moe", "routed", role)[:, 0]
        for e in range(EXPERTS):
            get = lambda b, e=e, role=role: b.experts[e].get_submodule(f"{role}_proj").weight.data  # noqa: E731
            assert got[e] == pytest.approx(squared_change(block, x, get, slice(None)), rel=0.03)


@pytest.mark.parametrize("shared", [MLP, SharedStack])
@pytest.mark.parametrize("experts", [Stack, lambda: nn.ModuleList(MLP() for _ in range(EXPERTS))])
def test_shared_experts_behind_a_gate(shared: Callable[[], nn.Module], experts: Callable[[], nn.Module]) -> None:
    block, x = seeded(Block(experts(), shared=shared())), tokens()
    stats = observe(lift(block), x, schemes=[COARSE], min_tokens=0, quiet=True)
    got = stats.sensitivity("moe", "shared", "down")[:, 0]
    assert stats.bank("moe", "shared").n_tokens == TOKENS
    for expert in range(len(got)):

        def get(b: nn.Module) -> Tensor:
            down = b.shared_experts.down_proj  # type: ignore[union-attr]
            return down.data if isinstance(down, nn.Parameter) else down.weight.data  # type: ignore[union-attr,return-value]

        part = expert if shared is SharedStack else slice(None)
        assert got[expert] == pytest.approx(squared_change(block, x, get, part), rel=0.03)


@pytest.mark.parametrize("experts", [Stack, lambda: nn.ModuleList(MLP() for _ in range(EXPERTS))])
def test_a_projection_behind_the_experts_is_said(experts: Callable[[], nn.Module]) -> None:
    block = seeded(Block(experts(), behind="project"))
    stats = observe(lift(block), tokens(), schemes=[COARSE], min_tokens=0, quiet=True)
    assert stats.bank("moe", "routed").measured_at == "bank"
    assert "bank's own output" in stats.report()
    assert (stats.sensitivity("moe", "routed", "up") > 0).all()


class Weighing(nn.Module):
    """Adds two modules' outputs, each times a column of `factors`."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) * self.factors[:, :1] + self.two(x) * self.factors[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_read_off(dtype: torch.dtype) -> None:
    factors = torch.rand((TOKENS, 2), generator=torch.Generator().manual_seed(2)).to(dtype)
    block, x = Weighing(factors), torch.zeros((TOKENS, HIDDEN), dtype=dtype)
    found = probe_factors(lambda: block(x), [block.one, block.two], [], TOKENS, HIDDEN)
    assert found is not None
    assert torch.equal(torch.stack(found, dim=1), factors.float())
    silent = probe_factors(lambda: block(x + 7), [block.two], [block.one], TOKENS, HIDDEN)
    assert silent is not None
    np.testing.assert_allclose(silent[0], factors[:, 1].float(), atol=0.05)
    assert not any("forward" in vars(module) for module in block.modules())


def test_too_few_channels_or_another_shape_is_none() -> None:
    block = Weighing(torch.ones(TOKENS, 2))
    x = torch.zeros(TOKENS, 1)
    assert probe_factors(lambda: block(x), [block.one, block.two], [], TOKENS, 1) is None
    assert probe_factors(lambda: block(x)[:5], [block.one], [], TOKENS, 1) is None
    assert probe_factors(lambda: None, [block.one], [], TOKENS, 1) is None
    assert probe_assignments(lambda: block(x), [block.one], [TOKENS], [], TOKENS, 1) is None


def test_a_forward_of_the_users_own_is_put_back() -> None:
    block = Weighing(torch.ones(TOKENS, 2))
    mine = block.one.forward = lambda x: x * 3  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        probe_factors(lambda: _stop(), [block.one], [block.two], TOKENS, HIDDEN)
    assert vars(block.one)["forward"] is mine
    assert "forward" not in vars(block.two)


def _stop() -> None:
    raise RuntimeError("stop")


def test_first_tensor() -> None:
    x = torch.ones(1)
    assert first_tensor(x) is x
    assert first_tensor((None, x)) is x
    assert first_tensor(("a", None)) is None
    assert first_tensor(3) is None
    assert F.relu(x) is not x
