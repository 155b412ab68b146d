"""Workloads of a GPU's measurements: products, plans, seeded routings, and turns that find no weight in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mxmoe.backends.triton.tiles import Gemm
from mxmoe.ir import Scheme

SEED = 1234
CACHE = 300e6
"""Bytes of weights that a round of launches reads at least: several times the second-level cache."""
MOST_TURNS = 16
FIELDS = ("n", "k", "gated", "experts", "top_k", "tokens", "plan", "config", "time_us", "status")


@dataclass(frozen=True)
class Workload:
    """One product of a block of experts."""

    n: int
    """Output channels, of each of two matrices where it is gated."""
    k: int
    gated: bool
    experts: int
    top_k: int

    def gemm(self, plan: str) -> Gemm:
        """The GEMM with every expert's scheme."""
        return Gemm(self.n, self.k, schemes_of(plan, self.experts), self.gated)

    def active(self, tokens: int) -> int:
        """Experts that have rows, if tokens spread evenly."""
        return min(self.experts, tokens * self.top_k)


@dataclass(frozen=True)
class Job:
    """One launch to time."""

    workload: Workload
    tokens: int
    plan: str
    """A scheme; or `SEED:scheme+scheme`, random experts in random shares of these."""
    config: str
    """See `mxmoe.backends.triton.tuned.spell_config`."""

    @property
    def key(self) -> tuple[str, ...]:
        """First fields of a row of a file of measurements."""
        one = self.workload
        return tuple(
            map(str, (one.n, one.k, int(one.gated), one.experts, one.top_k, self.tokens, self.plan, self.config))
        )

    @classmethod
    def of_row(cls, row: dict[str, str]) -> Job:
        """Read a row back."""
        n, k, gated, experts, top_k, tokens = (int(row[name]) for name in FIELDS[:6])
        return cls(Workload(n, k, bool(gated), experts, top_k), tokens, row["plan"], row["config"])


def schemes_of(plan: str, experts: int) -> tuple[Scheme, ...]:
    """Give every expert its scheme; equal plans give equal schemes."""
    seed, _, names = plan.rpartition(":")
    known = [Scheme.parse(name) for name in names.split("+")]
    if not seed:
        return (known[0],) * experts
    rng = np.random.default_rng(int(seed))
    drawn = rng.choice(len(known), size=experts, p=rng.dirichlet(np.ones(len(known))))
    return tuple(known[i] for i in drawn.tolist())


@lru_cache(maxsize=64)
def routing(experts: int, top_k: int, tokens: int, seed: int = SEED) -> NDArray[np.int64]:
    """
    Draw expert ids [tokens, top_k] without replacement, the same in every run.

    An expert's probability is in proportion to 1 / (rank + 3), its rank being drawn, too.
    """
    weight = 1.0 / (np.random.default_rng(seed).permutation(experts) + 3.0)
    noise = np.random.default_rng(seed + 7919 * tokens).gumbel(size=(tokens, experts))
    keys = np.log(weight / weight.sum())[None, :] + noise
    return np.argsort(-keys, axis=1, kind="stable")[:, :top_k].astype(np.int64)


def rows_of(job: Job) -> tuple[int, ...]:
    """Rows of each expert."""
    one = job.workload
    return tuple(np.bincount(routing(one.experts, one.top_k, job.tokens).ravel(), minlength=one.experts).tolist())


def weight_bytes(gemm: Gemm, active: Iterable[int]) -> float:
    """Bytes of the weights of some experts."""
    return sum((1 + gemm.gated) * gemm.n * gemm.k * gemm.schemes[i].effective_bits(gemm.k) / 8 for i in active)


def turns_of(job: Job) -> list[tuple[int, NDArray[np.int64]]]:
    """(copy of the weights, ids) of each launch of a round, such that the round reads `CACHE` bytes or more."""
    one, gemm = job.workload, job.workload.gemm(job.plan)
    ids = routing(one.experts, one.top_k, job.tokens)
    active = np.unique(ids)
    wanted = min(MOST_TURNS, max(2, math.ceil(CACHE / weight_bytes(gemm, active.tolist()))))
    if len(gemm.distinct) > 1:  # relabelled experts would have other schemes
        return [(turn, ids) for turn in range(wanted)]
    labels = np.concatenate([active, np.setdiff1d(np.arange(one.experts), active)])
    place = np.argsort(labels)
    each = max(1, one.experts // len(active))
    return [(turn // each, labels[(place[ids] + (turn % each) * len(active)) % one.experts]) for turn in range(wanted)]
