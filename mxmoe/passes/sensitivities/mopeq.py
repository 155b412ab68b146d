"""`mopeq`: experts by the trace of a Hessian that knows their weights only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxmoe.passes.sensitivities.base import ByScore, Floats, SeenBank, check_word, with_shared

_ROUNDS = 100


@dataclass(frozen=True)
class Mopeq(ByScore):
    """
    An expert's score is the sum over its matrices of the mean curvature of ||W||_F, nearly 1 / ||W||_F.

    MoPEQ (arXiv 2509.02512) samples the trace of the Hessian (`form=hutchinson`, needs the fact `trace`); its
    expectation is (N - 1) / (N ||W||_F) for N elements, and `form=closed` takes that. `scope=layer` divides by the sum
    over the block. Shared experts, which the paper does not allocate, score as the highest of their block.

    The method's own form (`clusters=true`) has no budget: one-dimensional k-means over the scores of the routed
    experts, all or block by block, as many clusters as there are widths, the lowest scores to the narrowest. Each
    expert is then left one possible scheme (the one with fewest bits of its width); shared experts get the widest.
    Solve with `allocate-bits{weight-bits=none r=1}`.
    """

    name = "mopeq"
    form: str = "closed"
    """closed or hutchinson."""
    scope: str = "model"
    """model or layer."""
    clusters: bool = False
    """Let k-means decide in place of the budget."""

    def __post_init__(self) -> None:
        check_word(self, "form", ("closed", "hutchinson"))
        check_word(self, "scope", ("model", "layer"))

    @property
    def needs_facts(self) -> tuple[str, ...]:
        """The norm, or the sampled trace."""
        return ("norm",) if self.form == "closed" else ("trace",)

    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Add up the matrices of each expert."""
        routed = {
            bank.block: np.sum([self._trace(bank, role) for role in bank.roles], axis=0)
            for bank in banks
            if bank.name == "routed"
        }
        if self.scope == "layer":
            routed = {block: score / (score.sum() or 1.0) for block, score in routed.items()}
        return with_shared(banks, routed)

    def _trace(self, bank: SeenBank, role: str) -> Floats:
        """Mean curvature; 0 of a matrix of zeros, which every scheme holds exactly."""
        if self.form == "hutchinson":
            return np.nan_to_num(bank.fact("trace", role), nan=0.0)
        size, norm = bank.numel(role), bank.fact("norm", role)
        return np.divide((size - 1) / size, norm, out=np.zeros_like(norm), where=norm > 0)

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Weigh the schemes' distortion by the scores, or leave each expert its cluster's scheme."""
        return self._clustered(banks) if self.clusters else super().losses(banks)

    def _clustered(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        scores = dict(zip(((bank.block, bank.name) for bank in banks), self.scores(banks), strict=True))
        routed = [bank for bank in banks if bank.name == "routed"]
        scopes = [routed] if self.scope == "model" else [[bank] for bank in routed]
        level: dict[tuple[str, str], NDArray[np.int64]] = {}
        for held in scopes:
            if held:
                joined = clusters_of(np.concatenate([scores[b.block, b.name] for b in held]), len(_widths(held[0])))
                parts = np.split(joined, np.cumsum([bank.experts for bank in held])[:-1])
                level |= {(b.block, b.name): part for b, part in zip(held, parts, strict=True)}
        return [_only(bank, level.get((bank.block, bank.name))) for bank in banks]


def clusters_of(values: Floats, k: int) -> NDArray[np.int64]:
    """
    Sort values [n] into k clusters by k-means, and number the clusters by their centres, lowest first.

    Centres begin at the quantiles; a cluster that becomes empty stays so.
    """
    centres = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(_ROUNDS):
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        moved = np.array([values[nearest == i].mean() if (nearest == i).any() else centres[i] for i in range(k)])
        if (moved == centres).all():
            break
        centres = moved
    order = np.argsort(np.argsort(centres, kind="stable"), kind="stable")
    return order[np.abs(values[:, None] - centres).argmin(axis=1)]


def _widths(bank: SeenBank) -> list[int]:
    return sorted({scheme.weight_bits for scheme in bank.schemes})


def _only(bank: SeenBank, level: NDArray[np.int64] | None) -> Mapping[str, Floats]:
    """Leave each expert the cheapest scheme of its width."""
    widths = _widths(bank)
    wanted = np.full(bank.experts, len(widths) - 1) if level is None else level
    found: dict[str, Floats] = {}
    for role in bank.roles:
        k = bank.sizes[role][1]
        table = np.full((bank.experts, len(bank.schemes)), np.inf)
        for expert, which in enumerate(wanted.tolist()):
            fitting = [i for i, scheme in enumerate(bank.schemes) if scheme.weight_bits == widths[which]]
            table[expert, min(fitting, key=lambda i: bank.schemes[i].effective_bits(k))] = 0.0
        found[role] = table
    return found
