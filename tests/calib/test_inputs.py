"""Batches that a module cannot take are named before it runs, and the others arrive as it takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import observe
from mxmoe.errors import BadCalibration
from mxmoe.frontend import lift

HIDDEN = 16
VOCABULARY = 32
SCHEMES = ("w8a8_sym",)
CONFIG = Qwen2MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
)


def randomized(module: nn.Module) -> Any:  # noqa: ANN401  # torch types every attribute as a module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return module.eval()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn((32, HIDDEN), generator=torch.Generator().manual_seed(0))


def test_a_module_that_wants_more_than_a_tensor_says_so(hidden: Tensor) -> None:
    layer = randomized(Qwen2MoeForCausalLM(CONFIG)).get_submodule("model.layers.1")
    with pytest.raises(BadCalibration, match=r"cannot be called .*'hidden_states'\): pass a mapping of arguments"):
        observe(lift(layer), torch.zeros(4, dtype=torch.int64), schemes=SCHEMES, quiet=True)
    block = randomized(Qwen2MoeSparseMoeBlock(CONFIG))
    block.forward = lambda hidden_states, mask: type(block).forward(block, hidden_states * mask)
    with pytest.raises(BadCalibration, match=r"'mask'\): pass a mapping of arguments"):
        observe(lift(block), hidden, schemes=SCHEMES, quiet=True)


def test_hidden_states_take_the_experts_element_type(hidden: Tensor) -> None:
    class Float32Router(Qwen2MoeSparseMoeBlock):
        def forward(self, hidden_states: Tensor) -> Tensor:
            rows = hidden_states.reshape(-1, HIDDEN)
            _, weights, index = self.gate(rows.float())
            return self.experts(rows, index, weights.to(rows.dtype)).reshape(hidden_states.shape)

    block = randomized(Float32Router(CONFIG))
    del block.shared_expert, block.shared_expert_gate
    block.experts.bfloat16()
    assert next(block.parameters()).dtype == torch.float32
    seen: list[torch.dtype] = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    observe(lift(block), hidden, schemes=["w4a16_sym"], quiet=True)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("token", [-1, 1000])
def test_tokens_that_a_model_has_no_embedding_for_are_refused(token: int) -> None:
    model = randomized(Qwen2MoeForCausalLM(CONFIG))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    batches = [torch.zeros(8, dtype=torch.int64), torch.tensor([0, token])]
    with pytest.raises(BadCalibration, match=f"batch 1 is .*its ids go from .*, the model knows 0 to {VOCABULARY - 1}"):
        observe(lift(model), batches, schemes=SCHEMES, quiet=True)
