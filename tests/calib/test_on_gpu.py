"""What is observed on a GPU is what is observed on a CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mxmoe.calib import collect_hessians, observe
from mxmoe.frontend import lift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SCHEMES = ("w2a16_g32_asym", "w4a4_g32_sym", "w8a8_sym")


@pytest.fixture(scope="module")
def models() -> tuple[Qwen2MoeForCausalLM, Qwen2MoeForCausalLM]:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        initializer_range=0.2,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    other = copy.deepcopy(model)
    torch.nn.Module.to(other, "cuda")
    return model, other


def test_statistics_are_the_same(models: tuple[Qwen2MoeForCausalLM, Qwen2MoeForCausalLM]) -> None:
    ids = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(1))
    cpu, gpu = (
        observe(lift(model), tokens, schemes=SCHEMES, gradients=True, quiet=True)
        for model, tokens in zip(models, (ids, ids.cuda()), strict=True)
    )
    for key, sums in cpu.banks.items():
        assert np.abs(sums.tokens - gpu.banks[key].tokens).sum() <= 0.01 * sums.tokens.sum()
        for role, errors in sums.squared_error.items():
            np.testing.assert_allclose(gpu.banks[key].squared_error[role], errors, rtol=0.05)


def test_hessians_are_the_same(models: tuple[Qwen2MoeForCausalLM, Qwen2MoeForCausalLM]) -> None:
    ids = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(1))
    cpu, gpu = (
        collect_hessians(lift(model), tokens, quiet=True)
        for model, tokens in zip(models, (ids, ids.cuda()), strict=True)
    )
    for name, bank in cpu.banks.items():
        scale = float(bank.total.abs().max())
        torch.testing.assert_close(gpu.banks[name].total.cpu(), bank.total, rtol=0, atol=0.02 * scale)
