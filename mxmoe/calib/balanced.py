"""
Calibration sequences that use all experts: chosen from given ones, or written by the model itself.

Expert-balanced self-sampling of MoEQuant (ICML 2025, arXiv 2505.03804, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mxmoe.calib.gradients import next_token_loss
from mxmoe.calib.inputs import Feed
from mxmoe.calib.like import LiftedLike
from mxmoe.calib.observer import evaluating
from mxmoe.calib.usage import UsageMeter
from mxmoe.errors import BadOption

TAU = 1.2
"""The paper's temperature: how little imbalance counts against likelihood; it found 1 to 1.5 alike."""


@dataclass(frozen=True, eq=False)
class Balanced:
    """Some sequences, and how evenly they use the experts."""

    sequences: tuple[Tensor, ...]
    """Token ids [1, tokens] each, or what was given."""
    imbalance: float
    """Standard deviation over the experts of a bank by their mean, averaged over the banks."""
    indices: tuple[int, ...] | None = None
    """Places among the given sequences, in the order of choice; None where the model wrote them."""
    imbalance_of_all: float | None = None
    """Of all given sequences together."""


def select_balanced(
    lifted: LiftedLike, sequences: Sequence[Tensor], count: int, *, tau: float = TAU, quiet: bool = False
) -> Balanced:
    """
    Choose calibration sequences that together use the experts evenly, and are likely under the model.

    One after another, the sequence with the least mean -ln p(token) + sigma / tau is taken, where sigma is the
    imbalance of all that would be taken by then. Sigma is relative to the mean usage, so that tau means the same for
    any number of experts; the paper's is smaller by that number. Hidden states, which have no likelihood, are chosen by
    balance alone. Each sequence runs once.

    Args:
        lifted: what `lift` returned.
        sequences: token ids for a model or hidden states for a block, as `observe` takes them.
        count: how many to choose.
        tau: the larger, the less balance counts; positive.
        quiet: no progress bar.

    Raises:
        BadOption: more are asked for than there are, none, or a tau that is not positive.
        EmptyCalibration, NonFiniteCalibration, BadCalibration: in a sequence.
    """
    if not 0 < count <= len(sequences):
        reason = f"there are {len(sequences)} sequences to choose from"
        raise BadOption(name="select_balanced", option=f"count={count}", reason=reason)
    _check_tau("select_balanced", tau)
    feed, meter = Feed(lifted), UsageMeter(lifted)
    for number, sequence in enumerate(sequences):
        feed.check(sequence, number)
    unlikely, used = torch.zeros(len(sequences), dtype=torch.float64), list[Tensor]()
    with torch.no_grad(), evaluating(lifted.root), meter.hooked():
        for number, sequence in enumerate(tqdm(sequences, desc="measuring usage", disable=quiet, unit="sequence")):
            output = feed.run(sequence)
            used.append(meter.take(1)[0])
            if not feed.is_block and sequence.numel() > 1:
                unlikely[number] = float(next_token_loss(output, sequence)) / (sequence.numel() - 1)
    usage = torch.stack(used)
    taken, total = list[int](), torch.zeros(usage.shape[1], dtype=torch.float64)
    for _ in range(count):
        score = unlikely + meter.imbalance(total + usage) / tau
        score[taken] = torch.inf
        taken.append(int(score.argmin()))
        total += usage[taken[-1]]
    chosen = tuple(sequences[index] for index in taken)
    return Balanced(chosen, float(meter.imbalance(total)), tuple(taken), float(meter.imbalance(usage.sum(0))))


def sample_balanced(
    lifted: LiftedLike,
    count: int = 128,
    length: int = 512,
    *,
    width: int = 4,
    tau: float = TAU,
    seed: int = 0,
    quiet: bool = False,
) -> Balanced:
    """
    Let a model write its own calibration sequences, steered towards experts that were used little.

    Each begins with a random token and grows by beam search; a beam of j tokens with summed log probability r that is
    followed by t scores -(r + ln p(t)) / (j + 1) + sigma / tau, and the `width` lowest live on. Sigma is the imbalance
    of all finished sequences and the beam together, measured once for each beam: usage is carried over from sequence to
    sequence, which the paper leaves open. A model call for each token, with its cache where it has one.

    Args:
        lifted: what `lift` returned for a model.
        count: number of sequences.
        length: tokens of each.
        width: beams.
        tau: as in `select_balanced`.
        seed: of the first tokens.
        quiet: no progress bar.

    Raises:
        BadOption: a number below one, a tau that is not positive, or no model.
    """
    for option, value in (("count", count), ("length", length), ("width", width)):
        if value < 1:
            raise BadOption(name="sample_balanced", option=f"{option}={value}", reason="it is at least 1")
    _check_tau("sample_balanced", tau)
    feed, meter = Feed(lifted), UsageMeter(lifted)
    if feed.is_block or feed.vocabulary is None:
        raise BadOption(name="sample_balanced", option="this module", reason="only a model with embeddings writes text")
    first = torch.randint(feed.vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    total, written = torch.zeros(sum(meter.sizes), dtype=torch.float64), list[Tensor]()
    with torch.no_grad(), evaluating(lifted.root), meter.hooked():
        for token in tqdm(first, desc="writing", disable=quiet, unit="sequence"):
            beams = _Beams(lifted, feed, meter, token)
            for _ in range(length - 1):
                beams.grow(total, width, tau)
            tokens, used = beams.best(total, tau)
            written.append(tokens[None].cpu())
            total += used
    return Balanced(tuple(written), float(meter.imbalance(total)))


def _check_tau(name: str, tau: float) -> None:
    if not tau > 0:
        raise BadOption(name=name, option=f"tau={tau}", reason="it is positive")


class _Beams:
    """Partial sequences of one length."""

    def __init__(self, lifted: LiftedLike, feed: Feed, meter: UsageMeter, token: int) -> None:
        self.root: Any = lifted.root
        self.meter = meter
        self.tokens = torch.tensor([[token]], device=feed.device)
        self.summed = torch.zeros(1, dtype=torch.float64)
        self.usage = torch.zeros((1, sum(meter.sizes)), dtype=torch.float64)
        self.cache: Any = None
        self._run()

    def grow(self, total: Tensor, width: int, tau: float) -> None:
        """Add the tokens that score best."""
        chances = self.logits.double().log_softmax(-1).cpu()
        sums = self.summed[:, None] + chances
        score = self._score(sums, total, tau, self.tokens.shape[1] + 1)
        best = score.flatten().topk(min(width, score.numel()), largest=False).indices
        parent, token = best // chances.shape[1], best % chances.shape[1]
        there = self.tokens.device
        self.tokens = torch.cat([self.tokens[parent.to(there)], token.to(there)[:, None]], dim=1)
        self.summed, self.usage = sums.flatten()[best], self.usage[parent]
        if self.cache is not None:
            self.cache.reorder_cache(parent.to(there))
        self._run()

    def best(self, total: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """Give the best beam's tokens and usage."""
        index = int(self._score(self.summed[:, None], total, tau, self.tokens.shape[1])[:, 0].argmin())
        return self.tokens[index], self.usage[index]

    def _score(self, sums: Tensor, total: Tensor, tau: float, length: int) -> Tensor:
        return -sums / length + self.meter.imbalance(total + self.usage)[:, None] / tau

    def _run(self) -> None:
        """Run what is new, and count whom it used."""
        if self.meter.batches_alone:
            calls = [(self.root(input_ids=row[None]).logits[:, -1], self.meter.take(1)) for row in self.tokens]
            self.logits, self.usage = (torch.cat(parts) for parts in zip(*calls, strict=True))
            return
        cached = self.cache is not None
        new = self.tokens[:, -1:] if cached else self.tokens
        # the argument's name in some releases of transformers is `cache`
        name = "cache" if "cache" in signature(self.root.forward).parameters else "past_key_values"
        out = self.root(input_ids=new, use_cache=True, **{name: self.cache})
        cache = getattr(out, name, None)
        self.cache = cache if hasattr(cache, "reorder_cache") else None
        used = self.meter.take(len(self.tokens))
        self.usage, self.logits = (self.usage + used if cached else used), out.logits[:, -1]
