"""Views of experts reach the storage of the module, in every form and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mxmoe.errors import MetaWeights
from mxmoe.frontend import expert_views, lift

from .blocks import MIXTRAL, ListBlock, Stack, StackBlock

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: ListBlock(names=MIXTRAL),
    "list with biases": lambda: ListBlock(bias=True),
    "stack": lambda: StackBlock(Stack()),
    "transposed": lambda: StackBlock(Stack(is_transposed=True, has_bias=True)),
    "interleaved": lambda: StackBlock(Stack(is_concatenated=False)),
    "split": lambda: StackBlock(Stack(is_split=True)),
    "without gate": lambda: StackBlock(Stack(has_gate=False, has_bias=True)),
}
VALUES = {"gate": 1.0, "up": 2.0, "down": 3.0}


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_writing_to_a_view_changes_the_module(form: str, dtype: torch.dtype) -> None:
    block = BLOCKS[form]().to(dtype)
    bank = lift(block).blocks[0].banks["routed"]
    experts = expert_views(bank)
    assert len(experts) == bank.shape.experts
    for index, expert in enumerate(experts):
        for role, view in (*expert.weights.items(), *expert.biases.items()):
            assert view.dtype == dtype
            view.fill_(VALUES[role] + 10 * index)
    for name, stack in lift(block).weights.items():
        role = name.removesuffix(".bias").rpartition(".")[2]
        for index, weight in enumerate(stack):
            assert (weight == VALUES[role] + 10 * index).all()


def test_weights_that_were_never_loaded_are_named() -> None:
    with torch.device("meta"):
        block = StackBlock(Stack())
    with pytest.raises(MetaWeights, match="experts is on the meta device"):
        expert_views(lift(block).blocks[0].banks["routed"])
