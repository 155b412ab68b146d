"""Stacks, lists and MLPs are known by their weights; what only looks like them is named."""

from __future__ import annotations

import pytest
from torch import nn

from mxmoe.frontend.structure import NAMINGS, Naming, is_stack, naming_of, survey

from .blocks import MIXTRAL, MLP, PROJ, ListBlock, Stack, StackBlock


def mlp(naming: Naming, hidden: int = 5, width: int = 7) -> nn.Module:
    module = nn.Module()
    for name in naming.linears:
        fused = naming.is_fused and name == naming.up
        sizes = (width, hidden) if name == naming.down else (hidden, 2 * width if fused else width)
        module.add_module(name, nn.Linear(*sizes))
    return module


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: n.up)
def test_each_naming_is_found_and_only_with_sizes_that_fit(naming: Naming) -> None:
    module = mlp(naming)
    assert naming_of(module) == naming
    module.add_module(naming.down, nn.Linear(9, 5))
    assert naming_of(module) is None
    module = mlp(naming)
    module.add_module("further", nn.Linear(5, 5))
    assert naming_of(module) is None


def test_stacks_need_three_dimensions_and_both_ends() -> None:
    assert is_stack(Stack())
    assert is_stack(Stack(has_gate=False))
    stack = Stack()
    stack.down_proj = nn.Parameter(stack.down_proj[0].detach())
    assert not is_stack(stack)
    assert not is_stack(MLP(5, 7, PROJ, nn.SiLU()))


def test_sites_come_in_module_order_and_hold_no_sites() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([ListBlock(), MLP(16, 8, MIXTRAL, nn.SiLU()), StackBlock()])
    model.layers[2].shared_expert = MLP(16, 8, PROJ, nn.SiLU())
    found = [(site.path, site.form, site.is_shared) for site in survey(model).sites]
    assert found == [
        ("layers.0.experts", "list", False),
        ("layers.1", "mlp", False),
        ("layers.2.experts", "stack", False),
        ("layers.2.shared_expert", "mlp", True),
    ]


def test_a_list_of_mlps_that_nobody_calls_experts_is_no_bank() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(MLP(16, 8, PROJ, nn.SiLU()) for _ in range(3))
    assert [site.form for site in survey(model).sites] == ["mlp"] * 3


def test_what_holds_no_weights_is_no_expert() -> None:
    block = ListBlock()
    block.experts.append(nn.Dropout())
    assert [(site.path, site.form) for site in survey(block).sites] == [("experts", "list")]


def test_mlps_among_experts_that_are_not_understood_are_not_called_dense() -> None:
    block = ListBlock()
    block.experts.append(nn.Linear(3, 3))
    found = survey(block)
    assert [path for path, _ in found.lookalikes] == ["experts"]
    assert found.sites == ()


def test_lookalikes_are_named() -> None:
    class GroupedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(nn.init.zeros_(nn.Linear(4, 4).weight.data).expand(3, 4, 4).clone())

    model = nn.Module()
    model.odd = GroupedExperts()
    model.experts = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Linear(3, 3)])
    model.conv = nn.Conv1d(4, 4, 2)
    model.expert_bias = nn.Linear(3, 3)
    assert [path for path, _ in survey(model).lookalikes] == ["odd", "experts"]
