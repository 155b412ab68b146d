"""Times from a measured profile; schemes that nobody measured are scaled from a kindred one, and the model says so."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from mxmoe.cost.roofline import Roofline, check_depth
from mxmoe.device import Device, unit_of
from mxmoe.errors import BadProfile, MxmoeError, NoProfile
from mxmoe.ir import Scheme, Tile

DATA = Path(__file__).parent / "data"
"""Folder of profiles, `<device>.json`; README.md there says what each field holds and where it is from."""
_HEAD = ("device", "k", "slots", "fixed_us")
LOW = 32
"""Rows of a tile that launches of few rows are cut into."""
_LAW = ("launch_us", "sharp")


class Company(IntEnum):
    """Which other schemes are in a launch."""

    NONE = 0
    LIKE = 1
    """Some, but none that quantizes weights only."""
    PACKED = 2
    """One quantizes weights only, so that another kernel may run the launch than each of the others by itself."""

    @classmethod
    def of(cls, schemes: Collection[Scheme]) -> Company:
        """Say it of a launch of these schemes."""
        if len(schemes) < 2:
            return cls.NONE
        return cls.PACKED if any(scheme.is_weight_only for scheme in schemes) else cls.LIKE


Factors = tuple[float, float, float, float]
"""Of tiles up to `LOW` rows and of taller ones in company that is `LIKE`, then of both where it is `PACKED`."""


@dataclass(frozen=True)
class TileTime:
    """One row of a profile: the time of one wave, one tile of depth `k` on each SM at once."""

    stream_us: float
    """With every weight read from memory: the expert has one row tile."""
    reuse_us: float | None
    """With weights from the cache: the expert has many row tiles; None where nobody measured it."""


@dataclass(frozen=True)
class Near:
    """What the law misses at one measured launch of one scheme."""

    scheme: Scheme
    n: int
    """Output channels of all matrices that share the rows."""
    k: int
    rows: float
    """Of a mean active expert."""
    active: int
    """Experts that have rows."""
    factor: float
    """Measured time over the law's."""

    def weight(self, n: int, k: int, rows: float, active: int) -> float:
        """1 for the same launch, 0 for one a factor of two away or more; a factor of active experts counts half."""
        pairs = ((self.n, n), (self.k, k), (self.rows, rows))
        steps = sum(abs(math.log2(a / b)) for a, b in pairs) + abs(math.log2(self.active / active)) / 2
        return max(0.0, 1.0 - steps)


@dataclass(frozen=True)
class Law:
    """How tiles that share the device become the time of a launch, fitted to measured launches."""

    launch_us: float
    """Of a launch without tiles."""
    sharp: float
    """Exponent with which the spread work and the longest tile add up: 1 is their sum, inf the larger."""
    alone: Mapping[Scheme, float] = field(default_factory=dict[Scheme, float])
    """Scheme -> time of a tile by itself, over that of one tile on each SM at once; 1 if nothing is said."""
    mixed: Mapping[Scheme, Factors] = field(default_factory=dict[Scheme, Factors])
    """Scheme -> what times of its tiles grow by where others are in the launch."""

    near: tuple[Near, ...] = ()
    """Launches of one scheme that were measured, for what the law does not know: waves, parts of k, tiles by rule."""

    def factor(self, scheme: Scheme, n: int, k: int, rows: float, active: int) -> float:
        """What a launch like this took over what the law says, by the nearest one measured; 1 far from all."""
        best, found = 0.0, 1.0
        for one in self.near:
            if one.scheme == scheme and (weight := one.weight(n, k, rows, active)) > best:
                best, found = weight, one.factor**weight
        return found

    def launch(self, busy_us: float | NDArray[np.float64], longest_us: float | NDArray[np.float64]) -> Any:  # noqa: ANN401  # as given
        """Microseconds of a launch: `busy_us` its work spread over all SMs, `longest_us` its longest tile by itself."""
        largest = np.maximum(np.maximum(busy_us, longest_us), 1e-9)
        shares = (busy_us / largest) ** self.sharp + (longest_us / largest) ** self.sharp
        return self.launch_us + largest * shares ** (1 / self.sharp)


@dataclass(frozen=True)
class Profile:
    """
    Measured tile times of one device, all at one depth `k`.

    Raises:
        BadProfile: from `read` and `parse`: a missing field, or a figure that is not a positive number.
    """

    device: str
    """Key of the device row."""
    k: int
    """Input channels of every measured tile."""
    fixed_us: float
    """Part of a tile's time that does not grow with k (prologue and epilogue); the rest is proportional to k."""
    rows: Mapping[Scheme, Mapping[Tile, TileTime]]
    """Scheme (16-bit activations without fp16 suffix: both kinds run at one rate) -> tile -> times."""
    law: Law | None = None
    """None where single tiles were measured, and no launches."""

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read a profile from a JSON file."""
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadProfile(path=path, reason=error) from error
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: object, path: Path) -> Profile:
        """Check the parsed JSON of a profile and build its value; `path` is for messages."""
        if not isinstance(data, dict) or not {*_HEAD, "schemes"} <= set(cast("dict[str, Any]", data)):
            raise BadProfile(path=path, reason=f"the fields {', '.join(_HEAD)} and schemes must be there")
        fields = cast("dict[str, Any]", data)
        rows: dict[Scheme, dict[Tile, TileTime]] = {}
        try:
            for scheme, tiles in fields["schemes"].items():
                rows[Scheme.parse(scheme)] = {Tile.parse(tile): _tile_time(row) for tile, row in tiles.items()}
            law = _law(fields["law"]) if "law" in fields else None
            profile = cls(str(fields["device"]), int(fields["k"]), float(fields["fixed_us"]), rows, law)
        except (MxmoeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadProfile(path=path, reason=error) from error
        times = [time.stream_us for tiles in rows.values() for time in tiles.values()]
        if not times or not 0 <= profile.fixed_us < min(times) or profile.k < 1:
            raise BadProfile(path=path, reason="there must be times, all of them longer than fixed_us")
        return profile

    def dumps(self, slots: int) -> str:
        """Write as JSON, a tile a line, for a device of so many SMs."""
        head: dict[str, Any] = {"device": self.device, "k": self.k, "slots": slots, "fixed_us": self.fixed_us}
        if self.law is not None:
            mixed = {str(scheme): list(factors) for scheme, factors in self.law.mixed.items()}
            alone = {str(scheme): factor for scheme, factor in self.law.alone.items()}
            near = [[str(one.scheme), one.n, one.k, one.rows, one.active, one.factor] for one in self.law.near]
            numbers = {name: getattr(self.law, name) for name in _LAW}
            head["law"] = {**numbers, "alone": alone, "mixed": mixed, "near": near}
        lines = [f'  "{name}": {_spread(json.dumps(value))}' for name, value in head.items()]
        schemes: list[str] = []
        for scheme, tiles in self.rows.items():
            rows = [f'      "{tile}": {json.dumps(dataclasses.asdict(time))}' for tile, time in tiles.items()]
            schemes.append(f'    "{scheme}": {{\n' + ",\n".join(rows) + "\n    }")
        return "{\n" + ",\n".join([*lines, '  "schemes": {\n' + ",\n".join(schemes) + "\n  }"]) + "\n}\n"


def _spread(text: str) -> str:
    """Put every measured launch on a line."""
    return text.replace(" [[", "\n    [[").replace("], [", "],\n    [")


def _law(fields: Mapping[str, Any]) -> Law:
    numbers = {name: float(fields[name]) for name in _LAW}
    mixed: dict[Scheme, Factors] = {}
    for name, (low, tall, packed_low, packed_tall) in fields["mixed"].items():
        mixed[Scheme.parse(name)] = (float(low), float(tall), float(packed_low), float(packed_tall))
    alone = {Scheme.parse(name): float(factor) for name, factor in fields["alone"].items()}
    for value in (*numbers.values(), *alone.values(), *(one for own in mixed.values() for one in own)):
        if not 0 < value < math.inf:
            raise ValueError(f"a number of the law is {value}, not a positive number")
    near = tuple(Near(Scheme.parse(name), *values) for name, *values in fields.get("near", ()))
    if not all(0 < value < math.inf for one in near for value in (one.n, one.k, one.rows, one.active, one.factor)):
        raise ValueError("a measured launch has a number that is not positive")
    return Law(**numbers, alone=alone, mixed=mixed, near=near)


def _tile_time(row: Mapping[str, float | None]) -> TileTime:
    stream, reuse = row["stream_us"], row["reuse_us"]
    for name, value in (("stream_us", stream), ("reuse_us", reuse)):
        if not (value is None and name == "reuse_us") and not (value is not None and 0 < value < math.inf):
            raise ValueError(f"{name} is {value}, not a positive number")
    assert stream is not None, "checked above"
    return TileTime(float(stream), None if reuse is None else float(reuse))


@dataclass(frozen=True)
class Measured:
    """
    Tile times from the profile of a device, see `mxmoe/cost/data/README.md`.

    A measured wave time t at the profile's depth becomes fixed + (t - fixed) k / depth. An expert with r row tiles
    reads its weights from memory once: its tiles take max(reuse, stream / r) each, or `stream` where reuse was not
    measured, which is then on the safe side. A scheme without figures borrows those of the nearest measured scheme
    on the same matrix unit, times the ratio of their rooflines at one and at many row tiles, but is never faster than
    the published peaks; without any such scheme it is the roofline itself.

    Raises:
        NoProfile: no profile for the device.
        BadProfile: a profile that cannot be read.
    """

    device: Device
    company: Company = Company.NONE
    """Which other schemes are in the same launch, for profiles that know what that costs."""
    given: Profile | None = field(default=None, repr=False, hash=False)
    """A profile to use, None for the one that is shipped for the device."""
    name: ClassVar[str] = "measured"
    profile: Profile = field(init=False, repr=False, compare=False)
    roofline: Roofline = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = sorted(path.stem for path in DATA.glob("*.json"))
        if self.given is None and self.device.name not in known:
            raise NoProfile(device=self.device.name, known=", ".join(known))
        object.__setattr__(self, "profile", self.given or _read(DATA / f"{self.device.name}.json"))
        object.__setattr__(self, "roofline", Roofline(self.device))

    def tiles(self, scheme: Scheme) -> tuple[Tile, ...]:
        """Tiles measured for the scheme, or for the one that it is scaled from."""
        source = self._source(scheme)
        return self.roofline.tiles(scheme) if source is None else tuple(self.profile.rows[source])

    def tile_us(self, scheme: Scheme, tile: Tile, k: int, rows: float | None = None) -> float:
        """See `CostModel.tile_us`."""
        check_depth(k, rows)
        source = self._source(scheme)
        if source is None:
            return self.roofline.tile_us(scheme, tile, k, rows)
        near = min(self.profile.rows[source], key=lambda other: _distance(tile, other))
        time, row_tiles = self._time(source, near), _row_tiles(rows, tile)
        if (source, near) == (_plain(scheme), tile):
            return self._measured_us(time, k, row_tiles)

        def ratio(row_tiles: int) -> float:
            mine = self.roofline.tile_us(scheme, tile, k, row_tiles * tile.m)
            return mine / self.roofline.tile_us(source, near, k, row_tiles * near.m)

        # each figure at its own end: a ratio at the rows asked for could fall faster than the rows rise
        # where the source streams whatever the rows, weights wider than its are still read from memory only once
        many = (time.stream_us, min(ratio(1), ratio(_MANY))) if time.reuse_us is None else (time.reuse_us, ratio(_MANY))
        reuse = many[0] * many[1]
        scaled = self._measured_us(TileTime(time.stream_us * ratio(1), reuse), k, row_tiles)
        return max(scaled, *self.roofline.peak_us(scheme, tile, k, rows))

    def provenance(self, scheme: Scheme, k: int | None = None) -> str:
        """See `CostModel.provenance`."""
        source = self._source(scheme)
        if source is None:
            return "roofline"
        text = "measured" if source == _plain(scheme) else f"scaled from {source}"
        depth = self.profile.k
        return text if k in (None, depth) else f"{text} (k={k} from k={depth} by a fixed part and a slope)"

    def alone(self, scheme: Scheme) -> float:
        """Time of a tile by itself, over that of one tile on each SM at once; 1 where the profile does not say."""
        source = self._source(scheme)
        return 1.0 if source is None or self.profile.law is None else self.profile.law.alone.get(source, 1.0)

    def _time(self, scheme: Scheme, tile: Tile) -> TileTime:
        """Give the figures of a measured tile, in company where that is asked for."""
        time, law = self.profile.rows[scheme][tile], self.profile.law
        if self.company is Company.NONE or law is None:
            return time
        factor = law.mixed.get(scheme, (1.0,) * 4)[2 * self.company - 1 - (tile.m <= LOW)]
        return TileTime(time.stream_us * factor, None if time.reuse_us is None else time.reuse_us * factor)

    def _measured_us(self, time: TileTime, k: int, row_tiles: int) -> float:
        fixed, depth = self.profile.fixed_us, self.profile.k
        us = time.stream_us if time.reuse_us is None else max(time.reuse_us, time.stream_us / row_tiles)
        return fixed + max(us - fixed, 0.0) * k / depth

    def _source(self, scheme: Scheme) -> Scheme | None:
        """Return the measured scheme whose figures serve: itself, the nearest on the same unit, or None."""
        plain = _plain(scheme)
        if plain in self.profile.rows:
            return plain
        kin = [other for other in self.profile.rows if unit_of(other) == unit_of(plain)]
        return min(kin, key=lambda other: (_strangeness(plain, other), str(other)), default=None)


_MANY = 1_000_000
"""Row tiles after which the bytes of the weights no longer count."""


@functools.cache
def _read(path: Path) -> Profile:
    return Profile.read(path)


def _plain(scheme: Scheme) -> Scheme:
    """Spell a scheme as the profile does: fp16 and bf16 operands run at the same rate."""
    if scheme.act_format != "fp16":
        return scheme
    return Scheme(scheme.weight_bits, 16, scheme.group_size, scheme.symmetric)


def _row_tiles(rows: float | None, tile: Tile) -> int:
    return 1 if rows is None else max(1, math.ceil(rows / tile.m))


def _distance(tile: Tile, other: Tile) -> float:
    return sum(abs(math.log2(a / b)) for a, b in ((tile.m, other.m), (tile.n, other.n), (tile.k, other.k)))


def _strangeness(scheme: Scheme, other: Scheme) -> tuple[float, ...]:
    """Order measured schemes by how unlike they are: grouping first (its decoding costs most), then bits."""
    groups = (scheme.group_size or 0, other.group_size or 0)
    return (
        float((groups[0] > 0) != (groups[1] > 0)),
        abs(math.log2(scheme.weight_bits / other.weight_bits)),
        float(scheme.symmetric != other.symmetric),
        float(scheme.integer_scales != other.integer_scales),
        abs(groups[0] - groups[1]),
    )
