"""
Which runs of tiles the divided kernel of sm_90 is compiled for (`kernels_hopper_ring.FIELDS`), and their order.

A run is the tiles of one class of the schedule. Runs of the same ring of buffers follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mxmoe.backends.triton import kernels
from mxmoe.backends.triton.layout import KINDS, body_of
from mxmoe.backends.triton.operands import Epilogue, Matrices
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of, shapes_of, tile_time
from mxmoe.ir import Scheme

HEIGHTS = (16, 32, 64, 128)
"""Rows of a tile."""
CHANNELS = 256
"""Channels of a tile of dense weights, both matrices together; of 4-bit ones, half as many."""
NARROW_WIDTH = CHANNELS // 2
"""Of a tile of few rows of dense weights."""
TALL_BOX, LOW_BOX = 64, 16
"""Rows of a copy: `kernels_hopper_ring`."""
MOST_OPERANDS = 4
"""Kinds of operands that a launch has room for, beside those of an expert that sees every token."""
WIDE, NARROW, NIBBLES, SCALED, SCALED_LOW, SLIM = 0, 1, 2, 3, 4, 5
"""Bodies: `kernels_hopper_ring`."""
RINGS = {WIDE: WIDE, NARROW: NARROW, NIBBLES: NIBBLES, SCALED: WIDE, SCALED_LOW: NARROW, SLIM: WIDE}
"""Body -> the one whose ring of buffers it uses, its own or another's."""
STAGES = {WIDE: 4, NARROW: 8, NIBBLES: 8}
"""Buffers in flight of each ring: what shared memory holds."""
WRITES, READS = 1, 2
"""Whether what lies apart is written or read: `kernels_hopper_ring`."""

Operands = tuple[str, int]
"""Body that weights lie for, and the place of the kind of rows among those of the GEMM."""
Ring = tuple[int, int]
"""Body whose buffers are used, and the place of the kind of rows."""


def operands_for(gemm: Gemm, scheme: Scheme) -> Operands:
    """Kind of operands of a scheme."""
    return body_of(scheme) or "", gemm.row_kinds.index(RowKind.of(scheme))


def operands_of(gemm: Gemm) -> tuple[Operands, ...]:
    """Kinds of operands of a GEMM, in order; an expert that sees every token has its own beside them."""
    return tuple(sorted({operands_for(gemm, scheme) for scheme in set(gemm.routed)}))


@dataclass(frozen=True)
class _Class:
    """A class of the schedule, and the body that multiplies its tiles."""

    place: int
    """Among the classes."""
    field: dict[str, int]
    """`kernels.FIELDS`."""
    kind: int
    width: int
    """Output channels of a tile, of each matrix."""
    ring: Ring
    time: float
    """`tiles.tile_time` of a tile."""


def runs(matrices: Matrices, config: Config, epilogue: Epilogue) -> list[tuple[Any, ...]]:
    """
    Give what each class of the schedule is compiled for: `kernels_hopper_ring.FIELDS`.

    Longest tiles come first, taller ones where equally long, but that runs of one ring follow each other: between rings
    the memory has to be empty. Where there are two parts (`Config.back`), what multiplies comes before what reads.
    """
    gemm = matrices.gemm
    classes = sorted(_classes(gemm, config), key=lambda one: (-one.time, -one.field["height"]))
    rings = list(dict.fromkeys(one.ring for one in classes))
    reading = {one.place for one in classes if _reads(one, rings)}
    back = config.back if 0 < len(reading) < len(classes) else 0
    if back:
        classes.sort(key=lambda one: one.place in reading)
        rings.sort(key=lambda ring: ring[0] != WIDE)
    launch = (
        *(len(gemm.schemes), config.grouping, int(gemm.gated), int(matrices.bias is not None)),
        *(epilogue.act, *epilogue.pair),
    )
    in_order = [one for ring in rings for one in classes if one.ring == ring]
    barriers = {ring: sum(STAGES[before[0]] for before in rings[:at]) for at, ring in enumerate(rings)}
    made: list[tuple[Any, ...]] = []
    for one, after in zip(in_order, [*in_order[1:], None], strict=True):
        is_last = after is None or after.ring != one.ring
        reads = one.place in reading
        begins = not made or reads != bool(made[-1][-3])
        made.append(
            (
                one.field["n"], one.field["k"], *launch, one.kind, one.field["height"], one.place,
                -(-one.field["n"] // one.width), one.field["group"] if one.kind == NIBBLES else 0,
                *_operands(one, gemm), barriers[one.ring], STAGES[one.ring[0]],
                int(is_last and _leaves(one.ring, rings, back)), _apart(one, gemm), int(reads), int(begins), back,
            )
        )  # fmt: skip
    return made


def _classes(gemm: Gemm, config: Config) -> list[_Class]:
    """Classes of the schedule, in its order."""
    tiling, specs = classes_of(gemm, config)
    shapes = shapes_of(gemm, config)
    found: list[_Class] = []
    for place, (one, spec) in enumerate(zip(tiling.classes, specs, strict=True)):
        field = dict(zip(kernels.FIELDS, spec, strict=True))
        kind = _kind_of(field, shapes[one.group].slim, gemm)
        width = (CHANNELS if kind in (WIDE, SCALED) else NARROW_WIDTH) // (1 + gemm.gated)
        time = tile_time(gemm.groups[one.group], field["height"], width, field["k"])
        found.append(_Class(place, field, kind, width, (RINGS[kind], field["row_kind"]), time))
    return found


def _kind_of(field: dict[str, int], slim: bool, gemm: Gemm) -> int:
    """Body of a class: tiles of 64 rows are tall or low as the config's width says."""
    body = KINDS[field["kind"]]
    if body == "nibbles":
        return NIBBLES
    if slim and field["height"] == HEIGHTS[-1]:
        return SLIM
    is_narrow = field["width"] == NARROW_WIDTH // (1 + gemm.gated)
    is_tall = field["height"] >= (TALL_BOX + is_narrow)
    return {"dense": (NARROW, WIDE), "scaled": (SCALED_LOW, SCALED)}[body][is_tall]


def _operands(one: _Class, gemm: Gemm) -> tuple[int, int]:
    """Places of a class's scales of rows and of its operands: those of an expert that sees every token come last."""
    if one.field["lead"] > 0:
        return len(gemm.row_kinds), MOST_OPERANDS
    return one.ring[1], operands_of(gemm).index((KINDS[one.field["kind"]], one.ring[1]))


def _apart(one: _Class, gemm: Gemm) -> int:
    """Say what of a class's rows is apart."""
    return (WRITES if gemm.gated else READS) if one.field["lead"] > 0 else 0


def _reads(one: _Class, rings: Sequence[Ring]) -> bool:
    """Say whether tiles of a class keep memory busy for most of their time: a ring's all do, or none."""
    return one.field["height"] < HEIGHTS[-1] if len(rings) == 1 else one.ring[0] != WIDE


def _leaves(ring: Ring, rings: Sequence[Ring], back: int) -> bool:
    """Say whether a ring's memory becomes another's: some programs come to the first ring after the last."""
    return len(rings) > 1 and (back > 0 or ring != rings[-1])
