"""The loss that a model is differentiated by, where errors are to be weighed by what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxmoe.calib.collect import BlockCollector
from mxmoe.calib.probe import first_tensor
from mxmoe.errors import BadOption

Loss = Callable[[Any, Any], Tensor]
"""(what the module gave, the batch) -> a number to differentiate, summed over tokens."""


def next_token_loss(output: Any, batch: Any) -> Tensor:  # noqa: ANN401  # whatever models give and take
    """
    Sum over tokens of -ln p(next token), in float32; of a mapping, tokens whose attention mask is 0 are left out.

    A sum and not a mean, so that gradients do not depend on how many tokens a batch has.

    Raises:
        BadOption: the output has no logits, or the batch no ids.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    logits = first_tensor(getattr(output, "logits", output))
    if not isinstance(ids, Tensor) or ids.is_floating_point() or logits is None or logits.dim() != 3:
        reason = "what ran gives no logits for token ids; pass a function (output, batch) -> loss"
        raise BadOption(name="observe", option="gradients=True", reason=reason)
    ids = ids.reshape(logits.shape[:2]).to(logits.device)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None:
        ids = ids.masked_fill(mask.reshape(ids.shape).to(ids.device) == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def differentiate(loss: Tensor, collectors: Sequence[BlockCollector]) -> None:
    """
    Give every held record the gradient of the loss by what its bank gave.

    Raises:
        BadOption: the loss is no number, or depends on no bank.
    """
    outputs = [output for collector in collectors for output in collector.outputs()]
    if loss.numel() != 1 or not loss.requires_grad:
        reason = "the loss must be one number that depends on the blocks' outputs"
        raise BadOption(name="observe", option="gradients", reason=reason)
    found = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    with torch.no_grad():
        for collector in collectors:
            collector.release([next(found) for _ in collector.outputs()])


@contextmanager
def frozen(module: nn.Module) -> Generator[None]:
    """Have parameters take no gradient, so that a backward pass keeps and computes those of activations alone."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires in wanted.items():
            parameter.requires_grad_(requires)
