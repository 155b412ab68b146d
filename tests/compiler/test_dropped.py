"""Compiling with w0 among the schemes: the same on every backend, saved and loaded, and refused alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import mxmoe
from mxmoe.errors import BadArgument

SCHEMES = ("w0", "w4a16_g32_asym")


@pytest.fixture(scope="module")
def block() -> Any:  # noqa: ANN401  # a block, whose parts no type names
    torch.manual_seed(0)
    how: dict[str, Any] = {"experts_implementation": "eager"}
    config = Qwen2MoeConfig(
        hidden_size=64,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        **how,
    )
    made: Any = Qwen2MoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made


X = torch.randn((1, 48, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_dropped_experts_put_out_nothing_and_hold_nothing(
    block: torch.nn.Module, quantizer: str, tmp_path: Path
) -> None:
    made: dict[str, Any] = {
        target: mxmoe.compile(
            copy.deepcopy(block),
            target,
            inputs=X[0],
            schemes=SCHEMES,
            weight_bits=4.0,
            r=1.0,
            quantizer=quantizer,
            quiet=True,
        )
        for target in ("eager", "numba")
    }
    ((_, gone),) = made["eager"].plan.dropped.items()
    assert 0 < len(gone) <= 3
    silent: Any = copy.deepcopy(block)
    with torch.no_grad():
        silent.experts.down_proj[list(gone)] = 0
    whole: Any = mxmoe.compile(silent, "eager", inputs=X[0], schemes=SCHEMES[1], quantizer=quantizer, quiet=True)
    with torch.no_grad():
        wanted, found = whole(X), {target: one(X) for target, one in made.items()}
        torch.testing.assert_close(found["eager"], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["numba"], wanted, rtol=2e-2, atol=2e-2)
        made["numba"].save(tmp_path / "saved")
        again = mxmoe.load(tmp_path / "saved", copy.deepcopy(block))
        assert torch.equal(again(X), found["numba"])
    assert made["eager"].report().held_bytes < 0.95 * whole.report().held_bytes
    assert "w0 x" in str(made["eager"].report())
    planned: Any = mxmoe.compile(copy.deepcopy(block), "eager", plan=made["eager"].plan, quiet=True)
    assert planned.plan.dropped == made["eager"].plan.dropped


def test_alone_it_is_refused(block: torch.nn.Module) -> None:
    with pytest.raises(BadArgument, match="name a scheme for those that stay"):
        mxmoe.compile(block, "eager", schemes="w0", quiet=True)
