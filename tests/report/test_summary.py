"""What is said of a module and of its plan where something is rotated."""

from __future__ import annotations

from mxmoe.ir import BankShape, BlockShape, Plan, Scheme, apply_plan, build_module, rotations_of, rows_of
from mxmoe.passes import Environment, RotateDown
from mxmoe.report.summary import describe_module, describe_plan

BF16 = Scheme.parse("bf16")
SHAPE = BlockShape("mlp", 64, (BankShape("routed", 2, 1, 32, "silu", False, {"up": "up", "down": "down"}),))


def test_rotations_are_told() -> None:
    module = build_module([SHAPE], [BF16])
    plan = Plan(dict.fromkeys(rows_of(module), BF16))
    assert "rotated" not in describe_module(module) + describe_plan(plan)
    RotateDown(16).run(module, Environment())
    told = "rotated on the way to down: 1 bank, in blocks of 16"
    assert told in describe_plan(Plan(plan.rows, rotations=rotations_of(module))).splitlines()
    apply_plan(module, plan)
    assert told in describe_module(module).splitlines()
