"""Every argument of `mxmoe.compile`, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxmoe
import mxmoe.compiler
from mxmoe.backends.eager import EagerBackend
from mxmoe.calib import observe
from mxmoe.errors import BadOption, MissingInput, UnknownName
from mxmoe.frontend import lift
from mxmoe.ir import Allocation, ModuleOp, Scheme, moe_ops, parse_ir, print_ir
from mxmoe.passes import PIPELINES, SENSITIVITIES, Pass
from mxmoe.tokens import Tokens

from .blocks import (
    HIDDEN,
    STAGES,
    TWO,
    compiled,
    error,
)


def test_calibration_in_every_form_gives_one_plan(block: nn.Module, x: Tensor) -> None:
    lifted = lift(block)
    stats = observe(lifted, x, schemes=[Scheme.parse(text) for text in TWO], quiet=True)
    forms: list[Any] = [x, [x[:1], x[1:]], iter((x,)), {"hidden_states": x}, stats]
    plans = [compiled(block, "eager", inputs=inputs, schemes=TWO).plan.rows for inputs in forms]
    assert all(plan == plans[0] for plan in plans)
    assert "40 tokens" in str(compiled(block, "eager", inputs=x, schemes=TWO).report())


@pytest.mark.parametrize("schemes", ["w4a16_g32_asym", Scheme.parse("w4a16_g32_asym"), ["w4a16_g32_asym"]])
def test_one_scheme_means_uniform_whatever_the_budget(
    block: nn.Module, schemes: str | Scheme | list[str | Scheme]
) -> None:
    made = compiled(block, "eager", schemes=schemes, weight_bits=2.0)
    assert set(map(str, made.plan.rows.values())) == {"w4a16_g32_asym"}


@pytest.mark.parametrize("weight_bits", [3.0, 4.25, 5.0, 8.5])
def test_the_budget_on_bits_is_kept(block: nn.Module, weight_bits: float) -> None:
    schemes = ("w2a16_g32_asym", "w4a16_g32_asym", "w8a16_g32_asym")
    made = compiled(block, "eager", schemes=schemes, weight_bits=weight_bits, r=1.0)
    assert made.report().plan.effective_bits <= weight_bits
    assert made.plan.allocation is not None
    assert made.plan.allocation.weight_bits == pytest.approx(made.report().plan.effective_bits)


def test_no_budget_takes_the_least_loss(block: nn.Module) -> None:
    made = compiled(block, "eager", schemes=("w2a16_g32_asym", "w8a16_g32_asym"), weight_bits=None, r=1.0)
    assert set(map(str, made.plan.rows.values())) == {"w8a16_g32_asym"}


def test_the_budget_on_time_is_kept_and_r_weighs(block: nn.Module, x: Tensor) -> None:
    def allocation(**options: float) -> Allocation:
        return compiled(block, "eager", inputs=x, weight_bits=None, **options).plan.allocation

    accurate, fast = allocation(r=1.0), allocation(r=0.0)
    assert accurate.loss < fast.loss
    assert fast.time_us < accurate.time_us
    middle = (accurate.time_us + fast.time_us) / 2
    bounded = allocation(r=1.0, latency_us=middle)
    assert bounded.time_us <= middle
    assert accurate.loss <= bounded.loss <= fast.loss


@pytest.mark.parametrize(("tokens", "largest"), [(None, 512), (1, 1), ((1, 2048), 2048), ({1: 0.9, 64: 0.1}, 64)])
def test_tokens_per_call(block: nn.Module, tokens: Tokens | None, largest: int) -> None:
    report = compiled(block, "eager", tokens=tokens, schemes=TWO).report()
    assert report.tokens == largest
    assert f"of {largest} tokens" in str(report)


def test_more_tokens_cost_more(block: nn.Module) -> None:
    times = [compiled(block, "eager", tokens=n, schemes=TWO).plan.allocation.time_us for n in (1, 65536)]
    assert times[0] < times[1]


def test_a_plan_is_applied_from_an_object_and_from_a_path(block: nn.Module, x: Tensor, tmp_path: Path) -> None:
    first = compiled(block, "eager", inputs=x, schemes=TWO)
    first.plan.save(tmp_path / "plan.json")
    for plan in (first.plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = compiled(block, "eager", plan=plan)
        assert again.plan == first.plan
        assert torch.equal(again(x), first(x))
    assert "nothing was observed" in str(again.report())


def test_data_beside_a_plan_say_how_tokens_are_routed(block: nn.Module, x: Tensor) -> None:
    plan = compiled(block, "eager", schemes="w4a16_g32_asym").plan
    made = compiled(block, "eager", plan=plan, inputs=x)
    assert made.plan == plan
    assert "40 tokens" in str(made.report())
    assert made.ir("lowered") != compiled(block, "eager", plan=plan).ir("lowered")


def test_a_plan_solved_anew_for_another_budget_fits(block: nn.Module, x: Tensor) -> None:
    first = compiled(block, "eager", inputs=x)
    plan = mxmoe.solve(first.ir("annotated"), weight_bits=3.5)
    second = compiled(block, "eager", plan=plan)
    assert second.report().plan.effective_bits <= 3.5 < first.report().plan.effective_bits
    assert mxmoe.solve(parse_ir(first.ir("annotated"))) == first.plan


def test_what_a_pipeline_spells_out_wins_over_arguments(block: nn.Module) -> None:
    text = (
        "annotate-routing,annotate-sensitivity,annotate-cost,allocate-bits{weight-bits=3.5 granularity=expert},"
        "lower-to-group-gemm,choose-tiles"
    )
    made = compiled(block, "eager", pipeline=text, weight_bits=8.0)
    assert made.report().plan.effective_bits <= 3.5
    rows = made.plan.rows
    for row in rows:
        assert rows[row] == rows[row._replace(role="gate")], row


def test_observers_see_every_pass(block: nn.Module) -> None:
    class Names:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def before(self, step: Pass, module: ModuleOp) -> None:
            self.seen.append(step.name)

        def after(self, step: Pass, module: ModuleOp) -> None:
            assert self.seen[-1] == step.name

    names = Names()
    made = compiled(block, "eager", observers=[names])
    assert tuple(names.seen) == PIPELINES["default"] == tuple(made.report().seconds)


def test_every_stage_parses_back_and_runs(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, "eager", inputs=x, schemes="w8a16_g32_asym")
    rows = x.reshape(-1, HIDDEN)
    weights, index = torch.rand((len(rows), 4)).softmax(dim=-1).topk(2, dim=-1)
    outs: list[Tensor] = []
    for stage in STAGES:
        module = parse_ir(made.ir(stage))
        assert print_ir(module, elide=None) == made.ir(stage)
        assert [moe.stage for moe in moe_ops(module)] == [stage]
        run = EagerBackend().compile(module, lift(block).weights)["moe"]
        outs.append(run("routed", rows, index, weights))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[2], outs[3])
    assert error(outs[3], outs[0]) < 0.02


def test_the_report_says_what_was_found_and_done(block: nn.Module) -> None:
    report = compiled(block, "eager", schemes=("w4a16_g32_asym", "bf16"), weight_bits=8.0).report()
    found = sum(p.nbytes for name, p in block.named_parameters() if "gate.weight" not in name)
    rows = report.plan.rows
    assert report.bytes_found == found
    assert 0 < report.bytes_quantized < found
    assert report.bytes_quantized == found * rows["w4a16_g32_asym"] // 15  # all 15 rows are 32 x 32
    assert sum(rows.values()) == 15
    assert report.predicted_us.keys() == {"moe"}


@pytest.mark.parametrize("sensitivity", sorted({*SENSITIVITIES.table} - {"fisher"}))
def test_every_sensitivity_is_observed_for_and_solved(block: nn.Module, x: Tensor, sensitivity: str) -> None:
    made = compiled(block, "eager", inputs=x, schemes=TWO, weight_bits=5.0, r=1.0, sensitivity=sensitivity)
    assert made.plan.allocation.weight_bits <= 5.0
    free = compiled(block, "eager", schemes=TWO, weight_bits=5.0, r=1.0, sensitivity=sensitivity)
    assert free.plan.allocation.weight_bits <= 5.0


def test_a_sensitivity_that_cannot_be_is_found_out_at_once(block: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnknownName, match="did you mean squared"):
        compiled(block, "eager", inputs=x, sensitivity="squarred")
    with pytest.raises(MissingInput, match="differentiate a loss"):
        compiled(block, "eager", sensitivity="fisher")
    with pytest.raises(BadOption, match="a block has no loss"):
        compiled(block, "eager", inputs=x, sensitivity="fisher")
