"""Perplexity over disjoint windows: every token but the first is predicted exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mxmoe.errors import BadTokens, NonFiniteLogits


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How surprised a model is by a text."""

    nats_per_token: float
    """Mean negative log-likelihood, natural logarithm."""
    tokens: int
    """Tokens predicted: those of the text but the first."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; `inf` where that is above the largest float."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood, binary logarithm."""
        return self.nats_per_token / math.log(2)


def perplexity(
    model: Callable[..., Any],
    text: bytes | Tensor,
    *,
    window: int = 512,
    batch: int = 16,
    progress: bool = False,
) -> Perplexity:
    """
    Measure the perplexity of a causal language model on a text.

    The text is cut into disjoint windows of `window` inputs; the last may be shorter. Each window predicts the tokens
    that follow its own, so a text of n tokens yields n - 1 predictions, and the first of a window sees one token only:
    a larger window gives a lower figure. Losses are formed in float32 and summed in float64, so that neither the batch
    nor the order of the sums shows.

    Args:
        model: called with `input_ids` [batch, window] int64; returns logits [batch, window, vocabulary], or an object
            that holds them as `.logits`. A module is put into evaluation mode for the time of the call.
        text: bytes, one token each, or token ids [tokens] of an integer dtype.
        window: inputs per window, in tokens.
        batch: windows per call.
        progress: draw a progress bar on standard error.

    Returns:
        The mean over all predictions. Example: uniform logits over 256 bytes give perplexity 256.

    Raises:
        BadTokens: fewer than two tokens, no integers, more than one dimension, a token outside the vocabulary.
        NonFiniteLogits: a logit that is NaN, or an infinite loss; the message says where.
    """
    ids = _token_ids(text, window, batch)
    training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        # an embedding answers an unknown id with an IndexError that names nothing
        _check_vocabulary(ids, getattr(getattr(model, "config", None), "vocab_size", None))
        model.eval()
        ids = ids.to(next((p.device for p in model.parameters()), ids.device))
    total = 0.0
    try:
        with torch.inference_mode(), tqdm(total=len(ids) - 1, unit="token", disable=not progress, leave=False) as bar:
            for start, inputs, targets in _batches(ids, window, batch):
                total += _loss(model, inputs, targets, start)
                bar.update(targets.numel())
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    return Perplexity(total / (len(ids) - 1), len(ids) - 1)


def _token_ids(text: bytes | Tensor, window: int, batch: int) -> Tensor:
    """Check the text and return its token ids, [tokens] int64."""
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


def _check_vocabulary(ids: Tensor, size: int | None) -> None:
    """Raise where an id is outside a vocabulary of known size."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise BadTokens(reason=f"ids reach from {low} to {high} and the model knows {size} tokens")


def _batches(ids: Tensor, window: int, batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first position, inputs, targets [windows, tokens]); a shorter last window comes alone."""
    whole = (len(ids) - 1) // window * window
    inputs, targets = ids[:whole].view(-1, window), ids[1 : whole + 1].view(-1, window)
    for i in range(0, len(inputs), batch):
        yield i * window, inputs[i : i + batch], targets[i : i + batch]
    if whole < len(ids) - 1:
        yield whole, ids[None, whole:-1], ids[None, whole + 1 :]


def _loss(model: Callable[..., Any], inputs: Tensor, targets: Tensor, start: int) -> float:
    """Sum the losses of a batch in float64."""
    output = model(input_ids=inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    vocabulary = logits.shape[-1]
    _check_vocabulary(targets, vocabulary)
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").double()
    if not torch.isfinite(each).all():
        where = int((~torch.isfinite(each)).nonzero()[0])
        raise NonFiniteLogits(position=start + where + 1, value=each[where].item())
    return each.sum().item()
