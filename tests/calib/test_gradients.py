"""Errors as the loss sees them: equal to the plain ones where the gradient is one, and a forecast of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import Stats, next_token_loss, observe
from mxmoe.errors import BadOption, StatsMismatch
from mxmoe.frontend import lift
from mxmoe.quant import dequantize, quantize

from .test_observer import ROLES, config, randomized
from .test_probe import EXPERTS, MLP, Block, SharedStack, Stack, seeded, tokens

SCHEME = "w3a16_g8_sym"


def total(output: Any, batch: object) -> Tensor:  # noqa: ANN401  # whatever a block gives
    """A loss whose gradient by the block's output is one everywhere."""
    del batch
    return (output if isinstance(output, Tensor) else output[0]).sum()


@pytest.mark.parametrize("shared", [None, MLP, SharedStack])
@pytest.mark.parametrize(
    "experts", [Stack, lambda: Stack(norm=True), lambda: nn.ModuleList(MLP() for _ in range(EXPERTS))]
)
def test_unit_gradients_give_the_plain_errors(experts: Any, shared: Any) -> None:  # noqa: ANN401  # makers
    block = seeded(Block(experts(), shared=None if shared is None else shared()))
    stats = observe(lift(block), list(tokens().split(25)), schemes=[SCHEME], gradients=total, quiet=True)
    for sums in stats.banks.values():
        for role, error in sums.squared_error.items():
            np.testing.assert_allclose(sums.fisher_error[role], error, rtol=1e-4)


def test_a_projection_behind_the_experts_needs_no_special_case() -> None:
    """The gradient is taken by what the bank itself gives, so it knows what the block does with it."""
    block = seeded(Block(Stack(), behind="project"))
    stats = observe(lift(block), tokens(), schemes=[SCHEME], gradients=total, quiet=True)
    column = block.project.weight.detach().sum(0)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        weights, index = block.gate(tokens()).softmax(-1).topk(2, dim=-1)  # type: ignore[operator]
        changed = seeded(Block(Stack(), behind="project")).experts
        down: Tensor = changed.down_proj  # type: ignore[assignment,union-attr]
        down[1] = dequantize(quantize(down[1], stats.schemes[0]))
        change = changed(tokens(), index, weights) - block.experts(tokens(), index, weights)  # type: ignore[operator]
        want = float((change * column).square().sum())
    # the activations' cast to bf16 is in the one and not in the other
    assert stats.bank("moe", "routed").fisher_error["down"][1, 0] == pytest.approx(want, rel=0.03)


def test_a_model_is_differentiated_at_every_block() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(2))
    lifted = lift(model)
    stats = observe(lifted, ids, schemes=[SCHEME], gradients=True, min_tokens=0, quiet=True)
    slopes: dict[str, Tensor] = {}
    handles = [
        block.block.register_forward_hook(lambda _, __, out, name=block.name: out.register_hook(
            lambda slope: slopes.__setitem__(name, slope)) and None)
        for block in lifted.blocks
    ]  # fmt: skip
    next_token_loss(model(input_ids=ids), ids).backward()
    for handle in handles:
        handle.remove()
    seen: dict[str, Tensor] = {}
    for block in lifted.blocks:
        block.block.register_forward_hook(lambda _, args, __, name=block.name: seen.update({name: args[0].detach()}))
    model(input_ids=ids)
    for block in lifted.blocks:
        weighed: Any = lambda out, _, name=block.name: (out * slopes[name]).sum()  # noqa: E731
        alone = observe(
            lift(block.block), [seen[block.name]], schemes=[SCHEME], gradients=weighed, min_tokens=0, quiet=True
        )
        for bank in ("routed", "shared"):
            for role in ROLES:
                got = stats.bank(block.name, bank).fisher_error[role]
                np.testing.assert_allclose(got, alone.bank("moe", bank).fisher_error[role], rtol=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [p.grad is not None for p in lifted.blocks[0].block.parameters()]


def test_neither_batches_nor_bounds_matter() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(3))
    given = {"schemes": [SCHEME], "gradients": True, "quiet": True, "min_tokens": 0}
    whole = observe(lift(model), ids, **given)  # type: ignore[arg-type]
    split = observe(lift(model), list(ids), max_buffer_mb=0.01, max_rows=7, **given)  # type: ignore[arg-type]
    for key, sums in whole.banks.items():
        for role in ROLES:
            np.testing.assert_allclose(sums.fisher_error[role], split.banks[key].fisher_error[role], rtol=1e-3)
            np.testing.assert_allclose(sums.squared_error[role], split.banks[key].squared_error[role], rtol=1e-3)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = observe(lift(model), [masked], **given)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        again.banks["model.layers.0.mlp", "routed"].fisher_error["up"],
        whole.banks["model.layers.0.mlp", "routed"].fisher_error["up"],
        rtol=1e-3,
    )


def test_the_model_computes_with_gradients_what_it_computes_without() -> None:
    model = randomized(Qwen2MoeForCausalLM(config()))
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(4))
    plain = observe(lift(model), ids, schemes=[SCHEME], min_tokens=0, quiet=True)
    graded = observe(lift(model), ids, schemes=[SCHEME], gradients=True, min_tokens=0, quiet=True)
    for key, sums in plain.banks.items():
        assert not sums.fisher_error
        for role in ROLES:
            np.testing.assert_allclose(graded.banks[key].squared_error[role], sums.squared_error[role], rtol=1e-5)
    with pytest.raises(StatsMismatch, match="gradients"):
        plain.merge(graded)
    both = graded.merge(graded)
    np.testing.assert_allclose(
        both.banks["model.layers.1.mlp", "shared"].fisher_error["up"],
        2 * graded.banks["model.layers.1.mlp", "shared"].fisher_error["up"],
    )


def test_the_loss_is_the_sum_over_tokens_that_count() -> None:
    logits = torch.randn((2, 5, 7), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))
    want = -sum(logits[i, t].log_softmax(-1)[ids[i, t + 1]] for i in range(2) for t in range(4))
    torch.testing.assert_close(next_token_loss((logits,), ids), want)
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0
    left = -sum(logits[0, t].log_softmax(-1)[ids[0, t + 1]] for t in range(4)) - logits[1, 0].log_softmax(-1)[ids[1, 1]]
    torch.testing.assert_close(next_token_loss((logits,), {"input_ids": ids, "attention_mask": mask}), left)


def test_what_has_no_loss_is_refused() -> None:
    block = randomized(Qwen2MoeSparseMoeBlock(config()))
    x = torch.zeros(4, 32)
    with pytest.raises(BadOption, match="pass a function"):
        observe(lift(block), x, schemes=[SCHEME], gradients=True, quiet=True)
    with pytest.raises(BadOption, match="experts alone"):
        observe(lift(block.experts, top_k=2), x, schemes=[SCHEME], gradients=True, quiet=True)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="one number"):
        observe(lift(block), x, schemes=[SCHEME], gradients=lambda out, _: out, quiet=True)
    with pytest.raises(BadOption, match="logits"):
        next_token_loss(torch.zeros(3), torch.zeros(3))
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert isinstance(observe(lift(block), x + 1, schemes=[SCHEME], quiet=True), Stats)
