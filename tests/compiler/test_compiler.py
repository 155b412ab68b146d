"""`mxmoe.compile` as its users call it: blocks, experts, lists, models; modes of torch; copies."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import mxmoe
import mxmoe.compiler
from mxmoe.compiled import CompiledMoE
from mxmoe.frontend import lift
from mxmoe.ir import Scheme
from mxmoe.quant import tolerance

from .blocks import (
    CONFIG,
    HIDDEN,
    MLP,
    TWO,
    ListBlock,
    TwoStacks,
    compiled,
    error,
    qwen_model,
    seeded,
)

# What goes in, what comes out


def test_no_option_at_all_works(block: nn.Module, x: Tensor) -> None:
    made = mxmoe.compile(block, quiet=True)
    assert isinstance(made, CompiledMoE)
    assert error(made(x), block(x)) < 0.5
    assert "uniform routing" in str(made.report())
    assert "data-free" in str(made.report())
    assert set(map(str, made.plan.histogram())) <= set(mxmoe.compiler.find_target("numba").candidates)


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_8_bits_are_close_and_the_block_stays_as_it_was(block: nn.Module, x: Tensor, target: str) -> None:
    before, modules = block(x), list(block.modules())
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in block.state_dict().items()}
    made = compiled(block, target, inputs=x, schemes="w8a16_g32_asym")
    assert error(made(x), before) < 0.02
    assert torch.equal(block(x), before)
    assert list(block.modules()) == modules
    for name, tensor in block.state_dict().items():
        assert tensor.data_ptr() == state[name][0], name
        assert torch.equal(tensor, state[name][1]), name


def test_the_router_is_shared_and_the_signature_kept(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes=TWO)
    assert made.block.gate.weight is block.get_parameter("gate.weight")
    assert made.block.shared_expert_gate.weight is block.get_parameter("shared_expert_gate.weight")
    assert inspect.signature(made) == inspect.signature(made.forward) == inspect.signature(block.forward)
    assert torch.equal(made(hidden_states=x), made(x))


@pytest.mark.parametrize("schemes", [None, ("w3a16_g32_asym", "w8a8_sym"), ("w4a4_g32_sym", "bf16")])
def test_eager_and_numba_agree(block: nn.Module, x: Tensor, schemes: tuple[str, ...] | None) -> None:
    made = [compiled(block, target, inputs=x, schemes=schemes, weight_bits=8.5) for target in ("eager", "numba")]
    assert made[0].plan == made[1].plan
    allowed = max(map(tolerance, made[0].plan.histogram()))
    assert error(made[1](x), made[0](x)) <= 3 * allowed


def test_experts_alone(x: Tensor) -> None:
    experts = seeded(Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)))
    rows = x.reshape(-1, HIDDEN)
    weights, index = torch.rand((len(rows), 4)).softmax(dim=-1).topk(2, dim=-1)
    wanted = experts(rows, index, weights)
    for inputs in (None, rows, (rows, index, weights)):
        made = compiled(experts, inputs=inputs, schemes="w8a16_g32_asym")
        assert isinstance(made, CompiledMoE)
        assert error(made(rows, index, weights), wanted) < 0.02
        assert torch.equal(made(rows, top_k_index=index, top_k_weights=weights), made(rows, index, weights))
        assert inspect.signature(made) == inspect.signature(made.forward) == inspect.signature(experts.forward)


def test_a_list_of_mlps(x: Tensor) -> None:
    block = seeded(ListBlock())
    made = compiled(block, inputs=x, schemes="w8a16_g32_asym")
    assert error(made(x), block(x)) < 0.02
    assert isinstance(made.block, ListBlock)
    assert all(isinstance(expert, MLP) for expert in block.get_submodule("experts"))


def test_a_block_that_is_only_a_shared_bank(x: Tensor) -> None:
    module = seeded(TwoStacks())
    wanted = module(x)
    assert any(list(one.banks) == ["shared"] for one in lift(module).blocks)
    made = compiled(copy.deepcopy(module), inputs={"x": x}, schemes="w8a16_g32_asym")
    assert {row.bank for row in made.plan.rows} == {"routed", "shared"}
    assert error(made(x), wanted) < 0.03


def test_blocks_whose_path_is_the_name_of_a_root_block(x: Tensor) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = ListBlock()
            self.moe2 = ListBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.moe2(x + self.moe(x))

    layer = seeded(Layer())
    wanted = layer(x)
    made = compiled(layer, inputs={"x": x}, schemes="w8a16_g32_asym")
    assert made is layer
    assert {row.block for row in made.plan.rows} == {"moe", "moe2"}
    assert error(made(x), wanted) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_returned_with_its_blocks_replaced(dtype: torch.dtype) -> None:
    model = qwen_model(dtype)
    ids = torch.randint(0, 32, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wanted = model(ids).logits
    made = compiled(model, inputs=ids, schemes="w8a16_g32_asym")
    assert made is model
    with torch.inference_mode():
        out = made(ids).logits
    assert out.dtype == dtype
    assert error(out, wanted) < 0.05
    assert not any("experts.gate_up_proj" in name for name, _ in made.named_parameters())
    longer = made.generate(ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert longer.shape == (3, 7)
    assert {row.block for row in made.plan.rows} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert "quantized" in str(made.report())


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_dense_expert_tensors_are_let_go(target: str) -> None:
    model = qwen_model(torch.bfloat16)  # bf16: eager's 16-bit rows could be views of the originals
    experts = [p for name, p in model.named_parameters() if "expert" in name and "gate.weight" not in name]
    assert len(experts) == 2 * 5
    seen = [weakref.ref(parameter) for parameter in experts]
    stores = [weakref.ref(parameter.untyped_storage()) for parameter in experts]
    del experts
    made = compiled(model, target, schemes=("bf16", "w4a16_g32_asym"), weight_bits=9)
    assert Scheme.parse("bf16") in made.plan.histogram()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
    assert [ref() for ref in stores] == [None] * len(stores)


def test_later_changes_of_the_block_do_not_reach_what_was_compiled(block: nn.Module, x: Tensor) -> None:
    made = [compiled(block, target, schemes="bf16") for target in ("eager", "numba")]
    before = [one(x) for one in made]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "gate.weight" not in name:
                parameter.mul_(2)
    for one, out in zip(made, before, strict=True):
        assert torch.equal(one(x), out)


# Modes of torch


def test_modes_of_torch(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes="w8a16_g32_asym")
    with torch.no_grad():
        wanted = made(x)
    with torch.inference_mode():
        assert torch.equal(made(x), wanted)
        assert torch.equal(made(x.clone()), wanted)
    assert torch.equal(made(x.clone().requires_grad_()).detach(), wanted)
    made.train()
    assert made.block.training
    low = made.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert error(low, wanted) < 0.2  # a token near a tie may take another expert


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_a_model_with_compiled_experts_can_be_traced(target: str) -> None:
    made = compiled(qwen_model(), target, schemes="w8a16_g32_asym")
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        traced = torch.compile(made, backend="eager")
        assert error(traced(ids).logits, made(ids).logits) < 1e-4


def test_copies_share_the_compiled_experts(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes=TWO)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    assert twin.compilation is made.compilation
    assert twin.block is not made.block
    model = compiled(qwen_model(), schemes="w4a16_g32_asym")
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_routing_to_no_expert_and_no_tokens_at_all(x: Tensor) -> None:
    experts = seeded(Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)))
    made = compiled(experts, schemes=TWO)
    rows = x.reshape(-1, HIDDEN)[:3]
    padding = torch.full((3, 2), 4)
    assert not made(rows, padding, torch.ones(3, 2)).any()
    assert made(rows[:0], padding[:0], torch.ones(0, 2)).shape == (0, HIDDEN)
