"""Perplexity over disjoint windows: every token but the first is predicted exactly once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from mxmoe.evaluate.windows import LanguageModel, batches, logits_of, losses, measuring, token_ids


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
    model: LanguageModel,
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
    ids = token_ids(text, window, batch)
    total = 0.0
    with measuring(ids, model) as ids, tqdm(total=len(ids) - 1, unit="token", disable=not progress, leave=False) as bar:
        for part in batches(ids, window, batch):
            total += losses(logits_of(model, part), part).sum().item()
            bar.update(part.targets.numel())
    return Perplexity(total / (len(ids) - 1), len(ids) - 1)
