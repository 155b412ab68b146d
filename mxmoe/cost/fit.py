"""
From measured launches to a profile: the times of tiles, and the law that adds them up.

A launch of experts e with r rows each takes

    launch + ((sum of tiles / SMs)^p + (longest tile by itself)^p)^(1/p)

and a tile of height m over k input channels `fixed + (max(reuse[m], stream / row tiles) - fixed) k / depth`: every
weight comes from memory once. By itself a tile takes `alone` times as long. A scheme has one `stream` and one `alone`,
a `reuse` for each height, and two factors for each kind of company. What the law then misses at the launches of one
scheme is kept beside it, and others are corrected by the nearest. What is minimised is the mean of
|log(predicted / measured)|, rounded at zero, by a search along one coordinate after the other: the heights that an
expert is cut into depend on the times, so that there is no gradient to follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mxmoe.cost.measured import LOW, Company, Factors, Law, Near, Profile, TileTime
from mxmoe.cost.roofline import Roofline
from mxmoe.device import Device
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

DEPTH = 2048
HEIGHTS = (16, 32, 64, 128)
WIDTH, STEP = 128, 128
ROUNDS = 120
_NEAR = 0.02
"""Relative error from which on errors count in proportion."""
_PULL = 0.002
_LEAST = 1e-3
"""Relative step below which a coordinate rests."""
_STREAM, _ALONE, _REUSE, _FACTORS = 0, 1, slice(2, 2 + len(HEIGHTS)), slice(2 + len(HEIGHTS), 6 + len(HEIGHTS))
_NAMES = ("launch_us", "fixed_us", "sharp")
_START = (3.0, 0.3, 2.0)
_MOST = (20.0, 3.0, 40.0)


@dataclass(frozen=True)
class Observation:
    """One measured launch of one product."""

    n: int
    """Output channels of all matrices that share the rows: gate and up count twice."""
    k: int
    load: Mapping[Scheme, Mapping[int, int]]
    """Scheme -> rows of an expert -> how many experts have so many; only those with rows."""
    time_us: float


@dataclass
class _Share:
    """What one scheme adds to every launch that has it."""

    scheme: Scheme
    at: NDArray[np.int64]
    """Which launches, [mine]."""
    rows: NDArray[np.float64]
    """[mine, rows that occur], 0 beyond the last."""
    experts: NDArray[np.float64]
    columns: NDArray[np.float64]
    """Tiles side by side, [mine, 1]."""
    depth: NDArray[np.float64]
    """Input channels over those of the profile, [mine, 1]."""
    company: NDArray[np.int64]
    """`Company`, [mine, 1]."""
    logs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Logarithms of stream, alone, reuse by height, and the factors in company."""

    @classmethod
    def of(cls, scheme: Scheme, observed: Sequence[Observation]) -> _Share:
        """Gather the launches that a scheme is in."""
        at = [i for i, one in enumerate(observed) if scheme in one.load]
        most = max(len(observed[i].load[scheme]) for i in at)
        rows, experts = np.zeros((len(at), most)), np.zeros((len(at), most))
        for line, i in enumerate(at):
            load = observed[i].load[scheme]
            rows[line, : len(load)], experts[line, : len(load)] = list(load), list(load.values())
        columns = np.array([[math.ceil(observed[i].n / WIDTH)] for i in at], dtype=np.float64)
        depth = np.array([[observed[i].k / DEPTH] for i in at])
        company = np.array([[Company.of(observed[i].load)] for i in at])
        return cls(scheme, np.array(at), rows, experts, columns, depth, company)

    def add(self, fixed: float, sms: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Microseconds that its tiles take of all SMs, and of its longest tile by itself, [mine] each."""
        values = np.exp(self.logs)
        best = np.full(self.rows.shape, np.inf)
        longest = np.zeros(self.rows.shape)
        for height, reuse in zip(HEIGHTS, values[_REUSE], strict=True):
            bands = np.ceil(self.rows / height)
            stream = max(values[_STREAM], reuse) / np.maximum(bands, 1)
            company = np.array([1.0, *values[_FACTORS][height > LOW :: 2]])[self.company]
            us = fixed + np.maximum(company * np.maximum(reuse, stream) - fixed, 0) * self.depth
            whole = np.round(bands * self.columns * us / sms, 9)
            longest = np.where((whole < best) & (bands > 0), us, longest)
            best = np.minimum(best, whole)
        return (best * self.experts).sum(1), values[_ALONE] * longest.max(1)


class _Fit:
    """The parameters, and what each scheme adds with them."""

    def __init__(self, observed: Sequence[Observation], device: Device) -> None:
        self.observed = observed
        self.time = np.log([one.time_us for one in observed])
        self.missed = np.zeros(len(observed))
        self.sms = device.sms
        self.globals = np.log(_START)
        schemes = sorted({scheme for one in observed for scheme in one.load})
        self.shares = [_Share.of(scheme, observed) for scheme in schemes]
        for share in self.shares:
            share.logs = np.log(_first_guess(share.scheme, device))
        self.parts = [self._part(share) for share in self.shares]

    def _part(self, share: _Share) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return share.add(float(np.exp(self.globals[1])), self.sms)

    def loss(self) -> float:
        """Mean of the errors, and what pulls the factors in company to 1."""
        pull = sum(float(np.abs(share.logs[_FACTORS]).sum()) for share in self.shares)
        return float(np.sqrt(self.errors() ** 2 + _NEAR**2).mean()) + _PULL * pull

    def errors(self) -> NDArray[np.float64]:
        """Logarithm of predicted over measured time [launch]."""
        busy, longest = np.zeros(len(self.time)), np.zeros(len(self.time))
        for share, (mine, tile) in zip(self.shares, self.parts, strict=True):
            busy[share.at] += mine
            longest[share.at] = np.maximum(longest[share.at], tile)
        values = np.exp(np.minimum(self.globals, np.log(_MOST)))
        law = Law(float(values[0]), float(values[2]))
        return np.log(law.launch(busy, longest)) + self.missed - self.time

    def near(self) -> tuple[Near, ...]:
        """
        What the law misses at every launch of one scheme.

        Of one product, more rows for no fewer experts cannot take less time: where a measurement says so, it is noise,
        and launches are taken to have lasted equally long.
        """
        law, found = self.errors() + self.time, list[Near]()
        products: dict[tuple[Scheme, int, int], list[int]] = {}
        for at, one in enumerate(self.observed):
            if len(one.load) == 1:
                products.setdefault((next(iter(one.load)), one.n, one.k), []).append(at)
        for (scheme, _, _), places in products.items():
            order = sorted(places, key=lambda at: _size(self.observed[at]))
            for at, time in zip(order, rising(self.time[order].tolist()), strict=True):
                found.append(Near(scheme, *_shape(self.observed[at]), _short(math.exp(time - law[at]))))
        return tuple(found)

    def take(self, near: tuple[Near, ...]) -> None:
        """Have all launches corrected by what the law misses nearby, each scheme by its share of the work."""
        law, weights = Law(1.0, 1.0, near=near), np.zeros((len(self.shares), len(self.time)))
        for weight, share, (mine, _) in zip(weights, self.shares, self.parts, strict=True):
            weight[share.at] = mine
        logs = np.zeros_like(weights)
        for line, share in zip(logs, self.shares, strict=True):
            line[share.at] = [math.log(law.factor(share.scheme, *_shape(self.observed[i]))) for i in share.at]
        self.missed = (weights * logs).sum(0) / weights.sum(0)

    def try_global(self, at: int, step: float) -> float:
        """Loss with one global number changed; the change stays."""
        self.globals[at] += step
        if at == 1:
            self.parts = [self._part(share) for share in self.shares]
        return self.loss()

    def try_scheme(self, which: int, at: int, step: float) -> float:
        """Loss with one number of a scheme changed; the change stays."""
        self.shares[which].logs[at] += step
        self.parts[which] = self._part(self.shares[which])
        return self.loss()


def _first_guess(scheme: Scheme, device: Device) -> list[float]:
    """Stream, alone, reuse by height, and the factors, by the roofline."""
    roofline = Roofline(device)
    tiles = [Tile(height, WIDTH, STEP) for height in HEIGHTS]
    reuse = [roofline.tile_us(scheme, tile, DEPTH, 1e6) for tile in tiles]
    return [roofline.tile_us(scheme, tiles[0], DEPTH), 1.0, *reuse, *(1.0,) * 4]


def fit_profile(
    observed: Sequence[Observation], device: Device, *, rounds: int = ROUNDS, quiet: bool = False
) -> Profile:
    """
    Fit a profile to measured launches.

    Args:
        observed: launches of one scheme and of mixes; a scheme in mixes only cannot be told from its company.
        device: whose roofline the search starts at.
        rounds: most rounds over all coordinates.
        quiet: no progress bar.

    Raises:
        BadWorkload: nothing was measured, a time is not positive, or the device cannot run a scheme.
    """
    if not observed or not all(0 < one.time_us < math.inf and one.load for one in observed):
        raise BadWorkload(reason=f"{len(observed)} measured launches; there must be some, with rows and positive times")
    found = _Fit(observed, device)
    if not all(np.isfinite(share.logs).all() for share in found.shares):
        raise BadWorkload(reason=f"launches of schemes that {device.name} cannot run")
    everything = [("global", 0, at) for at in range(len(_NAMES))]
    company: list[_Key] = []
    for i, share in enumerate(found.shares):
        everything += [("scheme", i, at) for at in range(2 + len(HEIGHTS))]
        if share.company.any():
            company += [("scheme", i, at) for at in range(_FACTORS.start, _FACTORS.stop)]
    _descend(found, [*everything, *company], rounds, quiet)
    near = found.near()
    found.take(near)
    _descend(found, company, rounds, quiet)
    return _profile(found, device, near)


_Key = tuple[str, int, int]


def _descend(found: _Fit, keys: Sequence[_Key], rounds: int, quiet: bool) -> None:
    """Search along one coordinate after the other, until all rest."""
    steps, loss = dict.fromkeys(keys, 0.3), found.loss()
    for _ in tqdm(range(rounds), desc="fit", disable=quiet):
        if max(steps.values(), default=0.0) < _LEAST:
            break
        for key, step in steps.items():
            if step >= _LEAST:
                loss, steps[key] = _search(found, key, step, loss)


def _shape(one: Observation) -> tuple[int, int, float, int]:
    """(n, k, rows of a mean active expert, active experts)."""
    active = sum(experts for counts in one.load.values() for experts in counts.values())
    rows = sum(rows * experts for counts in one.load.values() for rows, experts in counts.items())
    return one.n, one.k, round(rows / active, 3), active


def _size(one: Observation) -> tuple[int, float]:
    """Active experts, then rows of a mean one."""
    _, _, rows, active = _shape(one)
    return active, rows


def rising(values: Sequence[float]) -> list[float]:
    """Give the nearest values that never fall, in least squares (pool adjacent violators; Ayer et al., 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _search(found: _Fit, key: _Key, step: float, loss: float) -> tuple[float, float]:
    """One coordinate up or down; returns the loss and the next step, longer after a success."""
    kind, which, at = key

    def change(by: float) -> float:
        return found.try_global(at, by) if kind == "global" else found.try_scheme(which, at, by)

    for by in (step, -2 * step):
        after = change(by)
        if after < loss - 1e-9:
            return after, 1.4 * step
    change(step)
    return loss, 0.5 * step


def _profile(found: _Fit, device: Device, near: tuple[Near, ...] = ()) -> Profile:
    launch, fixed, sharp = np.exp(np.minimum(found.globals, np.log(_MOST))).tolist()
    rows: dict[Scheme, dict[Tile, TileTime]] = {}
    mixed: dict[Scheme, Factors] = {}
    alone: dict[Scheme, float] = {}
    for share in found.shares:
        values = np.exp(share.logs)
        stream = max(float(values[_STREAM]), 1.01 * fixed)
        reuse = [max(float(value), 1.01 * fixed) for value in values[_REUSE]]
        rows[share.scheme] = {
            Tile(height, WIDTH, STEP): TileTime(_short(max(stream, each)), _short(each))
            for height, each in zip(HEIGHTS, reuse, strict=True)
        }
        alone[share.scheme] = _short(float(values[_ALONE]))
        low, tall, packed_low, packed_tall = map(_short, values[_FACTORS].tolist())
        mixed[share.scheme] = (low, tall, packed_low, packed_tall)
    law = Law(_short(launch), _short(sharp), alone, mixed, near)
    return Profile(device.name, DEPTH, _short(fixed), rows, law)


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
