"""
What is fixed before any routing is known: the classes of tiles of a launch, its bounds, and where its tables lie.

A *class* is (group of experts, tile height, tiles side by side). Experts of one scheme form a group; a group offers
several heights, each a class. The order of the classes is the order in which their tiles are started, longest first.
An expert with `count` rows is cut into *bands*: as many of the group's tallest height as fit, and the rest in one band
of the smallest height that covers it; or, in groups that are *together*, of the tallest height too where the expert has
a full band. That costs some operations, but all bands of the expert are of one class and run side by side, so that its
weights come from memory once. A band has as many tiles as its class has side by side (`n_tiles`; where K is
split, the caller counts every part as a tile).

Everything that a schedule needs lies in one int32 buffer whose address never changes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mxmoe.errors import BadDispatch

ALIGN = 8
"""int32 words; every table starts at a multiple of 32 bytes."""
COLUMNS = 6
"""
Numbers of a class in the constants: group, height, next lower height, shift of the tallest height, n_tiles, and what
stands for the next lower height where the rest lies beside a full band.
"""
MAX_SETS = 2
"""Tilings that one launch can build bands for: those of gate_up and of down."""
BEYOND = 16
"""Rows; those of always-on experts lie from a multiple on where they lie apart, aligned as the others are."""
WALK = 4
"""
Words of a tiling for programs that fetch tile after tile: tiles handed out, programs that are done, and two that keep
addresses at whole 16 bytes.
"""


def pad_to(value: int, multiple: int) -> int:
    """Round up: pad_to(5, 8) is 8."""
    return -(-value // multiple) * multiple


def power_of_two_from(value: int) -> int:
    """Smallest power of two that is at least `value`: 5 -> 8, 1 -> 1."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class TileClass:
    """Tiles that are alike: their experts' group, their height in rows, and how many lie side by side in a band."""

    group: int
    height: int
    """Rows; a power of two."""
    n_tiles: int
    """Tiles of a band: ceil(columns / columns of a tile), times the parts of K."""


@dataclass(frozen=True)
class Tiling:
    """
    The classes of one GEMM, longest first, and the group of every expert (the always-on ones after the routed).

    Raises:
        BadDispatch: no class, a height that is no power of two or comes twice in a group, or an expert whose group has
            no class.
    """

    classes: tuple[TileClass, ...]
    group: tuple[int, ...]
    together: frozenset[int] = frozenset()
    """Groups whose experts, where they fill the tallest height, have all their rows in it."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise BadDispatch(reason="a tiling has no class")
        for one in self.classes:
            if one.height < 1 or one.height & (one.height - 1) or one.n_tiles < 1 or one.group < 0:
                raise BadDispatch(reason=f"{one}: heights are powers of two, tiles and groups not negative")
        pairs = [(one.group, one.height) for one in self.classes]
        if len(set(pairs)) < len(pairs):
            raise BadDispatch(reason=f"two classes of one group have the same height; (group, height) are {pairs}")
        missing = sorted(set(self.group) - {one.group for one in self.classes})
        if missing:
            raise BadDispatch(reason=f"no class for experts of group {missing[0]}")

    @cached_property
    def heights(self) -> Mapping[int, tuple[int, ...]]:
        """Group -> its heights, ascending."""
        groups = sorted({one.group for one in self.classes})
        return {group: tuple(sorted(one.height for one in self.classes if one.group == group)) for group in groups}

    def class_of(self, group: int, height: int) -> int:
        """Place of a class in the order."""
        return next(at for at, one in enumerate(self.classes) if (one.group, one.height) == (group, height))

    def most_bands(self, assignments: int, tokens: int, experts: int) -> int:
        """Bound on the bands of any routing: the sum of ceil(count / tallest height), at its largest."""
        return self._most_routed(assignments, experts) + sum(self._always(tokens, experts))

    def most_tiles(self, assignments: int, tokens: int, experts: int) -> int:
        """Bound on the tiles of any routing: every band of routed experts as wide as the widest of theirs."""
        wide = {one.group: one.n_tiles for one in sorted(self.classes, key=lambda one: one.n_tiles)}
        widest = max((wide[group] for group in self.group[:experts]), default=0)
        always = zip(self._always(tokens, experts), self.group[experts:], strict=True)
        return self._most_routed(assignments, experts) * widest + sum(bands * wide[group] for bands, group in always)

    def _most_routed(self, assignments: int, experts: int) -> int:
        least = min((self.heights[group][-1] for group in self.group[:experts]), default=1)
        return (assignments + min(experts, assignments) * (least - 1)) // least

    def _always(self, tokens: int, experts: int) -> tuple[int, ...]:
        """Bands of each always-on expert."""
        return tuple(-(-tokens // self.heights[group][-1]) for group in self.group[experts:])

    def columns(self, width: int) -> Tensor:
        """int32 [COLUMNS, width], what the kernel reads of each class; classes beyond the last belong to no group."""
        rows: list[tuple[int, ...]] = []
        for one in self.classes:
            heights = self.heights[one.group]
            below = max((height for height in heights if height < one.height), default=0)
            beside = below
            if one.group in self.together:
                beside = 0 if one.height == heights[-1] else one.height
            rows.append((one.group, one.height, below, heights[-1].bit_length() - 1, one.n_tiles, beside))
        rows += [(-2, 1, 0, 0, 0, 0)] * (width - len(rows))
        return torch.tensor(rows, dtype=torch.int32).T.contiguous()


@dataclass(frozen=True)
class Dispatch:
    """
    The static side of a schedule: numbers of experts, tokens and classes, and the bounds that follow.

    The rows of a launch are `tokens * top_k` assignments followed by `tokens` rows for each always-on expert, whose id
    is `experts + its number`. Flat row t * top_k + j is the j-th choice of token t; flat row
    tokens * top_k + s * tokens + t is token t at always-on expert s.

    Raises:
        BadDispatch: a negative number, no tiling or more than two, or groups for another number of experts.
    """

    experts: int
    """Routed experts; this id, anything beyond it and anything negative are padding."""
    top_k: int
    tokens: int
    tilings: tuple[Tiling, ...]
    """Of gate_up, and of down if it is built in the same launch."""
    always: int = 0
    """Always-on experts."""

    def __post_init__(self) -> None:
        if min(self.experts - 1, self.top_k - 1, self.tokens, self.always) < 0:
            raise BadDispatch(reason=f"{self.experts} experts, top-{self.top_k}, {self.tokens} tokens")
        if not 1 <= len(self.tilings) <= MAX_SETS:
            raise BadDispatch(reason=f"{len(self.tilings)} tilings; there may be 1 or {MAX_SETS}")
        for tiling in self.tilings:
            if len(tiling.group) != self.lanes:
                found = f"groups for {len(tiling.group)} experts, and there are {self.lanes}"
                raise BadDispatch(reason=found)

    @property
    def lanes(self) -> int:
        """Experts, routed and always-on."""
        return self.experts + self.always

    @property
    def assignments(self) -> int:
        """Rows that the router makes, padding included."""
        return self.tokens * self.top_k

    @property
    def rows(self) -> int:
        """All rows, padding included."""
        return self.assignments + self.always * self.tokens

    @property
    def beyond(self) -> int:
        """Rows of the routed experts before what always-on ones have between the GEMMs (`kernels.FIELDS`)."""
        return pad_to(self.assignments, BEYOND)

    @property
    def expert_width(self) -> int:
        """Power of two that holds every expert and one more, which counts the padding."""
        return power_of_two_from(self.lanes + 1)

    @property
    def class_width(self) -> int:
        """Power of two that holds the classes of either tiling and one more, which is their end."""
        return power_of_two_from(1 + max(len(tiling.classes) for tiling in self.tilings))

    @property
    def row_stride(self) -> int:
        """Words between the tables of rows."""
        return pad_to(self.rows, ALIGN)

    def bands(self, which: int) -> int:
        """Static bound on the bands of a tiling, rounded up to whole 32 bytes."""
        return pad_to(self.tilings[which].most_bands(self.assignments, self.tokens, self.experts), ALIGN)

    def most_tiles(self, which: int) -> int:
        """Static bound on the tiles of a tiling."""
        return self.tilings[which].most_tiles(self.assignments, self.tokens, self.experts)

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """Name of a table -> its first word and its length; a number in a name is that of the tiling."""
        sizes: list[tuple[str, int, int]] = [
            ("counts", self.lanes, self.expert_width),
            ("offsets", self.lanes + 1, self.expert_width),
        ]
        for which, tiling in enumerate(self.tilings):
            ends = len(tiling.classes) + 1
            sizes += [(f"class_band{which}", ends, self.class_width), (f"class_tile{which}", ends, self.class_width)]
        head = sum(held for _, _, held in sizes)
        sizes[-1] = (*sizes[-1][:2], sizes[-1][2] + pad_to(head, ALIGN) - head)
        sizes += [("row_of", self.rows, self.row_stride), ("place_of", self.rows, self.row_stride)]
        for which in range(len(self.tilings)):
            held = self.bands(which)
            sizes += [(f"{name}{which}", held, held) for name in ("band_expert", "band_row", "band_rows")]
        sizes.append(("walk", MAX_SETS * WALK, ALIGN))
        starts = [0]
        for _, _, held in sizes:
            starts.append(starts[-1] + held)
        return {name: (start, length) for (name, length, _), (start, _) in zip(sizes, pairwise(starts), strict=True)}

    @property
    def words(self) -> int:
        """Length of the buffer of tables, int32 words."""
        return self.places["walk"][0] + ALIGN

    def constants(self) -> Tensor:
        """int32: per tiling the group of each expert [expert_width], then per tiling `Tiling.columns`."""
        pad = self.expert_width - self.lanes
        groups = [torch.tensor([*tiling.group, *[-1] * pad], dtype=torch.int32) for tiling in self.tilings]
        return torch.cat([*groups, *(tiling.columns(self.class_width).reshape(-1) for tiling in self.tilings)])


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """
    The tables of one launch: views of one buffer, filled anew for every routing.

    `counts` [lanes]: rows of each expert. `offsets` [lanes + 1]: sorted row at which each begins; the last is the end.
    `row_of` [rows]: sorted row -> flat row; padding last. `place_of` [rows]: flat row -> sorted row, -1 for padding.
    Per tiling: `class_band`, `class_tile` [classes + 1]: first band and first tile of each class, then the end;
    `band_expert`, `band_row`, `band_rows` [bound]: expert, first sorted row and number of rows of each band; what lies
    beyond the last band is undefined. `walk` [MAX_SETS * WALK]: zeros, which whoever counts with them restores.
    """

    dispatch: Dispatch
    words: Tensor
    """int32, all tables."""
    constants: Tensor
    """int32, what the kernels read of the classes."""
    scratch: Tensor
    """int32, rows of each expert in each block of assignments; used for many rows only."""

    def table(self, name: str, which: int = 0) -> Tensor:
        """View of a table by its name; `which` tiling for those of classes and bands."""
        key = name if name in self.dispatch.places else f"{name}{which}"
        start, length = self.dispatch.places[key]
        return self.words[start : start + length]

    def filled(self) -> dict[str, Tensor]:
        """All tables on the CPU, cut to what is defined; waits for the device."""
        words, found = self.words.cpu(), dict[str, Tensor]()
        for name, (start, length) in self.dispatch.places.items():
            end = self.dispatch.places[f"class_band{name[-1]}"] if name.startswith("band_") else None
            held = length if end is None else int(words[end[0] + end[1] - 1])
            found[name] = words[start : start + held]
        return found
