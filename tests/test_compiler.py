"""`mxmoe.compile` as its users call it: blocks, experts, lists, models; every argument; every mistake, early."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeSparseMoeBlock

import mxmoe
import mxmoe.compiler
from mxmoe.backends.eager import EagerBackend
from mxmoe.calib import Inputs, Stats, observe
from mxmoe.compiled import CompiledMoE
from mxmoe.compiler import Tokens
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
from mxmoe.ir import Allocation, ModuleOp, Plan, Row, Scheme, moe_ops, parse_ir, print_ir
from mxmoe.passes import PIPELINES, Pass
from mxmoe.quant import Weights, tolerance

HIDDEN = 32
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
TWO = ("w3a16_g32_asym", "w8a8_sym")
"""Schemes for tests that are not about them: two are observed faster than the target's six."""
STAGES = ("lifted", "annotated", "allocated", "lowered")


def seeded(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a module random weights of a size that keeps activations near one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return module.to(dtype).eval()


def qwen_block(dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**CONFIG)), dtype)


def qwen_model(dtype: torch.dtype = torch.float32) -> Qwen2MoeForCausalLM:
    model = seeded(Qwen2MoeForCausalLM(Qwen2MoeConfig(**CONFIG)), dtype)
    assert isinstance(model, Qwen2MoeForCausalLM)
    return model


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, 24, bias=False)
        self.up_proj = nn.Linear(HIDDEN, 24, bias=False)
        self.down_proj = nn.Linear(24, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(nn.Module):
    """A router, and a list of MLPs that the block loops over."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, HIDDEN)
        weights, index = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.reshape(hidden_states.shape)


class TwoStacks(nn.Module):
    """Two banks of experts with one shared MLP between them, which is therefore a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first_experts, self.second_experts = (Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)) for _ in range(2))
        self.shared_expert = MLP()
        self.top_k = 2
        self.router = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(dim=-1).topk(2, dim=-1)
        return self.second_experts(self.first_experts(rows, index, weights), index, weights) + self.shared_expert(rows)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn((2, 20, HIDDEN), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block() -> nn.Module:
    return qwen_block()


def error(out: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())


def compiled(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # whatever a user may pass
    return mxmoe.compile(*args, quiet=True, **kwargs)


# What goes in, what comes out


def test_no_option_at_all_works(block: nn.Module, x: Tensor) -> None:
    made = mxmoe.compile(block, quiet=True)
    assert isinstance(made, CompiledMoE)
    assert error(made(x), block(x)) < 0.5
    assert "uniform routing" in str(made.report())
    assert "data-free" in str(made.report())
    assert set(map(str, made.plan.histogram())) <= set(mxmoe.compiler.find_target("numba").candidates)


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_8_bits_are_close_and_the_block_stays_as_it_was(block: nn.Module, x: Tensor, target: str) -> None:
    before, modules = block(x), list(block.modules())
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in block.state_dict().items()}
    made = compiled(block, target, inputs=x, schemes="w8a16_g32_asym")
    assert error(made(x), before) < 0.02
    assert torch.equal(block(x), before)
    assert list(block.modules()) == modules
    for name, tensor in block.state_dict().items():
        assert tensor.data_ptr() == state[name][0], name
        assert torch.equal(tensor, state[name][1]), name


def test_the_router_is_shared_and_the_signature_kept(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes=TWO)
    assert made.block.gate.weight is block.get_parameter("gate.weight")
    assert made.block.shared_expert_gate.weight is block.get_parameter("shared_expert_gate.weight")
    assert inspect.signature(made) == inspect.signature(block.forward)
    assert torch.equal(made(hidden_states=x), made(x))


@pytest.mark.parametrize("schemes", [None, ("w3a16_g32_asym", "w8a8_sym"), ("w4a4_g32_sym", "bf16")])
def test_eager_and_numba_agree(block: nn.Module, x: Tensor, schemes: tuple[str, ...] | None) -> None:
    made = [compiled(block, target, inputs=x, schemes=schemes, weight_bits=8.5) for target in ("eager", "numba")]
    assert made[0].plan == made[1].plan
    allowed = max(map(tolerance, made[0].plan.histogram()))
    assert error(made[1](x), made[0](x)) <= 3 * allowed


def test_experts_alone(x: Tensor) -> None:
    experts = seeded(Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)))
    rows = x.reshape(-1, HIDDEN)
    weights, index = torch.rand((len(rows), 4)).softmax(dim=-1).topk(2, dim=-1)
    wanted = experts(rows, index, weights)
    for inputs in (None, rows, (rows, index, weights)):
        made = compiled(experts, inputs=inputs, schemes="w8a16_g32_asym")
        assert isinstance(made, CompiledMoE)
        assert error(made(rows, index, weights), wanted) < 0.02
        assert torch.equal(made(rows, top_k_index=index, top_k_weights=weights), made(rows, index, weights))
    assert list(inspect.signature(made).parameters)[:3] != []


def test_a_list_of_mlps(x: Tensor) -> None:
    block = seeded(ListBlock())
    made = compiled(block, inputs=x, schemes="w8a16_g32_asym")
    assert error(made(x), block(x)) < 0.02
    assert isinstance(made.block, ListBlock)
    assert all(isinstance(expert, MLP) for expert in block.get_submodule("experts"))


def test_a_block_that_is_only_a_shared_bank(x: Tensor) -> None:
    module = seeded(TwoStacks())
    wanted = module(x)
    assert any(list(one.banks) == ["shared"] for one in lift(module).blocks)
    made = compiled(copy.deepcopy(module), inputs={"x": x}, schemes="w8a16_g32_asym")
    assert {row.bank for row in made.plan.rows} == {"routed", "shared"}
    assert error(made(x), wanted) < 0.03


def test_blocks_whose_path_is_the_name_of_a_root_block(x: Tensor) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = ListBlock()
            self.moe2 = ListBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.moe2(x + self.moe(x))

    layer = seeded(Layer())
    wanted = layer(x)
    made = compiled(layer, inputs={"x": x}, schemes="w8a16_g32_asym")
    assert made is layer
    assert {row.block for row in made.plan.rows} == {"moe", "moe2"}
    assert error(made(x), wanted) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_returned_with_its_blocks_replaced(dtype: torch.dtype) -> None:
    model = qwen_model(dtype)
    ids = torch.randint(0, 32, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wanted = model(ids).logits
    made = compiled(model, inputs=ids, schemes="w8a16_g32_asym")
    assert made is model
    with torch.inference_mode():
        out = made(ids).logits
    assert out.dtype == dtype
    assert error(out, wanted) < 0.05
    assert not any("experts.gate_up_proj" in name for name, _ in made.named_parameters())
    longer = made.generate(ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert longer.shape == (3, 7)
    assert {row.block for row in made.plan.rows} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert "quantized" in str(made.report())


@pytest.mark.parametrize("target", ["eager", "numba"])
def test_dense_expert_tensors_are_let_go(target: str) -> None:
    model = qwen_model(torch.bfloat16)  # bf16: eager's 16-bit rows could be views of the originals
    experts = [p for name, p in model.named_parameters() if "expert" in name and "gate.weight" not in name]
    assert len(experts) == 2 * 5
    seen = [weakref.ref(parameter) for parameter in experts]
    stores = [weakref.ref(parameter.untyped_storage()) for parameter in experts]
    del experts
    made = compiled(model, target, schemes=("bf16", "w4a16_g32_asym"), weight_bits=9)
    assert Scheme.parse("bf16") in made.plan.histogram()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
    assert [ref() for ref in stores] == [None] * len(stores)


def test_later_changes_of_the_block_do_not_reach_what_was_compiled(block: nn.Module, x: Tensor) -> None:
    made = [compiled(block, target, schemes="bf16") for target in ("eager", "numba")]
    before = [one(x) for one in made]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "gate.weight" not in name:
                parameter.mul_(2)
    for one, out in zip(made, before, strict=True):
        assert torch.equal(one(x), out)


# Arguments


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
        return compiled(block, "eager", inputs=x, weight_bits=None, schemes=TWO, **options).plan.allocation

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


# Modes of torch


def test_modes_of_torch(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes="w8a16_g32_asym")
    with torch.no_grad():
        wanted = made(x)
    with torch.inference_mode():
        assert torch.equal(made(x), wanted)
        assert torch.equal(made(x.clone()), wanted)
    assert torch.equal(made(x.clone().requires_grad_()).detach(), wanted)
    made.train()
    assert made.block.training
    low = made.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert error(low, wanted) < 0.2  # a token near a tie may take another expert


def test_copies_share_the_compiled_experts(block: nn.Module, x: Tensor) -> None:
    made = compiled(block, schemes=TWO)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    assert twin.compilation is made.compilation
    assert twin.block is not made.block
    model = compiled(qwen_model(), schemes="w4a16_g32_asym")
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_routing_to_no_expert_and_no_tokens_at_all(x: Tensor) -> None:
    experts = seeded(Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG)))
    made = compiled(experts, schemes=TWO)
    rows = x.reshape(-1, HIDDEN)[:3]
    padding = torch.full((3, 2), 4)
    assert not made(rows, padding, torch.ones(3, 2)).any()
    assert made(rows[:0], padding[:0], torch.ones(0, 2)).shape == (0, HIDDEN)


# Mistakes


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


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": "nunba"}, UnknownName, "no target named 'nunba'; did you mean numba"),
    ({"target": "triton-sm89"}, NoKernels, "compile it for eager, numba instead"),
    ({"target": "triton-sm90"}, NoKernels, "eager, numba"),
    ({"schemes": "w4b16"}, BadScheme, "w4b16"),
    ({"schemes": []}, BadArgument, "name at least one"),
    ({"quantizer": "rtm"}, UnknownName, "no quantizer named 'rtm'; did you mean rtn"),
    ({"pipeline": "defualt"}, UnknownName, "did you mean default"),
    ({"pipeline": "allocate-bits{"}, BadPipeline, "is not a pipeline"),
    ({"pipeline": "annotate-cots"}, UnknownName, "annotate-cost"),
    ({"r": 1.5}, BadArgument, "r=1.5"),
    ({"r": float("nan")}, BadArgument, "r=nan"),
    ({"weight_bits": -1}, BadArgument, "weight_bits=-1"),
    ({"weight_bits": float("inf")}, BadArgument, "or None"),
    ({"latency_us": 0}, BadArgument, "latency_us=0"),
    ({"tokens": 0}, BadArgument, "tokens=0"),
    ({"tokens": ()}, BadArgument, "tokens"),
    ({"tokens": "many"}, BadArgument, "tokens='many'"),
    ({"tokens": {1: -1.0}}, BadArgument, "not negative"),
    ({"tokens": {1: 0.0}}, BadArgument, "all zero"),
    ({"weight_bits": 1.5}, InfeasibleBudget, "smallest feasible weight_bits is 3"),
    ({"plan": Plan({Row("moe", "routed", "up", 0): Scheme.parse("bf16")})}, PlanMismatch, "the plan lacks 14 rows"),
    ({"plan": Plan({}), "schemes": "bf16"}, PlanMismatch, "the plan lacks 15 rows"),
    ({"plan": Plan({}), "schemes": "bf16", "pipeline": "annotate-cost,allocate-bits"}, BadArgument, "apply-plan"),
]


@pytest.mark.parametrize(("options", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("no_long_work")
def test_mistakes_are_named_before_any_long_work(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compiled(qwen_block(), **options)


@pytest.mark.usefixtures("no_long_work")
def test_plans_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "mxmoe-pl')
    with pytest.raises(BadPlan, match="is not a plan"):
        compiled(qwen_block(), plan=tmp_path / "plan.json")
    with pytest.raises((BadPlan, FileNotFoundError), match="absent"):
        compiled(qwen_block(), plan=tmp_path / "absent.json")


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
