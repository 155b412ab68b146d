"""`compile(rotate_down=...)`: one function, kept by plans and checkpoints, closer where activations are narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxmoe
from mxmoe.errors import BadArgument, BadRotation, PlanMismatch
from mxmoe.ir import Plan, Scheme, banks, moe_ops, parse_ir

from .blocks import HIDDEN, compiled, error, qwen_block, qwen_model

PLACES = {("moe", "routed"): 16, ("moe", "shared"): 16}


def blocks_of(text: str) -> list[int]:
    return [bank.act.hadamard for moe in moe_ops(parse_ir(text)) for bank in banks(moe).values()]


def down_in(scheme: str, block: nn.Module) -> Plan:
    """Down in one scheme, the others in 16 bits."""
    rows = compiled(block, "eager", schemes="fp16").plan.rows
    return Plan({row: Scheme.parse(scheme) if row.role == "down" else wide for row, wide in rows.items()})


@pytest.mark.parametrize("target", ["eager", "numba"])
@pytest.mark.parametrize("scheme", ["fp16", "w8a8_sym", "w4a16_g32_asym"])
def test_the_function_is_kept(block: nn.Module, x: Tensor, target: str, scheme: str) -> None:
    plain, turned = (compiled(block, target, schemes=scheme, rotate_down=rotation) for rotation in (None, 16))
    assert error(turned(x), block(x)) < 1.3 * error(plain(x), block(x)) + 2e-3
    assert all(blocks_of(turned.ir(stage)) == [16, 16] for stage in ("lifted", "annotated", "allocated", "lowered"))
    assert turned.plan.rotations == PLACES
    assert plain.plan.rotations == {}


def test_backends_agree(block: nn.Module, x: Tensor) -> None:
    eager, numba = (compiled(block, target, schemes="w4a8_g32_sym", rotate_down=32)(x) for target in ("eager", "numba"))
    assert (eager - numba).norm() < 1e-2 * eager.norm()


def test_narrow_activations_gain_where_a_channel_stands_out(block: Any, x: Tensor) -> None:  # noqa: ANN401  # a block
    with torch.no_grad():
        block.experts.gate_up_proj[:, 32 + 5] *= 10
        block.shared_expert.up_proj.weight[5] *= 10
    plan = down_in("w8a4_g32_sym", block)
    plain, turned = (
        error(compiled(block, "eager", plan=plan, rotate_down=rotation)(x), block(x)) for rotation in (None, 32)
    )
    assert turned < 0.8 * plain


def test_hessians_are_those_of_the_rotated_input(block: nn.Module) -> None:
    x = torch.randn((4, 100, HIDDEN), generator=torch.Generator().manual_seed(2))
    plan = down_in("w2a16_g32_asym", block)
    rtn, gptq = (
        error(compiled(block, "eager", inputs=x, plan=plan, quantizer=name, rotate_down=16)(x), block(x))
        for name in ("rtn", "gptq")
    )
    assert gptq < 0.9 * rtn


def test_the_pipeline_says_it_too(block: nn.Module, x: Tensor) -> None:
    given = compiled(block, "eager", inputs=x, schemes="w4a8_g32_sym", rotate_down=16)
    spelled = compiled(block, "eager", inputs=x, schemes="w4a8_g32_sym", pipeline="rotate-down{block=16},default")
    assert given.ir("annotated") == spelled.ir("annotated")
    assert torch.equal(given(x), spelled(x))


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_a_checkpoint_keeps_it(block: nn.Module, x: Tensor, tmp_path: Path, target: str) -> None:
    made = compiled(block, target, schemes=("w4a8_g32_sym", "w8a8_sym"), rotate_down=16)
    made.save(tmp_path / "saved")
    loaded: Any = mxmoe.load(tmp_path / "saved", qwen_block())
    assert torch.equal(loaded(x), made(x))
    assert blocks_of(loaded.ir("lowered")) == [16, 16]
    loaded.save(tmp_path / "again")
    assert torch.equal(mxmoe.load(tmp_path / "again", qwen_block())(x), made(x))


def test_a_plan_keeps_it(block: nn.Module, x: Tensor, tmp_path: Path) -> None:
    made = compiled(block, "eager", inputs=x, schemes=("w4a8_g32_sym", "w8a8_sym"), rotate_down=16)
    made.plan.save(tmp_path / "plan.json")
    again = compiled(block, "eager", plan=tmp_path / "plan.json")
    assert torch.equal(again(x), made(x))
    assert torch.equal(compiled(block, "eager", plan=made.plan, rotate_down=16)(x), made(x))
    with pytest.raises(PlanMismatch, match="in blocks of 16, the module in blocks of 8"):
        compiled(block, "eager", plan=made.plan, rotate_down=8)
    plain = Plan(made.plan.rows)
    assert compiled(block, "eager", plan=plain, rotate_down=8).plan.rotations == dict.fromkeys(PLACES, 8)


def test_another_budget_keeps_it(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, "eager", inputs=x, schemes=("w4a8_g32_sym", "w8a8_sym"), rotate_down=16)
    assert mxmoe.solve(made.ir("annotated"), weight_bits=8.5).rotations == PLACES


def test_a_model() -> None:
    model = qwen_model()
    ids = torch.arange(40).reshape(2, 20) % 32
    before = model(ids).logits
    compiled(model, "eager", schemes="fp16", rotate_down=32)
    assert (model(ids).logits - before).norm() < 1e-2 * before.norm()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rotate_down": 0}, BadArgument, "rotate_down"),
        ({"rotate_down": 1}, BadArgument, "at least 2"),
        ({"rotate_down": True}, BadArgument, "rotate_down"),
        ({"rotate_down": 64}, BadRotation, rf"{HIDDEN} channels cannot be rotated in blocks of 64"),
        ({"pipeline": "default,rotate-down"}, BadArgument, "rotate-down comes first"),
    ],
)
def test_mistakes(block: nn.Module, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compiled(block, "eager", schemes="w8a8_sym", **options)
