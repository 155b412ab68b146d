"""A text in disjoint windows, and a model that is asked about them: what every measure of a model has in common."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxmoe.errors import BadTokens, NonFiniteLogits

LanguageModel = Callable[..., Any]
"""Called with `input_ids` [batch, window] int64; returns logits [batch, window, vocabulary], or an object that holds
them as `.logits`."""

_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows that are asked about in one call."""

    position: int
    """Of the first token in the text."""
    inputs: Tensor
    """[windows, tokens] int64."""
    targets: Tensor
    """[windows, tokens] int64: the token that follows each."""


def token_ids(text: bytes | Tensor, window: int, batch: int) -> Tensor:
    """
    Check a text and return its token ids, [tokens] int64.

    Raises:
        BadTokens: fewer than two tokens, no integers, more than one dimension; a window or batch below 1.
    """
    if window < 1 or batch < 1:
        raise BadTokens(reason=f"window is {window} and batch is {batch}, both start at 1")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8) if isinstance(text, bytes) and text else text
    if not isinstance(ids, Tensor):
        raise BadTokens(reason="the text is empty")
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise BadTokens(reason=f"token ids have shape {list(ids.shape)} and dtype {ids.dtype}, not one row of integers")
    if len(ids) < 2:
        raise BadTokens(reason=f"{len(ids)} tokens leave nothing to predict")
    return ids.long()


def batches(ids: Tensor, window: int, batch: int) -> Iterator[Batch]:
    """Cut ids [tokens] into disjoint windows, `batch` of them at a time; a shorter last window comes alone."""
    whole = (len(ids) - 1) // window * window
    inputs, targets = ids[:whole].view(-1, window), ids[1 : whole + 1].view(-1, window)
    for i in range(0, len(inputs), batch):
        yield Batch(i * window, inputs[i : i + batch], targets[i : i + batch])
    if whole < len(ids) - 1:
        yield Batch(whole, ids[None, whole:-1], ids[None, whole + 1 :])


@contextmanager
def measuring(ids: Tensor, *models: LanguageModel) -> Generator[Tensor]:
    """
    Put models into evaluation mode for the time of a block, and give the ids where the first keeps its parameters.

    Raises:
        BadTokens: a token that a model does not know.
    """
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, torch.nn.Module):
                # an embedding answers an unknown id with an IndexError that names nothing
                check_vocabulary(ids, getattr(getattr(model, "config", None), "vocab_size", None))
                stack.callback(model.train, model.training)
                model.eval()
        stack.enter_context(torch.inference_mode())
        modules = (model for model in models if isinstance(model, torch.nn.Module))
        yield ids.to(next((p.device for module in modules for p in module.parameters()), ids.device))


def check_vocabulary(ids: Tensor, size: int | None) -> None:
    """Raise BadTokens where an id is outside a vocabulary of known size."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise BadTokens(reason=f"ids reach from {low} to {high} and the model knows {size} tokens")


def logits_of(model: LanguageModel, batch: Batch) -> Tensor:
    """
    Ask a model about a batch and return its logits, [tokens, vocabulary] in the model's own dtype.

    Raises:
        BadTokens: a target outside the vocabulary that it answers with.
    """
    output = model(input_ids=batch.inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    check_vocabulary(batch.targets, logits.shape[-1])
    return logits.flatten(0, 1)


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """
    Return the negative log-likelihood of every target in nats, [tokens] float64; formed in float32.

    Raises:
        NonFiniteLogits: one that is NaN or infinite; the message says where.
    """
    targets = batch.targets.flatten()
    parts = [F.cross_entropy(logits[r].float(), targets[r], reduction="none") for r in rows_at_once(logits)]
    each = torch.cat(parts).double()
    if not torch.isfinite(each).all():
        where = int((~torch.isfinite(each)).nonzero()[0])
        raise NonFiniteLogits(position=batch.position + where + 1, value=each[where].item())
    return each


def rows_at_once(logits: Tensor) -> Iterator[slice]:
    """Cut the rows of logits [tokens, vocabulary] so that a part of them is small in float32: 128 MiB, or one row."""
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    return (slice(i, i + rows) for i in range(0, len(logits), rows))
