"""The definition, against loops over tokens that know nothing of ops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxmoe.backends.eager import RUN, EagerBackend
from mxmoe.errors import BadHidden, BadRouting, BadWeightShape, NoSuchBank
from mxmoe.ir import MXMOE, BankShape, BlockShape, MoeOp, Scheme, YieldOp, banks, moe_ops
from mxmoe.passes import Environment
from mxmoe.passes.lower_to_group_gemm import LowerToGroupGemm
from mxmoe.quant import Weights, dequantize, fake_quantize_activation, rotate
from mxmoe.quant.acts import apply_act
from mxmoe.testing import Case, Routed, at_stage, cases, random_weights

_NAMES = {role: f"mlp.routed.{role}" for role in ("gate", "up", "down")}
_SHAPE = BlockShape("mlp", 16, (BankShape("routed", 3, 2, 24, "silu", True, _NAMES),))
_CALL = (torch.randn(2, 16), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))


def _schemes(case: Case, bank: BankShape, role: str) -> list[Scheme] | None:
    moe = moe_ops(case.module)[0]
    choice = banks(moe)[bank.name].linears[role].choice
    return None if choice is None else [moe.candidates[i] for i in choice.array]


def _token_by_token(case: Case, bank: BankShape, routed: Routed) -> Tensor:
    """The formula of a block, one token and one expert at a time, on decoded weights."""

    def linear(x: Tensor, role: str, expert: int) -> Tensor:
        schemes = _schemes(case, bank, role)
        if schemes is None:
            y = case.weights[bank.weights[role]][expert].double() @ x.double()
        else:
            q = case.weights.quantized(bank.weights[role], expert, schemes[expert])
            y = dequantize(q).double() @ fake_quantize_activation(x, schemes[expert]).double()
        return (y + case.weights[bank.biases[role]][expert] if role in bank.biases else y).float()

    out = torch.zeros(len(case.hidden), case.shape.hidden)
    block = banks(moe_ops(case.module)[0])[bank.name].act.hadamard
    for t, (experts, weights) in enumerate(zip(routed.index.tolist(), routed.weights, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert < bank.experts:
                x = case.hidden[t].float()
                gate = linear(x, "gate", expert) if bank.gated else None
                h = apply_act(bank.act, gate, linear(x, "up", expert), bank.act_params)
                h = rotate(h.double(), block).float() if block else h
                out[t] += weight * linear(h, "down", expert)
    return out


@pytest.mark.parametrize("stage", ["lifted", "allocated"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_follows_the_formula(stage: str, data: st.DataObject) -> None:
    # 16-bit activations: a code of a coarser type may flip on the last bit of its input, which the formula rounds less
    candidates = [Scheme.parse(name) for name in ("w4a16_g32_asym", "w3a16_sym", "fp16", "w8a16_sym_fp16")]
    case = data.draw(cases(stage, candidates))  # pyright: ignore[reportArgumentType]
    executable = EagerBackend().compile(case.module, case.weights)[case.shape.name]
    for bank in case.shape.banks:
        routed = case.routings[bank.name]
        out = executable(bank.name, case.hidden, routed.index, routed.weights)
        assert out.dtype == case.hidden.dtype
        wanted = _token_by_token(case, bank, routed)
        error = (out.float() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error < 2 * torch.finfo(out.dtype).eps + 1e-2 * (stage == "allocated") + 1e-5


@settings(max_examples=40, deadline=None)
@given(case=cases("allocated"))
def test_lowering_changes_no_bit(case: Case) -> None:
    before = EagerBackend().compile(case.module, case.weights)[case.shape.name]
    lowered = case.module.clone()
    LowerToGroupGemm().run(lowered, Environment())
    after = EagerBackend().compile(lowered, case.weights)[case.shape.name]
    for name, routed in case.routings.items():
        a, b = (e.trace(name, case.hidden, routed.index, routed.weights) for e in (before, after))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key].nan_to_num(), b[key].nan_to_num()), key
    assert before.nbytes == after.nbytes


def test_every_op_has_a_meaning() -> None:
    elsewhere = {MoeOp, YieldOp}  # the block itself, and the banks' sum, which the caller makes
    assert {*RUN, *elsewhere} == set(MXMOE.operations)


def test_trace_names_every_step() -> None:
    executable = EagerBackend().compile(at_stage([_SHAPE], "lifted", [Scheme.parse("bf16")]), random_weights([_SHAPE]))
    trace = executable["mlp"].trace("routed", *_CALL)
    assert {key: tuple(value.shape) for key, value in trace.items()} == {
        "gate": (3, 24), "up": (3, 24), "act": (3, 24), "down": (3, 16), "out": (2, 16),
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["lifted", "lowered"])
def test_nbytes_counts_what_is_held(stage: str) -> None:
    module = at_stage([_SHAPE], stage, [Scheme.parse("w4a16_sym")])  # pyright: ignore[reportArgumentType]
    executable = EagerBackend().compile(module, random_weights([_SHAPE]))["mlp"]
    codes = 3 * 3 * 16 * 24
    assert executable.nbytes == (4 * codes if stage == "lifted" else codes + 4 * 3 * (24 + 24 + 16))


@pytest.mark.parametrize("stage", ["lifted", "allocated"])
def test_wrong_weights_are_refused_by_name(stage: str) -> None:
    weights = random_weights([_SHAPE])
    wrong = Weights({**weights, "mlp.routed.up": torch.zeros(3, 24, 15)})
    with pytest.raises(BadWeightShape, match=r"mlp\.routed\.up"):
        EagerBackend().compile(at_stage([_SHAPE], stage, [Scheme.parse("w8a8_sym")]), wrong)  # pyright: ignore[reportArgumentType]


def test_a_bad_call_is_refused() -> None:
    executable = EagerBackend().compile(at_stage([_SHAPE], "lifted", [Scheme.parse("bf16")]), random_weights([_SHAPE]))
    hidden, index, weights = _CALL
    with pytest.raises(NoSuchBank, match="it has routed"):
        executable["mlp"]("shared", hidden, index, weights)
    with pytest.raises(BadHidden):
        executable["mlp"]("routed", hidden[:, 1:], index, weights)
    with pytest.raises(BadRouting):
        executable["mlp"]("routed", hidden, index + 1, weights)
