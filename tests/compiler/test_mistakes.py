"""Every mistake has its own error, before any long work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxmoe
import mxmoe.compiler
from mxmoe.backends.eager import EagerBackend
from mxmoe.calib import Inputs, Stats, observe
from mxmoe.errors import (
    BadArgument,
    BadCalibration,
    BadPipeline,
    BadPlan,
    BadScheme,
    CompiledAlready,
    EmptyCalibration,
    InfeasibleBudget,
    NoKernels,
    NoMoeBlock,
    NonFiniteCalibration,
    NonFiniteWeights,
    NotAModule,
    NotInStats,
    PlanMismatch,
    UnknownName,
)
from mxmoe.frontend import lift
from mxmoe.ir import Plan, Row, Scheme
from mxmoe.quant import Weights

from .blocks import (
    HIDDEN,
    TWO,
    compiled,
    qwen_block,
    qwen_model,
)


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything runs over data, or quantizes a weight."""

    def never(*args: object, **kwargs: object) -> None:
        pytest.fail("long work began")

    for place, name in (
        (mxmoe.compiler, "observe"),
        (mxmoe.compiler, "observe_weights"),
        (mxmoe.compiler, "run_passes"),
        (Weights, "quantized"),
    ):
        monkeypatch.setattr(place, name, never)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine where Triton is not installed."""
    monkeypatch.setattr("mxmoe.backends.triton.has_triton", lambda: False)


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": "nunba"}, UnknownName, "no target named 'nunba'; did you mean numba"),
    ({"target": None}, UnknownName, "no target named None; known: eager"),
    ({"target": "triton-sm89"}, NoKernels, "compile it for eager, numba instead"),
    ({"target": "triton-sm90"}, NoKernels, "eager, numba"),
    ({"schemes": "w4b16"}, BadScheme, "w4b16"),
    ({"schemes": []}, BadArgument, "name at least one"),
    ({"schemes": 4}, BadArgument, "schemes=4: name one scheme or several"),
    ({"schemes": ["bf16", 4]}, BadScheme, "'4' is no scheme"),
    ({"quantizer": "rtm"}, UnknownName, "no quantizer named 'rtm'; did you mean rtn"),
    ({"pipeline": "defualt"}, UnknownName, "did you mean default"),
    ({"quantizer": None}, UnknownName, "no quantizer named None; known: .*rtn"),
    ({"pipeline": None}, BadArgument, "pipeline=None"),
    ({"pipeline": "allocate-bits{"}, BadPipeline, "is not a pipeline"),
    ({"pipeline": "annotate-cots"}, UnknownName, "annotate-cost"),
    ({"r": 1.5}, BadArgument, "r=1.5"),
    ({"r": float("nan")}, BadArgument, "r=nan"),
    ({"r": "loss"}, BadArgument, "r='loss'"),
    ({"weight_bits": "5"}, BadArgument, "weight_bits='5': a budget is a positive number"),
    ({"latency_us": [1.0]}, BadArgument, "latency_us"),
    ({"weight_bits": -1}, BadArgument, "weight_bits=-1"),
    ({"weight_bits": float("inf")}, BadArgument, "or None"),
    ({"latency_us": 0}, BadArgument, "latency_us=0"),
    ({"tokens": 0}, BadArgument, "tokens=0"),
    ({"tokens": 1.5}, BadArgument, "tokens=1.5: give integers"),
    ({"tokens": {1: "often"}}, BadArgument, "weights that are not negative"),
    ({"tokens": ()}, BadArgument, "tokens"),
    ({"tokens": "many"}, BadArgument, "tokens='many'"),
    ({"tokens": {1: -1.0}}, BadArgument, "not negative"),
    ({"tokens": {1: 0.0}}, BadArgument, "all zero"),
    ({"weight_bits": 1.5}, InfeasibleBudget, "smallest feasible weight_bits is 3"),
    ({"plan": Plan({Row("moe", "routed", "up", 0): Scheme.parse("bf16")})}, PlanMismatch, "the plan lacks 14 rows"),
    ({"plan": 5}, BadArgument, "give a Plan, or the path of one"),
    ({"plan": Plan({}), "schemes": "bf16"}, PlanMismatch, "the plan lacks 15 rows"),
    ({"plan": Plan({}), "schemes": "bf16", "pipeline": "annotate-cost,allocate-bits"}, BadArgument, "apply-plan"),
]


@pytest.mark.parametrize(("options", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("no_long_work", "without_triton")
def test_mistakes_are_named_before_any_long_work(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compiled(qwen_block(), **options)


@pytest.mark.usefixtures("no_long_work")
def test_plans_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "mxmoe-pl')
    with pytest.raises(BadPlan, match="is not a plan"):
        compiled(qwen_block(), plan=tmp_path / "plan.json")
    with pytest.raises(BadArgument, match=r"absent\.json': it cannot be read \(No such file or directory\)"):
        compiled(qwen_block(), plan=tmp_path / "absent.json")


@pytest.mark.parametrize("option", [{"r": 2}, {"r": "a"}, {"weight_bits": "3"}, {"max_bytes": 0}, {"latency_us": -1}])
def test_solving_names_what_cannot_be(block: nn.Module, option: dict[str, Any]) -> None:
    annotated = compiled(block, "eager", schemes=TWO).ir("annotated")
    with pytest.raises(BadArgument, match=next(iter(option))):
        mxmoe.solve(annotated, **option)


def test_a_plan_with_a_scheme_that_is_no_candidate(block: nn.Module) -> None:
    plan = compiled(block, "eager", schemes="w4a16_g32_asym").plan
    with pytest.raises(PlanMismatch, match="wants w4a16_g32_asym, the candidates are bf16"):
        compiled(block, "eager", plan=plan, schemes="bf16")


@pytest.mark.usefixtures("no_long_work")
def test_modules_that_cannot_be_compiled() -> None:
    with pytest.raises(NotAModule, match="not str"):
        compiled("Qwen/Qwen1.5-MoE-A2.7B")
    with pytest.raises(NoMoeBlock, match="Linear holds no MoE block"):
        compiled(nn.Linear(4, 4))


NAN = torch.full((1, HIDDEN), float("nan"))


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (torch.zeros(0, HIDDEN), EmptyCalibration, "no calibration data"),
        ([], EmptyCalibration, "no calibration data"),
        (iter(()), EmptyCalibration, "no calibration data"),
        ([torch.zeros(1, HIDDEN), NAN], NonFiniteCalibration, r"batch 1 holds NaN or infinity, the first at \[0, 0\]"),
        (torch.zeros(3, HIDDEN + 1), BadCalibration, rf"hidden states are floats \[tokens, {HIDDEN}\]"),
        (torch.zeros(3, HIDDEN, dtype=torch.int64), BadCalibration, "torch.int64"),
        (torch.zeros(HIDDEN), BadCalibration, "hidden states are floats"),
    ],
    ids=["no rows", "no batch", "empty iterable", "nan", "width", "dtype", "rank"],
)
def test_calibration_data_that_cannot_be_used(
    inputs: Inputs, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxmoe.compiler, "run_passes", lambda *_: pytest.fail("passes ran"))
    with pytest.raises(kind, match=message):
        compiled(qwen_block(), inputs=inputs)


def test_statistics_of_another_model_or_with_other_schemes(block: nn.Module, x: Tensor) -> None:
    stats = observe(lift(block), x, schemes=[Scheme.parse("w8a8_sym")], quiet=True)
    assert isinstance(stats, Stats)
    with pytest.raises(NotInStats):
        compiled(block, inputs=stats, schemes=["w8a8_sym", "w4a4_g128_sym"])
    with pytest.raises(NotInStats):
        compiled(qwen_model(), inputs=stats, schemes="w8a8_sym")


def test_weights_that_are_not_finite_are_named(block: nn.Module) -> None:
    with torch.no_grad():
        block.get_parameter("experts.down_proj")[2, 3, 4] = float("nan")
    with pytest.raises(NonFiniteWeights, match=r"moe\.routed.*down holds 1 values"):
        compiled(block)


def test_budgets_that_no_plan_meets_say_the_smallest(block: nn.Module, x: Tensor) -> None:
    with pytest.raises(InfeasibleBudget, match="smallest feasible latency_us"):
        compiled(block, inputs=x, latency_us=1e-9)
    with pytest.raises(InfeasibleBudget, match="smallest feasible bytes"):
        compiled(
            block,
            pipeline="annotate-routing,annotate-sensitivity,annotate-cost,allocate-bits{max-bytes=9 weight-bits=9},"
            "lower-to-group-gemm,choose-tiles",
        )


def test_a_pipeline_that_ends_too_early(block: nn.Module) -> None:
    with pytest.raises(BadArgument, match="it does not lower the blocks"):
        compiled(block, "eager", pipeline="annotate-routing,annotate-sensitivity,annotate-cost,allocate-bits")


def test_a_scheme_that_the_backend_cannot_run(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagerBackend, "supports", lambda _, scheme: scheme.weight_bits > 2)
    with pytest.raises(BadArgument, match="eager cannot run it; it runs w3a16_g128_asym, w4a16_g128_asym"):
        compiled(block, "eager", schemes="w2a16_g128_asym")
    plan = Plan({Row("moe", "routed", "up", 0): Scheme.parse("w2a16")})
    with pytest.raises(BadArgument, match="w2a16"):
        compiled(block, "eager", plan=plan)


def test_what_is_compiled_is_not_compiled_again(block: nn.Module) -> None:
    made = compiled(block, "eager", schemes=TWO)
    for again in (made, made.block, nn.Sequential(made)):
        with pytest.raises(CompiledAlready, match="compile the original module"):
            compiled(again)
    model = compiled(qwen_model(), "eager", schemes="w4a16_g32_asym")
    for again in (model, model.model.layers[0]):
        with pytest.raises(CompiledAlready):
            compiled(again)


def test_a_model_that_fails_to_compile_is_left_as_it_was() -> None:
    model = qwen_model()
    before = list(model.modules())
    with pytest.raises(InfeasibleBudget):
        compiled(model, inputs=torch.arange(16)[None], schemes=TWO, latency_us=1e-9)
    assert list(model.modules()) == before
    assert not hasattr(model, "compilation")
