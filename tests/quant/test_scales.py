"""Rounding scales up and down, grouping channels, saturating casts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.quant.scales import (
    LARGEST,
    SMALLEST,
    join_groups,
    round_down,
    round_up,
    saturate,
    split_groups,
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
