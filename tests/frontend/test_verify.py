"""A reading that is wrong raises, in every part that could be misread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mxmoe.errors import LiftMismatch
from mxmoe.frontend import lift

from .blocks import MLP, PROJ, ListBlock, Stack, StackBlock


class Swapped(Stack):
    def inner(self, x: Tensor, expert: int) -> tuple[Tensor | None, Tensor]:
        gate, up = super().inner(x, expert)
        assert gate is not None
        return up, gate


class Doubled(Stack):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class Clamped(Stack):
    """Differs from silu beyond 2 only."""

    def inner(self, x: Tensor, expert: int) -> tuple[Tensor | None, Tensor]:
        gate, up = super().inner(x, expert)
        assert gate is not None
        return gate.clamp(max=2), up


class DeepseekV4Experts(Stack):
    """The name of a family whose gate is clamped, and nothing of the kind."""

    limit = 5.0


@pytest.mark.parametrize("cls", [Swapped, Doubled, Clamped, DeepseekV4Experts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stack_that_computes_something_else_is_refused(cls: type[Stack], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with pytest.raises(LiftMismatch, match=rf"{cls.__name__} at 'experts'.*forward disagrees"):
        lift(StackBlock(cls().to(dtype)))


def test_an_interleaved_stack_that_says_it_is_concatenated_is_refused() -> None:
    stack = Stack(is_concatenated=False)
    stack.is_concatenated = True
    gate_up = stack.gate_up_proj.detach()
    stack.inner = lambda x, e: ((x @ gate_up[e].T)[:, ::2], (x @ gate_up[e].T)[:, 1::2])
    with pytest.raises(LiftMismatch):
        lift(StackBlock(stack))


class GptOssExperts(Stack):
    """The gate of gpt-oss, on halves where the flag says interleaved."""

    alpha, limit = 1.702, 7.0

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def test_a_gate_is_compared_with_its_row() -> None:
    with pytest.raises(LiftMismatch, match=r"swiglu_oai alpha=1\.702 limit=7.*own gate disagrees"):
        lift(StackBlock(GptOssExperts(is_concatenated=False)))


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_mlps_that_compute_something_else_are_refused() -> None:
    block = ListBlock()
    block.experts = nn.ModuleList(Residual(16, 24, PROJ, nn.SiLU()) for _ in range(4))
    with pytest.raises(LiftMismatch, match="Residual at 'experts'"):
        lift(block)
    block = StackBlock()
    block.shared_expert = Residual(16, 8, PROJ, nn.SiLU())
    with pytest.raises(LiftMismatch, match="Residual at 'shared_expert'"):
        lift(block)


class Dropping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_checking_leaves_training_modes_and_random_numbers_alone() -> None:
    block = ListBlock()
    block.experts = nn.ModuleList(Dropping(16, 24, PROJ, nn.SiLU()) for _ in range(4)).train()
    block.experts[1].eval()
    modes, state = [m.training for m in block.modules()], torch.get_rng_state()
    lift(block)
    assert modes == [m.training for m in block.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_weights_that_are_not_finite_are_left_to_the_quantizer() -> None:
    block = StackBlock()
    with torch.no_grad():
        block.experts.down_proj[0, 0, 0] = torch.nan
    assert lift(block).report().bytes_lifted > 0
