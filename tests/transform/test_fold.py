"""Folding changes no function, and folding back changes no parameter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxmoe.errors import ScaleOutOfRange
from mxmoe.frontend import lift
from mxmoe.ir import BankShape
from mxmoe.transform.edges import find_edges
from mxmoe.transform.fold import fold_down, fold_input, power_of_two, why_not_down

from .models import FORMS, HIDDEN, TRANSFORMERS, WIDTH, Model, RmsNorm, distance, ids_of, own_model, run


def scales(width: int, seed: int, spread: float) -> Tensor:
    """Positive scales over `spread` powers of ten."""
    return 10 ** (spread * (torch.rand(width, generator=torch.Generator().manual_seed(seed)) - 0.5)).double()


def fold_all(model: Model, seed: int, spread: float, *, inverse: bool = False) -> None:
    """Fold random scales into every input of every block, or take the same scales out again."""
    for number, edge in enumerate(find_edges(lift(model))):
        scale = scales(HIDDEN, seed + number, spread)
        fold_input(edge, 1 / scale if inverse else scale)
        for bank, experts in edge.experts.items():
            for index, expert in enumerate(experts if not why_not_down(edge.block.banks[bank].shape) else ()):
                scale = scales(WIDTH, seed + 100 * index, spread)
                fold_down(bank, expert, 1 / scale if inverse else scale)


@given(
    form=st.sampled_from(list(FORMS)),
    offset=st.sampled_from([0.0, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
    spread=st.floats(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_the_function_stays_and_folding_back_gives_the_parameters(
    form: str, offset: float, bias: bool, seed: int, spread: float
) -> None:
    model = own_model(form, lambda: RmsNorm(offset, bias), seed)
    ids = ids_of(seed)
    before, parameters = run(model, ids), {name: p.detach().clone() for name, p in model.named_parameters()}
    fold_all(model, seed, spread)
    assert distance(run(model, ids), before) < 1e-9
    fold_all(model, seed, spread, inverse=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), parameters[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_of_two_change_no_bit_of_real_models(name: str, dtype: torch.dtype) -> None:
    model = TRANSFORMERS[name](dtype)
    ids = ids_of(1)
    before = run(model, ids)
    for edge in find_edges(lift(model)):
        fold_input(edge, power_of_two(scales(32, 0, 3)))
        for bank, experts in edge.experts.items():
            width = edge.block.banks[bank].shape.intermediate
            for index, expert in enumerate(experts):
                fold_down(bank, expert, power_of_two(scales(width, index, 3)))
    assert torch.equal(run(model, ids), before)


@given(st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_powers_of_two_are_the_nearest(value: float) -> None:
    found = float(power_of_two(torch.tensor(value)))
    assert math.frexp(found)[0] == 0.5
    assert abs(math.log2(value / found)) <= 0.5 + 1e-6


def test_nothing_is_written_when_something_would_overflow() -> None:
    model = own_model("stack").half()
    (edge, _) = find_edges(lift(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScaleOutOfRange, match=r"gate.* by 1 to 1e\+06 leaves the range of torch\.float16"):
        fold_input(edge, torch.tensor([1e6, *[1.0] * (HIDDEN - 1)]))
    with pytest.raises(ScaleOutOfRange, match=r"mlp\.experts\[0\]\.up"):
        fold_down("mlp.experts[0]", edge.experts["routed"][0], torch.full((WIDTH,), 1e-6))
    with pytest.raises(ScaleOutOfRange, match=r"mlp\.experts\[0\]\.down"):
        fold_down("mlp.experts[0]", edge.experts["routed"][0], torch.full((WIDTH,), 1e6))
    with pytest.raises(ScaleOutOfRange, match="leaves the range"):
        fold_input(edge, torch.full((HIDDEN,), torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("act", "gated", "reason"),
    [
        ("silu", True, ""),
        ("gelu_tanh", True, ""),
        ("relu", False, ""),
        ("relu2", False, "without a gate, the act relu2"),
        ("silu", False, "without a gate, the act silu"),
        ("swiglu_oai", True, "the act swiglu_oai is not linear in up"),
    ],
)
def test_acts_say_whether_a_factor_passes_them(act: str, gated: bool, reason: str) -> None:
    roles = ("gate", "up", "down") if gated else ("up", "down")
    params = {"alpha": 1.702, "limit": 7.0} if act == "swiglu_oai" else {}
    shape = BankShape("routed", 2, 1, 8, act, gated, {role: role for role in roles}, {}, params)
    assert why_not_down(shape).startswith(reason)
    assert bool(why_not_down(shape)) == bool(reason)
