"""Quantizers in `compile`: named with options, given as they are, and those that need Hessians from the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mxmoe
from mxmoe.calib import observe
from mxmoe.errors import BadOption, BadQuantizer, MissingHessians
from mxmoe.frontend import lift
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, quantize
from mxmoe.quant.gptq import Gptq

from .blocks import HIDDEN, qwen_block, qwen_model

SCHEME = "w3a16_g32_asym"


def inputs(seed: int, tokens: int = 300) -> Tensor:
    """Correlated hidden states [tokens, hidden], some channels louder than others."""
    mix = torch.randn((HIDDEN, HIDDEN), generator=torch.Generator().manual_seed(9)) * torch.logspace(-1, 0, HIDDEN)
    return torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(seed)) @ mix


def error(block: torch.nn.Module, quantizer: str, target: str = "eager") -> float:
    """Relative change of the output on tokens that were not seen."""
    compiled = mxmoe.compile(block, target, inputs=inputs(0), schemes=SCHEME, quantizer=quantizer, quiet=True)
    x = inputs(1)[None]
    with torch.no_grad():
        return float((compiled(x) - block(x)).norm() / block(x).norm())


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_gptq_is_closer_than_rounding_on_unseen_tokens(target: str) -> None:
    block = qwen_block()
    plain = error(block, "rtn", target)
    for quantizer in ("gptq", "gptq{scales=rtn_mse}"):
        assert error(block, quantizer, target) < 0.8 * plain


def test_a_model_and_data_that_can_be_read_once() -> None:
    model = qwen_model()
    ids = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))

    def batches() -> Iterator[Tensor]:
        yield ids[:2]
        yield ids[2:]

    with torch.no_grad():
        before = model(ids).logits
        compiled = mxmoe.compile(model, "eager", inputs=batches(), schemes="w8a8_sym", quantizer="gptq", quiet=True)
        assert (compiled(ids).logits - before).norm() < 0.1 * before.norm()


def test_the_report_names_the_quantizer_as_it_is_read() -> None:
    block, x = qwen_block(), inputs(0)

    def mine(weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None) -> Quantized:
        return quantize(weight, scheme, name=name)

    for quantizer, named in (
        ("gptq{damping=0.05}", "gptq{damping=0.05}"),
        (Gptq(damping=0.05, act_order=False), "gptq{damping=0.05 act-order=false}"),
        ("rtn", "rtn"),
        (quantize, "quantize"),
        (mine, "mine"),
    ):
        compiled: Any = mxmoe.compile(block, "eager", inputs=x, schemes=SCHEME, quantizer=quantizer, quiet=True)
        assert compiled.report().quantizer == named


def test_without_data_a_quantizer_that_needs_hessians_is_refused() -> None:
    block = qwen_block()
    stats = observe(lift(block), inputs(0), schemes=[SCHEME], quiet=True)
    for given in (None, stats):
        with pytest.raises(MissingHessians, match=r"gptq\{damping=0.1\} needs Hessians.*with .*rtn, rtn_mse"):
            mxmoe.compile(block, "eager", inputs=given, schemes=SCHEME, quantizer="gptq{damping=0.1}", quiet=True)


def test_mistakes_in_the_text_are_named() -> None:
    with pytest.raises(BadQuantizer):
        mxmoe.compile(qwen_block(), "eager", quantizer="gptq{", quiet=True)
    with pytest.raises(BadOption, match="did you mean damping"):
        mxmoe.compile(qwen_block(), "eager", quantizer="gptq{dampin=1}", quiet=True)
