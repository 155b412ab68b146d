"""Kinds of nonlinearity against formulas written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import UnknownName
from mxmoe.quant.acts import ACT_PARAMS, ACTS, POINTWISE, apply_act

numbers = st.floats(-15, 15, width=32)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clip(x: float, limit: float) -> float:
    return max(-limit, min(limit, x))


PLAIN: dict[str, Callable[[float, float], float]] = {
    "silu": lambda g, u: g * sigmoid(g) * u,
    "gelu": lambda g, u: g * (1 + math.erf(g / math.sqrt(2))) / 2 * u,
    "gelu_tanh": lambda g, u: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2 * u,
    "gelu_quick": lambda g, u: g * sigmoid(1.702 * g) * u,
    "relu": lambda g, u: max(g, 0) * u,
    "relu2": lambda g, u: max(g, 0) ** 2 * u,
    "sigmoid": lambda g, u: sigmoid(g) * u,
    "tanh": lambda g, u: math.tanh(g) * u,
    "identity": lambda g, u: g * u,
    "swiglu_oai": lambda g, u: (clip(u, 7) + 1) * min(g, 7) * sigmoid(1.702 * min(g, 7)),
    "silu_clamped": lambda g, u: min(g, 7) * sigmoid(min(g, 7)) * clip(u, 7),
    "silu_capped": lambda g, u: min(g * sigmoid(g), 7) * clip(u, 7),
    "swiglu_softcap": lambda g, u: 3 * math.tanh(g / 3) * sigmoid(g) * 5 * math.tanh(u / 5),
}
NUMBERS = {"alpha": 1.702, "limit": 7.0, "gate_cap": 3.0, "up_cap": 5.0}


def test_every_kind_has_its_formula_here() -> None:
    assert set(PLAIN) == set(ACTS)
    assert set(ACT_PARAMS) == set(ACTS) - set(POINTWISE)


@pytest.mark.parametrize("kind", PLAIN)
@given(gate=numbers, up=numbers)
@settings(max_examples=50, deadline=None)
def test_kinds_follow_their_formulas(kind: str, gate: float, up: float) -> None:
    params = {name: NUMBERS[name] for name in ACT_PARAMS.get(kind, ())}
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (gate, up)]
    assert float(apply_act(kind, *tensors, params)) == pytest.approx(PLAIN[kind](gate, up), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", POINTWISE)
@given(up=numbers)
@settings(max_examples=20, deadline=None)
def test_without_a_gate_the_function_is_of_up(kind: str, up: float) -> None:
    found = apply_act(kind, None, torch.tensor(up, dtype=torch.float64))
    assert float(found) == pytest.approx(PLAIN[kind](up, 1), rel=1e-9, abs=1e-9)


def test_unknown_kinds_answer_with_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean silu"):
        apply_act("sliu", None, torch.ones(1))
