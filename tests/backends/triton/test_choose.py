"""Tiles by rule: always ones that the kernels are made for, whole where they must be, taller where rows are many."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton.choose import FEW, MANY, SOME, by_rule, candidates, mean_rows
from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.tiles import Config, Gemm
from mxmoe.ir import Scheme

from .small_blocks import KERNEL_SCHEMES


@st.composite
def calls(draw: st.DrawFn, most_schemes: int = 4) -> tuple[Gemm, int, int]:
    """A GEMM, tokens and top-k."""
    distinct = draw(st.lists(st.sampled_from(KERNEL_SCHEMES), min_size=1, max_size=most_schemes, unique=True))
    experts = draw(st.sampled_from((1, 8, 60, 256)))
    sizes = st.sampled_from((1408, 2048, 768, 4096)) | st.integers(1, 9000)
    schemes = tuple(distinct[at % len(distinct)] for at in range(experts))
    gemm = Gemm(draw(sizes), draw(sizes), schemes, draw(st.booleans()))
    return gemm, draw(st.sampled_from((0, 1, 16, 256, 8192)) | st.integers(0, 70000)), draw(st.integers(1, 8))


def check(gemm: Gemm, config: Config) -> None:
    """What the kernels demand of any config."""
    assert [name for name, _ in config.shapes] == [str(scheme) for scheme in gemm.distinct]
    assert config.warps in (4, 8)
    for scheme in gemm.distinct:
        shape = config.shape(scheme)
        # what follows a gate needs whole sums, and so does the body that knows no parts
        assert shape.parts == 1 or not gemm.gated
        assert shape.parts == 1 or body_of(scheme) != "wide"
    assert len({shape.parts for _, shape in config.shapes}) == 1, "all schemes write the same parts of the result"


@given(calls())
@settings(max_examples=200, deadline=None)
def test_the_rule_chooses_what_kernels_can_run(call: tuple[Gemm, int, int]) -> None:
    gemm, tokens, top_k = call
    config = by_rule(gemm, tokens, top_k)
    check(gemm, config)
    for _, shape in config.shapes:
        # float32 sums of a tile in registers: 255 a thread, of which some are needed otherwise
        sums = max(shape.heights) * shape.width * (2 if gemm.gated else 1)
        assert sums <= config.warps * 32 * 160


@given(
    st.sampled_from(("bf16", "w8a8_sym")), st.sampled_from((1408, 2816, 7168)) | st.integers(1, 9000),
    st.sampled_from((1, 8, 60)), st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_no_channel_of_k_is_lost_between_parts(name: str, k: int, experts: int, tokens: int) -> None:
    gemm = Gemm(512, k, (Scheme.parse(name),) * experts)
    for config in (by_rule(gemm, tokens, 2), *candidates(gemm, tokens, 2)):
        assert k % config.shape(gemm.distinct[0]).parts == 0


@given(calls(most_schemes=1))
@settings(max_examples=60, deadline=None)
def test_candidates_begin_with_the_rule_and_differ(call: tuple[Gemm, int, int]) -> None:
    gemm, tokens, top_k = call
    found = candidates(gemm, tokens, top_k)
    assert found[0] == by_rule(gemm, tokens, top_k)
    assert len(set(found)) == len(found) > 4
    for config in found:
        check(gemm, config)


@pytest.mark.parametrize("name", ["bf16", "w8a8_sym", "w4a8_g128_sym", "w4a16_g128_asym"])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_get_taller_with_the_rows(name: str, gated: bool) -> None:
    gemm = Gemm(1408, 2048, (Scheme.parse(name),) * 60, gated)
    tallest: list[int] = []
    for rows in (FEW, SOME, MANY, 4 * MANY):
        tokens = int(rows * 60 / 4)
        assert mean_rows(gemm, tokens, 4) == rows
        tallest.append(max(by_rule(gemm, tokens, 4).shape(gemm.distinct[0]).heights))
    assert tallest == sorted(tallest)
    assert tallest[0] < tallest[-1]


def test_rows_of_a_mean_active_expert() -> None:
    gemm = Gemm(8, 8, (Scheme.parse("bf16"),) * 60)
    assert mean_rows(gemm, 1, 4) == 1
    assert mean_rows(gemm, 15, 4) == 1
    assert mean_rows(gemm, 30, 4) == 2
    assert mean_rows(gemm, 0, 4) == 0
