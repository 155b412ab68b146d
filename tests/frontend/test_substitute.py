"""Whatever is put in the place of a bank is called in one way, and can be taken out again."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from mxmoe.frontend import Lifted, lift, replace_banks

from .blocks import MIXTRAL, MLP, PROJ, ListBlock, Stack, StackBlock
from .reference import reference

BLOCKS = {
    "list": lambda: ListBlock(),
    "mixtral list with bias": lambda: ListBlock(names=MIXTRAL, bias=True, act=nn.GELU),
    "stack": lambda: StackBlock(),
    "transposed, interleaved, with bias": lambda: StackBlock(
        Stack(is_transposed=True, is_concatenated=False, has_bias=True)
    ),
    "without gate": lambda: StackBlock(Stack(has_gate=False)),
    "gate and up apart": lambda: StackBlock(Stack(is_split=True)),
}


def swapped(lifted: Lifted):  # noqa: ANN201  # a Replacement
    return replace_banks(lifted, lambda block, bank: reference(lifted, block, bank))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_computes_the_same_with_its_banks_replaced(name: str) -> None:
    block = BLOCKS[name]()
    x = torch.randn(2, 5, 16)
    expected, children = block(x), dict(block.named_modules())
    replaced = swapped(lift(block))
    assert replaced.root is block
    assert dict(block.named_modules()) != children
    torch.testing.assert_close(block(x), expected)
    replaced.undo()
    replaced.undo()
    assert dict(block.named_modules()) == children
    assert torch.equal(block(x), expected)


@torch.no_grad()
def test_experts_alone_are_replaced_as_the_root() -> None:
    stack = Stack()
    lifted = lift(stack, top_k=2)
    replaced = swapped(lifted)
    hidden, index, weights = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    expected = stack(hidden, index, weights)
    assert replaced.root is not stack
    torch.testing.assert_close(replaced.root(hidden, index, weights), expected)
    torch.testing.assert_close(replaced.root(hidden, top_k_weights=weights, top_k_index=index), expected)
    assert replaced.changes == ()
    assert inspect.signature(replaced.root) == inspect.signature(stack.forward)
    with pytest.raises(TypeError, match="missing a required argument: 'top_k_weights'"):
        replaced.root(hidden, index)


@torch.no_grad()
def test_a_module_held_at_two_places_is_replaced_at_both() -> None:
    first, second = StackBlock(), StackBlock()
    second.experts = first.experts
    model = nn.Sequential(first, second)
    x = torch.randn(3, 16)
    expected = model(x)
    lifted = lift(model)
    assert [block.name for block in lifted.blocks] == ["0"]
    replaced = swapped(lifted)
    assert model[1].experts is model[0].experts is not lifted.blocks[0].banks["routed"].module
    torch.testing.assert_close(model(x), expected)
    replaced.undo()
    assert model[1].experts is lifted.blocks[0].banks["routed"].module


def test_each_bank_is_asked_for_once_before_anything_changes() -> None:
    model = nn.Sequential(StackBlock(), ListBlock())
    model[0].shared_expert = MLP(16, 8, PROJ, nn.SiLU())
    lifted, asked = lift(model), []
    before = dict(model.named_modules())

    def make(block: object, bank: str) -> nn.Module:
        asked.append((block.name, bank))  # type: ignore[attr-defined]  # a LiftedBlock
        assert dict(model.named_modules()) == before
        return Silent()

    replace_banks(lifted, make)
    assert asked == [("0", "routed"), ("0", "shared"), ("1", "routed")]


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.zeros(3, dtype=torch.uint8))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def test_a_module_in_the_place_of_a_bank_is_part_of_the_model() -> None:
    block = StackBlock()
    block.shared_expert = MLP(16, 8, PROJ, nn.SiLU())
    replace_banks(lift(block), lambda block, bank: Silent())
    assert {"experts.run.codes", "shared_expert.run.codes"} <= set(block.state_dict())
    assert not block(torch.randn(2, 16)).any()
    assert not block.shared_expert(torch.randn(2, 3, 16)).any()
    assert block.experts.num_experts == 4
