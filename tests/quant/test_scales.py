"""Rounding scales up and down, grouping channels, saturating casts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.quant.scales import (
    LARGEST,
    SMALLEST,
    are_multiples,
    join_groups,
    join_scales,
    multiples_above,
    round_down,
    round_up,
    saturate,
    split_groups,
    split_scales,
    storable_scale,
)

POSITIVE = st.floats(min_value=2.0**-149, max_value=LARGEST)
BEYOND = st.floats(min_value=LARGEST, max_value=1e40)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of `dtype` not above x and the smallest not below it, found by search over bit patterns."""
    shift = 0 if dtype == torch.float32 else 16

    def value(bits: int) -> float:
        return torch.tensor(bits << shift, dtype=torch.int32).view(torch.float32).item()

    low, high = 0, 0x7F800000 >> shift
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= x else (low, middle)
    return value(low), value(low) if value(low) == x else value(high)


@given(POSITIVE, DTYPES)
@settings(max_examples=300, deadline=None)
def test_rounding_is_to_the_neighbours(x: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(x, dtype=torch.float64)
    assert (round_down(exact, dtype).item(), round_up(exact, dtype).item()) == neighbours(x, dtype)


@given(
    POSITIVE | st.floats(min_value=LARGEST, max_value=1e40), st.sampled_from([1.0, 3.0, 127.0, 255.0, 448.0]), DTYPES
)
@settings(max_examples=200, deadline=None)
def test_a_stored_scale_is_normal_and_never_decodes_to_infinity(x: float, steps: float, dtype: torch.dtype) -> None:
    scale = storable_scale(torch.tensor(x, dtype=torch.float64), steps, dtype).float()
    assert scale.item() >= SMALLEST
    assert (scale * steps).isfinite()


@st.composite
def own_scales(draw: st.DrawFn) -> torch.Tensor:
    """Scales [channels, groups] in float64, of any magnitude, zeros among them."""
    groups = draw(st.integers(1, 5))
    one = st.just(0.0) | st.floats(1e-3, 1.0) | st.floats(2.0**-149, LARGEST)
    rows = st.lists(st.lists(one, min_size=groups, max_size=groups), min_size=1, max_size=3)
    return torch.tensor(draw(rows), dtype=torch.float64)


@given(own_scales(), st.sampled_from([1.0, 3.0, 7.0]))
@settings(max_examples=300, deadline=None)
def test_multiples_lie_above_by_at_most_a_sixteenth_of_the_largest(own: torch.Tensor, steps: float) -> None:
    scale = multiples_above(own, steps)
    channel, multipliers = split_scales(scale)
    assert are_multiples(scale)
    assert (scale * steps).isfinite().all()
    assert (multipliers.amax(-1) == 16).all()
    usual = ((own <= LARGEST / steps * (1 - 2.0**-19)) & (own.amax(-1, keepdim=True) >= 2.0**-122)).all(-1)
    assert (scale.double() >= own * (1 - 2.0**-50))[usual].all(), "a scale below its own clips"
    assert (scale.double() <= own + channel.double() * (1 + 2.0**-40))[usual].all()
    assert (scale[own.amax(-1) == 0] == 1).all()


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), POSITIVE)
@settings(max_examples=200, deadline=None)
def test_scales_split_and_join(multipliers: list[int], x: float) -> None:
    own = torch.tensor([[x, x]], dtype=torch.float64)
    channel = split_scales(multiples_above(own, 7.0))[0]
    whole = torch.tensor([[16, *multipliers]], dtype=torch.uint8)
    scale = join_scales(channel, whole)
    assert scale.dtype == torch.float32
    assert scale.double().tolist() == (channel.double() * whole.double()).tolist(), "exact"
    assert are_multiples(scale)
    back, again = split_scales(scale)
    assert (back.dtype, again.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(back, channel)
    assert torch.equal(again, whole)


def test_multiples_by_hand() -> None:
    scale = multiples_above(torch.tensor([[1.0, 0.4, 0.0]], dtype=torch.float64), 7.0)
    assert scale.tolist() == [[1.0, 7 / 16, 1 / 16]]
    channel, multipliers = split_scales(torch.tensor([[2.0, 0.5, 1.25]]))
    assert (channel.tolist(), multipliers.tolist()) == ([[0.125]], [[16, 4, 10]])


@pytest.mark.parametrize("row", [[1.0, 0.3], [1.0, 1 / 32], [1.0, 0.0], [0.0, 0.0], [1.0, torch.nan], [-1.0, -1.0]])
def test_what_is_no_multiple_is_told(row: list[float]) -> None:
    assert not are_multiples(torch.tensor([[1.0, 1.0], row]))
    assert are_multiples(torch.ones(0, 2))


def test_the_largest_float32_is_clipped_by_less_than_a_percent() -> None:
    scale = storable_scale(torch.tensor(LARGEST / 3, dtype=torch.float64), 3, torch.bfloat16)
    assert 0.992 < scale.item() * 3 / LARGEST <= 1


@given(st.integers(1, 40), st.none() | st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_groups_join_again_and_a_short_one_is_filled_with_zeros(k: int, size: int | None) -> None:
    x = torch.arange(1.0, 2 * k + 1).reshape(2, k)
    groups = split_groups(x, size)
    assert groups.shape == (2, math.ceil(k / (size or k)), size or k)
    assert groups.sum() == x.sum()
    assert torch.equal(join_groups(groups, k), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saturation_spares_infinities_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([LARGEST, -LARGEST, 1.5, torch.inf, -torch.inf, torch.nan])
    top = torch.finfo(dtype).max
    found = saturate(x, dtype).float()
    assert found[:5].tolist() == [top, -top, 1.5, torch.inf, -torch.inf]
    assert found[5].isnan()
