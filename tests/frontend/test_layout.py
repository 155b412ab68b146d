"""Every way of storing gives the same canonical weights, as views where the storage allows it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mxmoe.errors import BadExperts, MetaWeights
from mxmoe.frontend.layout import guarded, halves, list_layout, stack_layout

from .blocks import MIXTRAL, MLP, PROJ, Stack

WAYS = [
    {"is_transposed": t, "is_concatenated": c, "has_bias": b} for t, c, b in itertools.product((False, True), repeat=3)
]

FURTHER = [{"has_gate": False}, {"has_gate": False, "has_bias": True}, {"is_split": True}]


@given(experts=st.integers(1, 4), width=st.integers(1, 6), depth=st.integers(1, 4), is_concatenated=st.booleans())
@settings(max_examples=50, deadline=None)
def test_halves_are_the_inverse_of_joining(experts: int, width: int, depth: int, is_concatenated: bool) -> None:
    gate, up = torch.randn(experts, width, depth), torch.randn(experts, width, depth)
    fused = torch.cat((gate, up), 1) if is_concatenated else torch.stack((gate, up), 2).flatten(1, 2)
    found = halves(fused, is_concatenated=is_concatenated)
    assert torch.equal(found[0], gate)
    assert torch.equal(found[1], up)


@pytest.mark.parametrize("way", [*WAYS, *FURTHER], ids=str)
def test_a_stack_is_read_the_way_it_is_stored(way: dict[str, bool]) -> None:
    stack = Stack(3, 5, 7, **way)
    layout = stack_layout(stack, "experts")
    assert (layout.experts, layout.hidden, layout.intermediate) == (3, 5, 7)
    assert layout.is_gated == stack.has_gate
    assert set(layout.biases) == (set(layout.weights) if stack.has_bias else set())
    x = torch.randn(2, 5)
    for expert in range(3):
        weights, biases = layout.expert(expert)
        gate, up = stack.inner(x, expert)
        torch.testing.assert_close(x @ weights["up"].T + biases.get("up", 0), up)
        if gate is not None:
            torch.testing.assert_close(x @ weights["gate"].T + biases.get("gate", 0), gate)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_views_share_the_storage_of_the_stack(way: dict[str, bool]) -> None:
    stack = Stack(3, 5, 7, **way)
    layout = stack_layout(stack, "experts")
    held = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    for load in (*layout.weights.values(), *layout.biases.values()):
        assert load().untyped_storage().data_ptr() in held
        assert not load().requires_grad


@pytest.mark.parametrize("names", [PROJ, MIXTRAL])
@pytest.mark.parametrize("bias", [False, True])
def test_a_list_is_stacked(names: tuple[str, str, str], bias: bool) -> None:
    entries = [MLP(5, 7, names, nn.SiLU(), bias) for _ in range(3)]
    layout = list_layout(entries, "experts")
    for role, name in zip(("gate", "up", "down"), names, strict=True):
        stacked = torch.stack([entry.get_submodule(name).weight for entry in entries])
        assert torch.equal(layout.weights[role](), stacked)
        assert (role in layout.biases) == bias
        if bias:
            assert torch.equal(layout.biases[role](), torch.stack([e.get_submodule(name).bias for e in entries]))
    alone = list_layout(entries[:1], "shared").weights["up"]()
    assert alone.data_ptr() == entries[0].get_submodule(names[1]).weight.data_ptr()


def test_rows_of_a_fused_mlp_are_gate_then_up() -> None:
    fused = nn.Module()
    fused.input_linear, fused.output_linear = nn.Linear(5, 14, bias=False), nn.Linear(7, 5, bias=False)
    layout = list_layout([fused], "shared_mlp")
    assert torch.equal(layout.weights["gate"]()[0], fused.input_linear.weight[:7])
    assert torch.equal(layout.weights["up"]()[0], fused.input_linear.weight[7:])


def _unlike() -> list[nn.Module]:
    return [MLP(5, 7, PROJ, nn.SiLU()), MLP(5, 8, PROJ, nn.SiLU())]


def _with_norm() -> list[nn.Module]:
    entry = MLP(5, 7, PROJ, nn.SiLU())
    entry.norm = nn.LayerNorm(5)
    return [entry]


@pytest.mark.parametrize(("entries", "said"), [(_unlike(), "differ"), (_with_norm(), "further parameters: norm")])
def test_lists_that_are_more_than_mlps_are_refused(entries: list[nn.Module], said: str) -> None:
    with pytest.raises(BadExperts, match=said):
        list_layout(entries, "experts")


def _changed(change: str) -> Stack:
    stack = Stack(3, 5, 7, has_bias=True)
    if change == "transposed":
        stack.is_transposed = True
    elif change == "dtype":
        stack.down_proj = nn.Parameter(torch.zeros(3, 5, 7, dtype=torch.uint8), requires_grad=False)
    elif change == "bias":
        stack.down_proj_bias = nn.Parameter(torch.zeros(3, 6))
    else:
        stack.scale = nn.Parameter(torch.ones(3))
    return stack


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("transposed", "do not fit together"),
        ("dtype", r"with \.to\(torch\.bfloat16\); unpack a quantized"),
        ("bias", "biases"),
        ("more", "further"),
    ],
)
def test_stacks_that_contradict_themselves_are_refused(change: str, said: str) -> None:
    with pytest.raises(BadExperts, match=said):
        stack_layout(_changed(change), "experts")


def test_meta_weights_say_so_when_they_are_read() -> None:
    with torch.device("meta"):
        layout = stack_layout(Stack(), "experts")
    assert layout.is_meta
    with pytest.raises(MetaWeights, match=r"moe\.routed\.up is on the meta device"):
        guarded("moe.routed.up", layout.weights["up"])()
