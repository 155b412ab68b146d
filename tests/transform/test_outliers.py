"""Outliers are there, change nothing, and leave no trace when they go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadOption, NotAPowerOfTwo, NotPlanted, ScaleOutOfRange
from mxmoe.transform import activation_profile, plant_outliers

from .models import FORMS, HIDDEN, TRANSFORMERS, Block, RmsNorm, ids_of, own_model, qwen, run


@given(
    form=st.sampled_from(list(FORMS)),
    offset=st.sampled_from([0.0, 1.0]),
    channels=st.integers(1, HIDDEN) | st.lists(st.integers(0, HIDDEN - 1), min_size=1, max_size=4),
    exponent=st.integers(1, 10),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_planting_changes_no_bit_and_removing_leaves_no_trace(
    form: str, offset: float, channels: int | list[int], exponent: int, seed: int
) -> None:
    model = own_model(form, lambda: RmsNorm(offset), seed)
    ids = ids_of(seed)
    before, state = run(model, ids), {name: value.clone() for name, value in model.state_dict().items()}
    planted = plant_outliers(model, channels=channels, factor=2.0**exponent, seed=seed)
    if offset:
        torch.testing.assert_close(run(model, ids), before, rtol=1e-9, atol=1e-9)
    else:
        assert torch.equal(run(model, ids), before)
    count = channels if isinstance(channels, int) else len(set(channels))
    assert all(len(chosen) == count for chosen in planted.channels.values())
    planted.remove()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(NotPlanted):
        planted.remove()


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_models_get_outliers_and_compute_the_same(name: str, dtype: torch.dtype) -> None:
    model = TRANSFORMERS[name](dtype)
    ids = ids_of(2, 128)
    before, light = run(model, ids), activation_profile(model, ids, quiet=True)
    planted = plant_outliers(model, channels=1, factor=256.0)
    heavy = activation_profile(model, ids, quiet=True)
    assert torch.equal(run(model, ids), before)
    for a, b in zip(light.lines, heavy.lines, strict=True):
        assert b.peak > 10 * a.peak
        assert b.kurtosis > 2 * a.kurtosis
    assert not planted.skipped


def test_the_same_seed_plants_the_same_channels() -> None:
    a, b, c = (plant_outliers(qwen(), seed=seed).channels for seed in (1, 1, 2))
    assert a == b
    assert a != c
    assert len(a) == 2 + 2 * (6 + 1)
    assert set(plant_outliers(qwen(), channels=[3, 1], roles=("gate_up",)).channels.values()) == {(1, 3)}


def test_a_block_alone_gets_them_behind_up() -> None:
    planted = plant_outliers(Block("stack"))
    assert set(planted.channels) == {*(f"moe.routed[{i}]" for i in range(4)), "moe.shared[0]"}
    assert [one.role for one in planted.skipped] == ["gate_up"]


def test_mistakes_are_named_and_nothing_is_changed() -> None:
    model = qwen(torch.float16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (3.0, 1.0, 0.5, float("inf"), float("nan")):
        with pytest.raises(NotAPowerOfTwo, match="power of two above 1"):
            plant_outliers(model, factor=factor)
    for channels in (0, 33, [-1], [32], []):
        with pytest.raises(BadOption, match=r"an input of (32|24|40) channels"):
            plant_outliers(model, channels=channels)
    # a hundredth divided by 2^14 has few digits left in float16
    with pytest.raises(ScaleOutOfRange, match=r"torch\.float16"):
        plant_outliers(model, factor=2.0**14)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
