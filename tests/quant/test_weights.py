"""Weights by name: loaded when asked for, quantized per expert, dense or packed."""

from collections.abc import Callable

import pytest
import torch

from mxmoe.errors import BadWeight, NonFiniteWeights, NoSuchExpert, PackedAs, PackedOnly, UnknownName
from mxmoe.ir import Scheme
from mxmoe.quant import Packed, PackedWeights, Quantized, Weights, dequantize, pack, quantize

UP, BIAS = "block.routed.up", "block.routed.up.bias"
SCHEME = Scheme.parse("w4a16_g4_asym")


def counting(tensor: torch.Tensor, calls: list[int]) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        calls.append(1)
        return tensor

    return load


def test_nothing_is_loaded_before_it_is_asked_for_and_a_bank_once() -> None:
    calls: list[int] = []
    weights = Weights({UP: counting(torch.randn(3, 2, 6), calls), BIAS: torch.zeros(3, 2)})
    assert (len(weights), list(weights), UP in weights, "other" in weights) == (2, [UP, BIAS], True, False)
    assert calls == []
    for expert in range(3):
        weights.quantized(UP, expert, SCHEME)
    assert len(calls) == 1


def test_quantized_is_the_quantizer_on_one_expert() -> None:
    stack = torch.randn(3, 2, 6)
    weights = Weights({UP: stack})
    expected = quantize(stack[1], SCHEME)
    found = weights.quantized(UP, 1, SCHEME)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(pack(expected).payload, weights.packed(UP, 1, SCHEME).payload)
    assert weights[UP] is stack


def test_the_quantizer_gets_name_and_hessian() -> None:
    seen: list[tuple[str, torch.Tensor | None]] = []

    def spy(
        weight: torch.Tensor, scheme: Scheme, *, name: str = "weight", hessian: torch.Tensor | None = None
    ) -> Quantized:
        seen.append((name, hessian))
        return quantize(weight, scheme)

    hessian = torch.eye(6)
    weights = Weights({UP: torch.randn(3, 2, 6)})
    weights.using(spy).quantized(UP, 2, SCHEME)
    weights.using(spy, lambda name, expert: hessian if (name, expert) == (UP, 0) else None).quantized(UP, 0, SCHEME)
    assert seen == [(f"{UP}[2]", None), (f"{UP}[0]", hessian)]


def test_mistakes_are_named() -> None:
    bad = torch.ones(3, 2, 6)
    bad[1, 0, 0] = torch.nan
    weights = Weights({UP: bad, BIAS: torch.zeros(3, 2)})
    with pytest.raises(UnknownName, match=r"no weight named 'block\.routed\.upp'; did you mean block\.routed\.up"):
        weights["block.routed.upp"]
    with pytest.raises(UnknownName, match="no quantizer named 'rtm'; did you mean rtn"):
        Weights({}, "rtm")
    with pytest.raises(NoSuchExpert, match="up has experts 0 to 2, not 3"):
        weights.quantized(UP, 3, SCHEME)
    with pytest.raises(NoSuchExpert):
        weights.quantized(UP, -1, SCHEME)
    with pytest.raises(BadWeight, match=r"up.bias is torch.float32 \[3, 2\]"):
        weights.quantized(BIAS, 0, SCHEME)
    with pytest.raises(NonFiniteWeights, match=r"block\.routed\.up\[1\] holds 1 values"):
        weights.quantized(UP, 1, SCHEME)


def packed_weights(stack: torch.Tensor, schemes: list[Scheme]) -> PackedWeights:
    experts: list[Packed] = [pack(quantize(w, s)) for w, s in zip(stack, schemes, strict=True)]
    return PackedWeights({UP: experts}, {BIAS: torch.zeros(2, 2)})


def test_packed_weights_give_what_was_packed() -> None:
    stack, schemes = torch.randn(2, 2, 6), [SCHEME, Scheme.parse("bf16")]
    weights = packed_weights(stack, schemes)
    for expert, scheme in enumerate(schemes):
        expected = dequantize(quantize(stack[expert], scheme))
        assert torch.equal(dequantize(weights.quantized(UP, expert, scheme)), expected)
    assert (len(weights), list(weights), UP in weights, BIAS in weights) == (2, [UP, BIAS], True, True)
    assert weights[BIAS].shape == (2, 2)


def test_packed_weights_refuse_what_is_gone() -> None:
    weights = packed_weights(torch.randn(2, 2, 6), [SCHEME, Scheme.parse("bf16")])
    with pytest.raises(PackedOnly, match="up is kept packed as bf16, w4a16_g4_asym, its dense values are gone"):
        weights[UP]
    with pytest.raises(PackedOnly):
        weights.using("rtn")
    with pytest.raises(PackedAs, match=r"expert 0 of block\.routed\.up is packed as w4a16_g4_asym, not as bf16"):
        weights.quantized(UP, 0, Scheme.parse("bf16"))
    with pytest.raises(NoSuchExpert):
        weights.packed(UP, 2, SCHEME)
    with pytest.raises(UnknownName, match="no packed weight named"):
        weights.quantized(BIAS, 0, SCHEME)


def same(a: Quantized, b: Quantized) -> bool:
    return torch.equal(dequantize(a), dequantize(b)) and torch.equal(a.codes.float(), b.codes.float())


MIXED = [SCHEME, Scheme.parse("w2a16_sym"), SCHEME, Scheme.parse("bf16"), SCHEME]


@pytest.mark.parametrize("quantizer", ["rtn", "rtn_mse", "gptq"])
def test_a_stack_is_quantized_scheme_by_scheme(quantizer: str) -> None:
    x = torch.randn((5, 40, 6), generator=torch.Generator().manual_seed(0))
    x[2] = 0
    hessian = x.mT @ x
    stack = torch.randn((5, 3, 6), generator=torch.Generator().manual_seed(1))
    weights = Weights({UP: stack}, quantizer, lambda name, expert: hessian[expert] if expert != 2 else None)
    found = weights.quantized_stack(UP, MIXED)
    for expert, scheme in enumerate(MIXED):
        assert found[expert].scheme == scheme
        assert same(found[expert], weights.quantized(UP, expert, scheme))


def test_a_stack_takes_one_call_for_each_scheme() -> None:
    calls: list[tuple[torch.Size, str, torch.Tensor | None]] = []

    def spy(
        weight: torch.Tensor, scheme: Scheme, *, name: str = "weight", hessian: torch.Tensor | None = None
    ) -> Quantized:
        calls.append((weight.shape, name, hessian))
        return quantize(weight, scheme)

    weights = Weights({UP: torch.randn(5, 3, 6)}, spy, lambda name, expert: torch.eye(6) if expert == 4 else None)
    planned = weights.planned({UP: MIXED})
    for expert, scheme in enumerate(MIXED):
        planned.quantized(UP, expert, scheme)
    assert [(shape, name) for shape, name, _ in calls] == [((3, 3, 6), UP), ((1, 3, 6), UP), ((1, 3, 6), UP)]
    hessian = calls[0][2]
    assert hessian is not None
    assert torch.equal(hessian, torch.stack([torch.zeros(6, 6), torch.zeros(6, 6), torch.eye(6)]))
    assert calls[1][2] is None
    planned.quantized(UP, 1, SCHEME)  # not the scheme that was planned
    assert (calls[-1][0], calls[-1][1]) == ((3, 6), f"{UP}[1]")


def test_only_the_last_banks_are_kept() -> None:
    calls: list[str] = []

    def spy(
        weight: torch.Tensor, scheme: Scheme, *, name: str = "weight", hessian: torch.Tensor | None = None
    ) -> Quantized:
        calls.append(name)
        return quantize(weight, scheme)

    names = [f"{UP}{index}" for index in range(4)]
    weights = Weights({name: torch.randn(2, 3, 6) for name in names}, spy)
    planned = weights.planned({name: [SCHEME] * 2 for name in names})
    for expert in range(2):
        for name in names[:3]:
            planned.quantized(name, expert, SCHEME)
    assert calls == names[:3]
    planned.quantized(names[3], 0, SCHEME)
    planned.quantized(names[2], 0, SCHEME)
    assert calls == names
    planned.quantized(names[0], 0, SCHEME)
    assert calls == [*names, names[0]]


def test_mistakes_in_a_stack_name_the_expert() -> None:
    bad = torch.ones(5, 3, 6)
    bad[4, 0, 0] = torch.nan
    weights = Weights({UP: bad, BIAS: torch.zeros(5, 3)})
    with pytest.raises(NonFiniteWeights, match=r"block\.routed\.up\[4\] holds 1 values"):
        weights.quantized_stack(UP, MIXED)
    for name, schemes in ((UP, MIXED[:4]), (BIAS, MIXED)):
        with pytest.raises(BadWeight, match=f"in {len(schemes)} schemes"):
            weights.quantized_stack(name, schemes)


def test_packed_weights_come_as_a_stack_too() -> None:
    schemes = [SCHEME, Scheme.parse("bf16")]
    weights = packed_weights(torch.randn(2, 2, 6), schemes)
    assert weights.planned({UP: schemes}) is weights
    for expert, one in enumerate(weights.quantized_stack(UP, schemes)):
        assert same(one, weights.quantized(UP, expert, schemes[expert]))
