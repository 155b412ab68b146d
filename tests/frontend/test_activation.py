"""Activations are known by what they compute, gates of their own by a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxmoe.errors import UnknownActivation, UnknownGate
from mxmoe.frontend.activation import Activation, describe_activation, identify
from mxmoe.quant.acts import POINTWISE

from .blocks import Stack


@pytest.mark.parametrize("kind", POINTWISE)
def test_each_kind_is_itself_and_no_other(kind: str) -> None:
    assert identify(POINTWISE[kind]) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "gelu_quick"),
        ("relu2", "relu2"),
        ("relu", "relu"),
        ("linear", "identity"),
        ("mish", None),
        ("gelu_10", None),
    ],
)
def test_activations_of_transformers(name: str, kind: str | None) -> None:
    assert identify(ACT2FN[name]) == kind


def test_a_function_of_two_tensors_is_none() -> None:
    assert identify(lambda gate, up: gate * up) is None
    assert identify(F.silu) == "silu"


class OddGate(Stack):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cos(gate) * up


def test_a_gate_of_its_own_needs_a_row() -> None:
    with pytest.raises(UnknownGate, match='Family\\("OddGate", act=') as error:
        describe_activation(OddGate(), "layers.3.experts")
    assert "layers.3.experts" in str(error.value)


def test_an_unknown_activation_says_what_is_known() -> None:
    stack = Stack()
    stack.act_fn = nn.Mish()
    with pytest.raises(UnknownActivation, match=r"Mish.*silu.*Family"):
        describe_activation(stack, "experts")
    del stack.act_fn
    with pytest.raises(UnknownActivation, match="None"):
        describe_activation(stack, "experts")


class GptOssExperts(Stack):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        raise NotImplementedError


class Derived(GptOssExperts):
    pass


def test_rows_read_numbers_from_the_module_and_hold_for_derived_classes() -> None:
    stack = Derived()
    stack.alpha, stack.limit = 1.5, 6
    act = describe_activation(stack, "experts")
    assert act == Activation("swiglu_oai", {"alpha": 1.5, "limit": 6.0})
    assert act.reach == 6
    assert str(act) == "swiglu_oai alpha=1.5 limit=6"


class Step3p7Experts(Stack):
    pass


@pytest.mark.parametrize(("limit", "kind"), [(float("inf"), "silu"), (7.0, "silu_capped")])
def test_a_limit_that_is_infinite_is_none(limit: float, kind: str) -> None:
    stack = Step3p7Experts()
    stack.limit = limit
    assert describe_activation(stack, "experts").kind == kind
