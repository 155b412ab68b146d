"""Routers fitted anew: nothing to do where nothing changed, exact where it can be, and never worse on new tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import mxmoe
from mxmoe.calib import repair_routers
from mxmoe.calib.repair import _solve
from mxmoe.calib.router import Router
from mxmoe.errors import BadOption, NoRouter
from mxmoe.frontend import lift

from .test_observer import EXPERTS, HIDDEN, config, randomized
from .test_probe import MLP, Block, seeded


def ids(count: int = 8) -> Tensor:
    return torch.randint(64, (count, 30), generator=torch.Generator().manual_seed(6))


def quantized(model: nn.Module, scheme: str = "w2a16_g16_asym") -> Any:  # noqa: ANN401  # the model, with company
    return mxmoe.compile(copy.deepcopy(model), "eager", schemes=scheme, quiet=True)


def test_a_quantized_models_routers_are_repaired() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    narrow = quantized(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = narrow(ids()).logits.detach()
    found = repair_routers(lift(model), narrow, list(ids()), quiet=True)
    assert set(found.blocks) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    first, second = found.blocks.values()
    # the first block's tokens are as they were: nothing is before it
    assert first.before == first.after == 1
    assert not first.is_changed
    assert second.before < 1
    assert second.is_changed
    assert second.after > second.before
    assert "model.layers.1.mlp: top-k agreement 0." in found.report()
    assert found.report().splitlines()[-1].startswith("all: ")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(narrow(ids()).logits, plain)
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *narrow.modules()))


def test_a_blocks_router_is_replaced_and_not_the_one_it_shares() -> None:
    block = randomized(Qwen2MoeSparseMoeBlock(config()))
    compiled: Any = mxmoe.compile(block, "eager", schemes="w4a16_sym", quiet=True)
    router = block.gate.weight.clone()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        compiled.block.gate.weight = nn.Parameter(router + 0.5 * torch.randn(router.shape))
    x = torch.randn((200, HIDDEN), generator=torch.Generator().manual_seed(1))
    found = repair_routers(lift(block), compiled, x, ridge=1e-9, quiet=True).blocks["moe"]
    assert found.before < 0.95
    assert found.after > 0.999
    torch.testing.assert_close(compiled.block.gate.weight.detach(), router, atol=1e-3, rtol=1e-3)
    assert torch.equal(block.gate.weight, router)  # type: ignore[union-attr,arg-type]


def test_an_equal_copy_is_left_as_it_is() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    twin = copy.deepcopy(model)
    found = repair_routers(lift(model), twin, ids(), quiet=True)
    assert all((one.before, one.after, one.is_changed) == (1, 1, False) for one in found.blocks.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_lists_of_experts_are_judged_by_logits() -> None:
    block = seeded(Block(nn.ModuleList(MLP() for _ in range(4))))
    twin: Any = copy.deepcopy(block)
    with torch.no_grad():
        twin.gate.weight += 0.3 * torch.randn(twin.gate.weight.shape, generator=torch.Generator().manual_seed(9))
    x = torch.randn((100, 16), generator=torch.Generator().manual_seed(2))
    found = repair_routers(lift(block), twin, x, ridge=1e-9, quiet=True).blocks["moe"]
    assert found.before < 0.9
    assert found.after > 0.99


@pytest.mark.parametrize("rest", [0.0, 0.3, 1.0])
def test_the_fit_is_the_minimum(rest: float) -> None:
    """Against gradient descent by torch on the sum that the docstring states."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn((40, 6), generator=generator), torch.randn((40, EXPERTS), generator=generator)
    linear = nn.Linear(6, EXPERTS)
    router = Router(linear, linear.weight, linear.bias)
    got = _solve(router, x, target, 2, rest, 0.05)

    def loss(weight: Tensor) -> Tensor:
        top = torch.zeros_like(target).scatter_(1, target.topk(2, dim=-1).indices, 1.0)
        c = (top + (1 - top) * rest).double()
        fit = (c * (x.double() @ weight.T + linear.bias.detach().double() - target.double()).square()).sum()
        mean = (c[:, :, None] * x.double().square()[:, None]).sum(0).mean(-1)
        pull = 0.05 * mean * (weight - linear.weight.detach().double()).square().sum(-1)
        return fit + pull.sum()

    point = got.double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(point), point)
    assert float(slope.abs().max()) < 1e-4
    with torch.no_grad():
        assert loss(point) <= loss(linear.weight.double())


def test_what_cannot_be_repaired_is_refused() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    with pytest.raises(NoRouter, match="another object than the reference"):
        repair_routers(lift(model), model, ids(), quiet=True)
    twin = copy.deepcopy(model)
    with pytest.raises(BadOption, match="read once for each block"):
        repair_routers(lift(model), twin, iter([ids()]), quiet=True)
    for option in ({"rest": 1.5}, {"ridge": 0.0}):
        with pytest.raises(BadOption, match=next(iter(option))):
            repair_routers(lift(model), twin, ids(), **option, quiet=True)  # type: ignore[arg-type]
