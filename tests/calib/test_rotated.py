"""Sensitivities of a rotated module: those of the rotated input and weight of down, and the others as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import Expert, Reduction, Stats, observe, observe_weights
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import BankShape, Scheme, rotation_blocks
from mxmoe.passes import Environment, RotateDown
from mxmoe.quant import dequantize, fake_quantize_activation, find_quantizer, hadamard, quantize

SCHEMES = tuple(Scheme.parse(text) for text in ("w8a4_g32_sym", "w3a16_g32_asym", "w8a8_sym"))
HIDDEN, INNER = 32, 64


@given(st.sampled_from([24, 32, 40]), st.data())
@settings(max_examples=20, deadline=None)
def test_down_is_measured_rotated(inner: int, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from(rotation_blocks(inner)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    weights = {
        role: torch.randn((inner, 16) if role == "up" else (16, inner), generator=generator) for role in ("up", "down")
    }
    x = torch.randn((20, 16), generator=generator)
    share = torch.rand(20, generator=generator)
    shape = BankShape("routed", 1, 1, inner, "relu2", False, {"up": "up", "down": "down"})
    reduction = Reduction(Expert(shape, weights, {}, "e", rotation=block), SCHEMES, find_quantizer("rtn"))
    reduction.add(x, share)
    turn = torch.block_diag(*[hadamard(block).double() / block**0.5] * (inner // block))
    hidden = (x.double() @ weights["up"].double().T).relu().square()
    for column, scheme in enumerate(SCHEMES):
        rows = fake_quantize_activation((hidden @ turn).float(), scheme).double()
        matrix = dequantize(quantize((weights["down"].double() @ turn).float(), scheme)).double()
        change = (rows @ matrix.T - hidden @ weights["down"].double().T) * share[:, None]
        # a code that lies on an edge may flip on the last bit of a float32
        assert reduction.result.squared_error["down"][column] == pytest.approx(float(change.square().sum()), rel=0.02)


def outlying() -> Lifted:
    """A block whose inner channel 5 is large in every expert."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, shared_expert_intermediate_size=INNER,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    block = Qwen2MoeSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=HIDDEN**-0.5)
    with torch.no_grad():
        block.experts.gate_up_proj[:, INNER + 5] *= 10  # pyright: ignore  # a parameter
    return lift(block, candidates=SCHEMES)


def rotated(block: int | None) -> Lifted:
    lifted = outlying()
    if block:
        RotateDown(block).run(lifted.module, Environment())
    return lifted


@pytest.mark.parametrize("has_data", [True, False])
def test_a_rotated_module_is_observed_rotated(has_data: bool) -> None:
    x = torch.randn((80, HIDDEN), generator=torch.Generator().manual_seed(1))

    def seen(block: int | None) -> Stats:
        lifted = rotated(block)
        if has_data:
            return observe(lifted, x, schemes=SCHEMES, quiet=True)
        return observe_weights(lifted, SCHEMES, quiet=True)

    plain, turned = seen(None), seen(64)
    for role in ("gate", "up", "down"):
        before, after = (s.sensitivity("moe", "routed", role, SCHEMES) for s in (plain, turned))
        if role == "down":
            # 4-bit activations: the outlier no longer sets the step of all channels
            assert after[:, 0].sum() < 0.6 * before[:, 0].sum()
        else:
            np.testing.assert_array_equal(before, after)
