"""A block compiled for a GPU that is not here: it says how it runs, and carries the kernels that the GPU would."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import mxmoe
from mxmoe.errors import BadArgument
from mxmoe.quant import tolerance
from mxmoe.testing.agree import relative_error

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows of padding hold anything
]
NOTICE = "interpreted here, slowly: this machine has no CUDA device"
SCHEMES = ("w4a4_g128_sym", "w8a8_sym")


def compiled(block: nn.Module, target: str = "triton-sm89", **further: Any) -> Any:  # noqa: ANN401  # arguments of compile
    options: dict[str, Any] = {"schemes": SCHEMES, "weight_bits": 6, "quiet": True, **further}
    return mxmoe.compile(block, target, **options)


def test_kernels_are_carried_saved_and_loaded(
    block: nn.Module, x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mxmoe"):
        made = compiled(block, tokens=40)
    assert [record.message for record in caplog.records] == [f"triton-sm89 is {NOTICE}"]
    assert {"group_gemm", "int4_kernel"} <= {name.partition(".")[0] for name in made.kernels}
    for kernel in made.kernels.values():
        assert all(call.endswith("with 40 tokens") for call in kernel.calls)
        assert (kernel.arch, kernel.facts().arch) == (89, 89)
    for text in (str(made.report()), repr(made)):
        assert NOTICE in text
        assert f"carries {len(made.kernels)} kernels for sm_89" in text
    made.save(tmp_path / "saved")
    back: Any = mxmoe.load(tmp_path / "saved")
    assert back.kernels == made.kernels
    assert back.report() == made.report()
    other: Any = mxmoe.load(tmp_path / "saved", target="numba")
    assert (other.kernels, other.report().runs) == ({}, "")
    with torch.inference_mode():
        few = x[:1, :4]
        allowed = 3 * max(map(tolerance, made.plan.histogram()))
        assert relative_error(made(few), other(few)) <= allowed
        assert torch.equal(back(few), made(few))


def test_none_are_carried_where_none_are_wanted(block: nn.Module) -> None:
    without = compiled(block, carry=())
    assert without.kernels == {}
    assert without.report().runs == f"is {NOTICE}"
    assert compiled(block, "numba").report().runs == ""
    assert compiled(block, "triton-sm90", schemes="w8a8_sym").kernels == {}, "only when asked"


def test_for_a_hopper_the_divided_kernel_is_carried(block: nn.Module) -> None:
    made = compiled(block, "triton-sm90", schemes="w8a8_sym", carry=[40])
    assert "divided_gemm" in {kernel.name for kernel in made.kernels.values()}
    assert {(kernel.arch, kernel.facts().arch) for kernel in made.kernels.values()} == {(90, 90)}
    assert f"carries {len(made.kernels)} kernels for sm_90" in repr(made)


def test_a_model_has_them_too() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        hidden_size=64, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=3, vocab_size=32,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    made = compiled(Qwen2MoeForCausalLM(config).eval(), schemes="w8a8_sym", carry=[4])
    calls = {call for kernel in made.kernels.values() for call in kernel.calls}
    assert calls == {f"model.layers.{layer}.mlp with 4 tokens" for layer in range(2)}
    assert len({kernel.key for kernel in made.kernels.values()}) == len(made.kernels), "equal ones are there once"


@pytest.mark.parametrize("carry", [0, [4, -1], ["4"]])
def test_tokens_that_cannot_be(block: nn.Module, carry: Any) -> None:  # noqa: ANN401  # as above
    with pytest.raises(BadArgument, match="carry"):
        compiled(block, carry=carry)
