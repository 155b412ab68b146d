"""Tiles: their spelling, what is refused, and the order of the classes of a launch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mxmoe.backends.triton.kernels import FIELDS
from mxmoe.backends.triton.layout import KINDS, body_of
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import HEIGHTS, WIDTHS, Config, Gemm, Shape, classes_of, tile_time
from mxmoe.errors import BadTiles
from mxmoe.ir import Scheme

from .small_blocks import KERNEL_SCHEMES

shapes = st.builds(
    Shape,
    st.sets(st.sampled_from(HEIGHTS), min_size=1).map(lambda found: tuple(sorted(found))),
    st.sampled_from(WIDTHS),
    st.sampled_from((32, 64, 128, 256)),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)


@st.composite
def launches(draw: st.DrawFn) -> tuple[Gemm, Config]:
    """A GEMM of some schemes, and tiles for each."""
    schemes = draw(st.lists(st.sampled_from(KERNEL_SCHEMES), min_size=1, max_size=6))
    gemm = Gemm(draw(st.integers(1, 3000)), draw(st.integers(8, 3000)), tuple(schemes), draw(st.booleans()))
    return gemm, Config(4, tuple((str(scheme), draw(shapes)) for scheme in gemm.distinct))


@given(shapes)
def test_parsing_undoes_printing(shape: Shape) -> None:
    assert Shape.parse(str(shape)) == shape


def test_how_tiles_are_spelled() -> None:
    assert str(Shape((16, 64), 128)) == "16,64x128k128s4"
    assert Shape.parse("16x64k128s4/2") == Shape((16,), 64, 128, 4, 2)
    assert Shape.parse("16,64x64k128s3t/2") == Shape((16, 64), 64, 128, 3, 2, together=True)
    assert str(Shape((128,), 64, together=True, slim=True)) == "128x64k128s4th"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write HEIGHT"),
        ("16x64", "write HEIGHT"),
        ("16x64k128s4/", "") ,
        ("ax64k128s4", "write HEIGHT"),
        ("24x64k128s4", "heights ascend"),
        ("32,16x64k128s4", "heights ascend"),
        ("16,16x64k128s4", "heights ascend"),
        ("16x96k128s4", "width"),
        ("16x64k48s4", "a step has 32 to 256"),
        ("16x64k128s0", "1 to 8 steps"),
        ("16x64k128s9", "1 to 8 steps"),
        ("16x64k128s4/0", "a step"),
        ("16x64k128s4/2/3", "write HEIGHT"),
        ("16x64k128s4tt", "write HEIGHT"),
        ("16x64k128s4ht", "write HEIGHT"),
        ("16x64k128s4/2t", "write HEIGHT"),
    ],
)  # fmt: skip
def test_what_no_kernel_is_made_for(text: str, reason: str) -> None:
    if not reason:  # an empty number of parts is one part
        assert Shape.parse(text) == Shape.parse(text[:-1])
        return
    with pytest.raises(BadTiles, match=reason):
        Shape.parse(text)


@given(launches())
@settings(max_examples=100, deadline=None)
def test_every_scheme_has_a_class_for_each_height_longest_tile_first(launch: tuple[Gemm, Config]) -> None:
    gemm, config = launch
    tiling, classes = classes_of(gemm, config)
    assert len(tiling.classes) == len(classes)
    times: list[float] = []
    seen: list[tuple[Scheme, int]] = []
    for one, spec in zip(tiling.classes, classes, strict=True):
        fields = dict(zip(FIELDS, spec, strict=True))
        scheme = gemm.distinct[one.group]
        shape = config.shape(scheme)
        assert KINDS[fields["kind"]] == body_of(scheme)
        assert (fields["n"], fields["k"], fields["bits"]) == (gemm.n, gemm.k, scheme.weight_bits)
        group = 0 if scheme.integer_scales else scheme.group_size or 0
        assert (fields["group"], fields["asym"]) == (group, not scheme.symmetric)
        assert gemm.row_kinds[fields["row_kind"]] == RowKind.of(scheme)
        assert bool(fields["row_group"]) == (scheme.act_group_size is not None)
        assert fields["height"] == one.height
        assert one.n_tiles == -(-gemm.n // fields["width"]) * fields["parts"]
        assert 1 <= fields["stages"] <= shape.stages
        times.append(tile_time(scheme, one.height, shape.width, gemm.k // shape.parts))
        seen.append((scheme, one.height))
    assert times == sorted(times, reverse=True)
    assert sorted(seen) == sorted((scheme, h) for scheme in gemm.distinct for h in config.shape(scheme).heights)
    assert [gemm.distinct[group] for group in tiling.group] == list(gemm.schemes)


@given(st.sampled_from(KERNEL_SCHEMES), st.sampled_from(HEIGHTS[:-1]), st.sampled_from(WIDTHS), st.integers(1, 5000))
def test_taller_wider_and_deeper_tiles_take_longer(scheme: Scheme, height: int, width: int, k: int) -> None:
    time = tile_time(scheme, height, width, k)
    assert 0 < time <= tile_time(scheme, 2 * height, width, k)
    assert time < tile_time(scheme, height, 2 * width, k)
    assert time < tile_time(scheme, height, width, 2 * k)
