"""The statistics of activations, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.transform import activation_profile
from mxmoe.transform.profile import row_kurtosis, row_peak

from .models import FORMS, Block, Layer, Model, ids_of, own_model


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_rows_are_measured_by_definition(values: list[float]) -> None:
    x = np.array(values)
    variance = x.var()
    kurtosis = float(row_kurtosis(torch.tensor([values]))[0])
    if variance > 1e-6:
        assert kurtosis == pytest.approx(((x - x.mean()) ** 4).mean() / variance**2, rel=1e-6)
        assert kurtosis >= 1 - 1e-9
    middle = np.sort(np.abs(x))[(len(x) - 1) // 2]
    if middle > 0:
        assert float(row_peak(torch.tensor([values]))[0]) == pytest.approx(np.abs(x).max() / middle)


def test_known_tails() -> None:
    rows = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(0))
    assert row_kurtosis(rows) == pytest.approx(3.0, abs=0.1)
    assert row_kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]])) == pytest.approx(1.0)
    assert row_kurtosis(torch.ones(1, 5)) == pytest.approx(0.0)
    assert row_peak(torch.tensor([[0.0, 0.0], [1.0, -4.0]])).tolist() == [1.0, 4.0]
    assert row_peak(torch.tensor([[0.0, 0.0, 1.0]])).tolist() == [float("inf")]


@pytest.mark.parametrize("form", FORMS)
def test_a_line_for_each_block_bank_and_role(form: str) -> None:
    model = own_model(form)
    profile = activation_profile(model, ids_of(0, 64), quiet=True)
    assert [(one.block, one.bank, one.role) for one in profile.lines] == [
        (f"layers.{layer}.mlp", bank, role)
        for layer in (0, 1)
        for bank in ("routed", "shared")
        for role in ("gate_up", "down")
    ]
    assert [one.rows for one in profile.lines[:4]] == [128, 128, 64, 64]
    lines = str(profile).splitlines()
    assert lines[0].split() == ["block", "bank", "role", "rows", "kurtosis", "max/median", "max"]
    assert len(lines) == 9


def test_an_outlier_is_seen_where_it_is() -> None:
    torch.manual_seed(0)
    model = Model([Layer(Block("stack"))])
    plain = activation_profile(model, ids_of(0), quiet=True)
    with torch.no_grad():
        model.layers[0].post_attention_layernorm.weight[3] *= 100
    loud = activation_profile(model, ids_of(0), quiet=True)
    assert loud.lines[0].peak > 20 * plain.lines[0].peak
    assert loud.lines[0].largest > 20 * plain.lines[0].largest
