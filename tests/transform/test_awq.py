"""AWQ lowers its own objective, never raises it, and keeps the function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.calib import observe
from mxmoe.errors import BadOption, NotWeightOnly
from mxmoe.frontend import expert_views, lift
from mxmoe.ir import Scheme
from mxmoe.quant import dequantize, quantize
from mxmoe.transform import awq, plant_outliers
from mxmoe.transform.rows import hidden_rows, run_rows

from .models import FORMS, TRANSFORMERS, distance, ids_of, own_model, qwen, run

SCHEME = "w3a16_g8_asym"


@given(form=st.sampled_from(list(FORMS)), seed=st.integers(0, 2**16), exact=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_function_stays_and_no_objective_gets_worse(form: str, seed: int, exact: bool) -> None:
    model = own_model(form, seed=seed, n_layers=1)
    ids = ids_of(seed, 64)
    before = run(model, ids)
    report = awq(model, ids, [SCHEME], exact=exact, quiet=True)
    assert distance(run(model, ids), before) < 1e-9
    for one in report.folded:
        assert one.error is not None
        assert one.error <= 1
        assert 0 <= one.alpha <= 0.95


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("role", ["gate_up", "down"])
def test_the_error_that_is_reported_is_the_error_that_is_left(name: str, role: str) -> None:
    """By another way: quantizing the linears of the folded model, on the tokens that they get."""
    model = TRANSFORMERS[name]()
    ids = ids_of(3, 128)
    plant_outliers(model, channels=2, factor=8.0)
    before = _linear_errors(model, ids, role)
    report = awq(model, ids, [SCHEME], roles=(role,), rows=10_000, quiet=True)
    after = _linear_errors(model, ids, role)
    assert {one.role for one in report.folded} == {role}
    if role == "gate_up":
        for one in report.folded:
            assert one.error == pytest.approx(after[one.block] / before[one.block], rel=1e-3)
            assert one.error < 0.9
    else:
        assert sum(after.values()) < 0.9 * sum(before.values())


def _linear_errors(model: torch.nn.Module, ids: torch.Tensor, role: str) -> dict[str, float]:
    """Block -> squared output error of its quantized gates and ups, or downs, over all assignments."""
    lifted = lift(model)
    total = {block.name: 0.0 for block in lifted.blocks}
    views = {(b.name, name): expert_views(bank) for b in lifted.blocks for name, bank in b.banks.items()}

    def receive(block: object, bank: str, expert: int, rows: torch.Tensor) -> None:
        one = views[block.name, bank][expert]
        x = rows if role == "gate_up" else hidden_rows(block.banks[bank].shape, one, rows)
        for which in ("gate", "up") if role == "gate_up" else ("down",):
            weight = one.weights[which]
            change = x.double() @ (dequantize(quantize(weight, Scheme.parse(SCHEME))).double() - weight.double()).T
            total[block.name] += float(change.square().sum())

    run_rows(lifted, ids, receive, title="", quiet=True)
    return total


def test_it_pays_where_channels_stick_out() -> None:
    model = qwen()
    ids = ids_of(3, 256)
    plant_outliers(model, channels=1, factor=16.0)
    before = observe(lift(model), ids, schemes=[SCHEME], quiet=True)
    report = awq(model, ids, [SCHEME], quiet=True)
    after = observe(lift(model), ids, schemes=[SCHEME], quiet=True)
    assert sum(b.squared_error[r].sum() for b in after.banks.values() for r in b.squared_error) < 0.8 * sum(
        b.squared_error[r].sum() for b in before.banks.values() for r in b.squared_error
    )
    assert "gate_up" in str(report)


def test_several_schemes_are_weighed_together_and_quantizers_are_taken_by_name() -> None:
    ids = ids_of(3, 128)
    alphas = [
        [one.alpha for one in awq(qwen(), ids, schemes, quantizer=quantizer, quiet=True).folded]
        for schemes, quantizer in (
            (["w2a16_g8_asym"], "rtn"),
            (["w4a16_sym"], "rtn"),
            (["w2a16_g8_asym", "w4a16_sym"], "rtn"),
            (["w2a16_g8_asym"], "hqq{iterations=2}"),
        )
    ]
    assert len({tuple(one) for one in alphas}) == len(alphas)


def test_mistakes_are_named() -> None:
    model, ids = qwen(), ids_of(0)
    for scheme in ("w8a8_sym", "w4a8_g32_sym_iscale", "bf16"):
        with pytest.raises(NotWeightOnly, match=f"{scheme} is no weight-only scheme"):
            awq(model, ids, [SCHEME, scheme])
    with pytest.raises(BadOption, match=r"schemes=\(\)"):
        awq(model, ids, [])
    with pytest.raises(BadOption, match="rows=0"):
        awq(model, ids, [SCHEME], rows=0)
