"""How far a quantized model is from the one it was made of, token by token, without keeping anybody's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mxmoe.evaluate.perplexity import Perplexity
from mxmoe.evaluate.windows import LanguageModel, batches, logits_of, losses, measuring, rows_at_once, token_ids


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantized model beside its reference, on one text."""

    perplexity: float
    """Of the quantized model, per token."""
    reference_perplexity: float
    kl_mean: float
    """Mean over tokens of KL(reference || quantized) = sum_v p_v log(p_v / q_v), in nats."""
    kl_p99: float
    """99th percentile of the same, interpolated linearly between neighbours."""
    top1: float
    """Share of tokens whose likeliest successor is the same."""
    tokens: int
    """Tokens predicted."""

    @property
    def nats_added(self) -> float:
        """The mean loss that quantization adds per token: log of the ratio of the perplexities."""
        return math.log(self.perplexity / self.reference_perplexity)


def compare(
    quantized_model: LanguageModel,
    reference_model: LanguageModel,
    tokens: bytes | Tensor,
    window: int = 512,
    batch: int = 16,
    *,
    progress: bool = False,
) -> Comparison:
    """
    Run two models over a text side by side.

    Windows are those of `perplexity`, and so are the perplexities. Divergences are formed in float32 from each model's
    own logits, batch by batch; what is kept of a token is one number. For one reference and many quantized models,
    `remember` runs the reference once.

    Args:
        quantized_model: called as in `perplexity`.
        reference_model: likewise; both know the same vocabulary.
        tokens: bytes, or token ids [tokens].
        window: inputs per window.
        batch: windows per call.
        progress: draw a progress bar on standard error.

    Raises:
        BadTokens, NonFiniteLogits: as in `perplexity`, for either model.
    """
    ids = token_ids(tokens, window, batch)
    sums = torch.zeros(2, dtype=torch.float64)
    divergences: list[Tensor] = []
    agreed = 0
    with (
        measuring(ids, quantized_model, reference_model) as ids,
        tqdm(total=len(ids) - 1, unit="token", disable=not progress, leave=False) as bar,
    ):
        for part in batches(ids, window, batch):
            reference = logits_of(reference_model, part)
            quantized = logits_of(quantized_model, part)
            sums += torch.stack([losses(one, part).sum() for one in (quantized, reference)]).cpu()
            divergences.append(divergence(reference, quantized).cpu())
            agreed += int((reference.argmax(-1) == quantized.argmax(-1)).sum())
            bar.update(part.targets.numel())
    n, kl = len(ids) - 1, torch.cat(divergences).double()
    ours, theirs = (Perplexity(one / n, n).perplexity for one in sums.tolist())
    return Comparison(ours, theirs, kl.mean().item(), percentile(kl, 0.99), agreed / n, n)


def divergence(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(reference || quantized) in nats of every row of logits [tokens, vocabulary], as [tokens] float32."""
    parts: list[Tensor] = []
    for rows in rows_at_once(reference):
        log_p = reference[rows].float().log_softmax(-1)
        log_q = quantized[rows].float().log_softmax(-1)
        # what has no probability adds nothing, also where the logarithm of it is minus infinity
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        parts.append(terms.sum(-1).clamp(min=0.0))
    return torch.cat(parts)


def percentile(values: Tensor, share: float) -> float:
    """Return the value below which `share` of values [n] lie; `torch.quantile` stops at 2^24 of them."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    high = min(low + 1, len(ordered) - 1)
    return ((1 - part) * ordered[low] + part * ordered[high]).item()
