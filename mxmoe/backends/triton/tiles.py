"""Which tiles a GEMM is cut into: the numbers that a launch is compiled for, and the classes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mxmoe.backends.triton.dispatch import TileClass, Tiling
from mxmoe.backends.triton.layout import KINDS, body_of, unit_channels
from mxmoe.backends.triton.rows import RowKind
from mxmoe.errors import BadTiles
from mxmoe.ir import Scheme

HEIGHTS = (16, 32, 64, 128, 256)
"""Rows of a tile that the kernels are made for."""
DIVIDED_WARPS = 12
"""Warps of a program that divides loading and multiplying between them (`hopper.py`); no other config has as many."""
ALWAYS = "always"
"""In place of a scheme: tiles of an expert that sees every token."""
MARKS = "th"
"""Letters of a shape that is together, or slim."""
WIDTHS = (32, 64, 128, 256)
"""Output channels of a tile, of each of the matrices where there are two."""


@dataclass(frozen=True)
class Shape:
    """
    The tiles of the experts of one scheme, written `16,64x128k128s4`, with a `t` after it if they are `together` and an
    `h` if they are `slim`, or with parts of k `16x64k128s4/2`.

    Raises:
        BadTiles: a number that the kernels are not made for.
    """

    heights: tuple[int, ...]
    """Rows, ascending; an expert takes the tallest as often as it fits, and the rest in the smallest that covers it."""
    width: int
    """Output channels, of each matrix."""
    depth: int = 128
    """Input channels of a step, for dense weights; packed ones go by their units."""
    stages: int = 4
    """Steps in flight."""
    parts: int = 1
    """Parts that k is split into, summed by whoever reads the result."""
    together: bool = False
    """
    Whether an expert that fills the tallest height has its rest in such a tile, too: they run side by side, and its
    weights come from memory once.
    """
    slim: bool = False
    """Whether tiles of the divided kernel's tallest height have half as many channels as usual."""

    def __post_init__(self) -> None:
        fits = self.heights == tuple(sorted(set(self.heights))) and set(self.heights) <= set(HEIGHTS)
        if not self.heights or not fits or self.width not in WIDTHS:
            raise BadTiles(tiles=str(self), reason=f"heights ascend among {HEIGHTS}, the width is one of {WIDTHS}")
        if self.depth not in (32, 64, 128, 256) or not 1 <= self.stages <= 8 or self.parts < 1:
            raise BadTiles(tiles=str(self), reason="a step has 32 to 256 channels, 1 to 8 steps are in flight")

    def __str__(self) -> str:
        heights = ",".join(map(str, self.heights))
        marks = "".join(mark for mark, is_set in zip(MARKS, (self.together, self.slim), strict=True) if is_set)
        parts = f"/{self.parts}" if self.parts > 1 else ""
        return f"{heights}x{self.width}k{self.depth}s{self.stages}{marks}{parts}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """
        Read the string form; the inverse of `str`.

        Raises:
            BadTiles: it is none.
        """
        try:
            heights, _, rest = text.partition("x")
            width, _, rest = rest.partition("k")
            depth, _, rest = rest.partition("s")
            stages, _, parts = rest.partition("/")
            number = stages.rstrip(MARKS)
            marks = stages[len(number) :]
            if marks not in ("", *MARKS, MARKS):
                raise ValueError(marks)
            set_ones = (mark in marks for mark in MARKS)
            return cls(
                tuple(map(int, heights.split(","))), int(width), int(depth), int(number), int(parts or 1), *set_ones
            )  # fmt: skip
        except ValueError:
            reason = "write HEIGHT,HEIGHT x WIDTH k DEPTH s STAGES, e.g. 16,64x128k128s4"
            raise BadTiles(tiles=text, reason=reason) from None


@dataclass(frozen=True)
class Config:
    """How one launch is compiled and started."""

    warps: int
    """Warps of a program, for all its bodies."""
    shapes: tuple[tuple[str, Shape], ...]
    """(scheme, its tiles), each scheme once; last, where it has tiles of its own, `ALWAYS` and those."""
    per_sm: int = 0
    """Programs for each SM, which walk the tiles; 0 starts one program for each tile that there may be."""
    grouping: int = 8
    """Bands that share columns before the next columns come, for the second-level cache."""
    registers: int | None = None
    """Most registers of a thread, None for the compiler's choice."""
    back: int = 0
    """Every so-manieth program of the divided kernel begins with its low tiles; 0: none does."""

    def shape(self, scheme: Scheme) -> Shape:
        """Tiles of a scheme."""
        return next(shape for name, shape in self.shapes if name == str(scheme))

    def shape_of_always(self, scheme: Scheme) -> Shape:
        """Tiles of an expert that sees every token: its own, or those of its scheme."""
        return dict(self.shapes).get(ALWAYS) or self.shape(scheme)

    def whole(self) -> Config:
        """Give the same without parts of k, for a GEMM whose reader wants whole sums."""
        if all(shape.parts == 1 for _, shape in self.shapes):
            return self
        return replace(self, shapes=tuple((name, replace(shape, parts=1)) for name, shape in self.shapes))


@dataclass(frozen=True)
class Gemm:
    """One GEMM of a block: its matrices and the scheme of every expert."""

    n: int
    k: int
    schemes: tuple[Scheme, ...]
    """[expert]."""
    gated: bool = False
    """Two matrices over the same rows, joined by the nonlinearity."""
    always: tuple[int, int] | None = None
    """n and k of the last expert, where that one sees every token and has a size of its own."""
    apart: tuple[Scheme, ...] = ()
    """Schemes whose experts have a launch of their own (`native.py`): their classes come last."""

    @property
    def distinct(self) -> tuple[Scheme, ...]:
        """The schemes that occur, in their order."""
        return tuple(sorted(set(self.schemes)))

    @property
    def routed(self) -> tuple[Scheme, ...]:
        """Schemes of the experts that are routed to, [expert]: of all but one that sees every token."""
        return self.schemes if self.always is None else self.schemes[:-1]

    @property
    def groups(self) -> tuple[Scheme, ...]:
        """Scheme of every group of experts that are cut alike; what sees every token is the last group by itself."""
        first = tuple(scheme for scheme in self.distinct if scheme in self.routed)
        return first if self.always is None else (*first, self.schemes[-1])

    @property
    def row_kinds(self) -> tuple[RowKind, ...]:
        """The kinds of rows that the common launch multiplies, in order."""
        return tuple(sorted({RowKind.of(scheme) for scheme in self.distinct if scheme not in self.apart}))


def classes_of(gemm: Gemm, config: Config) -> tuple[Tiling, tuple[tuple[int, ...], ...]]:
    """
    Lay out the classes of a launch, longest tile first.

    Returns:
        The tiling that the schedule is built from, and what each class of the common launch is compiled for
        (`kernels.FIELDS`): that launch ends before the classes of schemes that are `apart`, tallest tile first.
    """
    kinds = gemm.row_kinds
    rows: list[tuple[tuple[float, ...], TileClass, tuple[int, ...] | None]] = []
    together: set[int] = set()
    groups = tuple(map(gemm.groups.index, gemm.routed))
    sizes = [(gemm.n, gemm.k, 0)] * len(gemm.groups)
    if gemm.always is not None:
        groups += (len(sizes) - 1,)
        sizes[-1] = (*gemm.always, gemm.k)
    cut = zip(gemm.groups, sizes, shapes_of(gemm, config), strict=True)
    for group, (scheme, (n, k, lead), shape) in enumerate(cut):
        columns = -(-n // shape.width) * shape.parts
        together |= {group} if shape.together else set()
        for height in shape.heights:
            if scheme in gemm.apart:
                rows.append(((1, group, -height), TileClass(group, height, columns), None))
                continue
            spec = (
                KINDS.index(body_of(scheme) or ""),
                *(height, shape.width, shape.depth, _stages(shape, scheme, min(k, gemm.k)), n, k, scheme.weight_bits),
                *(_scale_group(scheme), int(not scheme.symmetric), kinds.index(RowKind.of(scheme))),
                *(int(scheme.act_group_size is not None), shape.parts, lead),
            )
            time = tile_time(scheme, height, shape.width, k // shape.parts)
            rows.append(((0, -time), TileClass(group, height, columns), spec))
    rows.sort(key=lambda row: row[0])
    tiling = Tiling(tuple(row[1] for row in rows), groups, frozenset(together))
    return tiling, tuple(row[2] for row in rows if row[2] is not None)


def shapes_of(gemm: Gemm, config: Config) -> tuple[Shape, ...]:
    """Tiles of every group."""
    if gemm.always is None:
        return tuple(map(config.shape, gemm.groups))
    return (*map(config.shape, gemm.groups[:-1]), config.shape_of_always(gemm.groups[-1]))


def _scale_group(scheme: Scheme) -> int:
    """Channels whose sums share a scale: 0 for all of a row, as with integer scales, which are in the codes by then."""
    return 0 if scheme.integer_scales else scheme.group_size or 0


def _stages(shape: Shape, scheme: Scheme, k: int) -> int:
    """Steps in flight: no more than there are, and a loop of one step is none to the compiler."""
    depth = shape.depth if body_of(scheme) == "dense" else unit_channels(scheme)
    return max(1, min(shape.stages, -(-k // (depth * shape.parts))))


def tile_time(scheme: Scheme, height: int, width: int, k: int) -> float:
    """
    Time of a tile in arbitrary units, good enough to say which is longer.

    The larger of the bytes of its weights and its operations, at the ratio that an H200 has per SM: about 170 8-bit
    operations, or half as many 16-bit ones, for each byte.
    """
    rate = 340.0 if scheme.act_bits <= 8 else 170.0
    weights = width * k * scheme.effective_bits(k) / 8
    return max(weights, 2.0 * height * width * k / rate) + 0.25 * weights
