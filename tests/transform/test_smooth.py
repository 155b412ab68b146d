"""SmoothQuant balances activations against weights, keeps the function, and says what it could not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mxmoe.calib import observe
from mxmoe.errors import BadOption, NothingToFold
from mxmoe.frontend import lift
from mxmoe.transform import activation_profile, plant_outliers, smooth
from mxmoe.transform.edges import find_edges
from mxmoe.transform.rows import run_rows
from mxmoe.transform.smooth import _Largest

from .models import FORMS, HIDDEN, TRANSFORMERS, WIDTH, Block, Layer, Model, distance, ids_of, own_model, qwen, run


@given(
    form=st.sampled_from(list(FORMS)),
    seed=st.integers(0, 2**16),
    alpha=st.floats(0, 1),
    exact=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_function_stays(form: str, seed: int, alpha: float, exact: bool) -> None:
    model = own_model(form, seed=seed, n_layers=1)
    ids = ids_of(seed)
    before = run(model, ids)
    report = smooth(model, ids, alpha, exact=exact, quiet=True)
    assert distance(run(model, ids), before) < 1e-9
    assert {one.role for one in report.folded} == {"gate_up", "down"}
    assert all(share == 1 for share in report.agreement.values())
    assert set(report.agreement) == ({"layers.0.mlp"} if "list" not in form else set())
    skipped = [(one.bank, one.role) for one in report.skipped]
    assert skipped == ([("routed", "down")] if form == "ungated" else [])


def test_activations_and_weights_reach_equally_far_in_the_middle() -> None:
    """With alpha 1/2, max|X_j| and max|W_j| are equal afterwards for an expert alone: both are their geometric mean."""
    model = own_model("stack", n_layers=1)
    ids = ids_of(0, 400)
    smooth(model, ids, 0.5, roles=("down",), quiet=True)
    (edge,) = find_edges(lift(model))
    largest = _Largest.of(edge)
    run_rows(lift(model), ids, lambda block, bank, expert, rows: largest.add(bank, expert, rows), title="", quiet=True)
    assert len(largest.downs) == 5
    for (bank, expert), most in largest.downs.items():
        weight = edge.experts[bank][expert].weights["down"].abs().amax(0).float()
        torch.testing.assert_close(most, weight, rtol=1e-4, atol=1e-6)
    # and there is nothing left to do
    assert all(abs(s - 1).max() < 1e-4 for b in edge.experts for s in largest.down_scales(b, 0.5).values())


def test_the_shared_scale_is_the_largest_over_experts_and_router() -> None:
    model = own_model("stack", n_layers=1)
    ids = ids_of(0, 400)
    (edge,) = find_edges(lift(model))
    largest = _Largest.of(edge)
    run_rows(lift(model), ids, lambda block, bank, expert, rows: largest.add(bank, expert, rows), title="", quiet=True)
    found = largest.input_scale(0.5)
    x = torch.stack(list(largest.inputs.values()))
    own = {key: edge.experts[key[0]][key[1]].weights for key in largest.inputs}
    pairs = [(seen, torch.cat((own[key]["gate"], own[key]["up"]))) for key, seen in largest.inputs.items()]
    pairs.append((x.amax(0), model.layers[0].mlp.gate.weight.detach()))
    wanted = [(seen.double() / weight.abs().amax(0).double()).sqrt() for seen, weight in pairs]
    assert len(wanted) == 4 + 1 + 1
    torch.testing.assert_close(found, torch.stack(wanted).amax(0), rtol=1e-5, atol=0)
    with torch.no_grad():
        model.layers[0].mlp.shared_expert_gate.weight[:, 3] = 1e-9
    assert torch.equal(largest.input_scale(0.5), found)


@pytest.mark.parametrize("scheme", ["w8a8_sym", "w4a8_g16_sym_iscale"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_outliers_go_and_quantized_activations_lose_less(name: str, scheme: str) -> None:
    model = TRANSFORMERS[name]()
    ids = ids_of(3, 256)
    before = run(model, ids)
    plant_outliers(model, channels=2, factor=64.0)
    worse = observe(lift(model), ids, schemes=[scheme], quiet=True)
    heavy = activation_profile(model, ids, quiet=True)
    report = smooth(model, ids, quiet=True)
    better = observe(lift(model), ids, schemes=[scheme], quiet=True)
    light = activation_profile(model, ids, quiet=True)
    assert distance(run(model, ids), before) < 1e-5
    assert all(share > 0.99 for share in report.agreement.values())
    for a, b in zip(heavy.lines, light.lines, strict=True):
        assert b.peak < 0.5 * a.peak
    for key, bank in better.banks.items():
        for role, error in bank.squared_error.items():
            assert error.sum() < 0.5 * worse.banks[key].squared_error[role].sum(), (key, role)


def test_exact_scales_change_no_bit_of_bfloat16() -> None:
    model = qwen(torch.bfloat16)
    ids = ids_of(0)
    before = run(model, ids)
    report = smooth(model, ids, exact=True, quiet=True)
    assert torch.equal(run(model, ids), before)
    assert all(share == 1 for share in report.agreement.values())
    assert any(one.high > 1 for one in report.folded)


def test_experts_and_channels_without_tokens_stay() -> None:
    model = own_model("stack", n_layers=1)
    with torch.no_grad():
        model.layers[0].mlp.gate.weight.copy_(torch.eye(4, HIDDEN))
        model.embed.weight[:, :4] = torch.tensor([2.0, 1.0, -1.0, -2.0]).double()
        model.embed.weight[:, 7] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = smooth(model, ids_of(0), quiet=True)
    experts = model.layers[0].mlp.experts
    assert next(one.experts for one in report.folded if one.bank == "routed") == 2
    assert torch.equal(experts.down_proj[2:], before["layers.0.mlp.experts.down_proj"][2:])
    gates = before["layers.0.mlp.experts.gate_up_proj"][:, :WIDTH]
    assert torch.equal(experts.gate_up_proj[:, :WIDTH, 7], gates[:, :, 7])
    assert not torch.equal(experts.gate_up_proj[:, :WIDTH, 8], gates[:, :, 8])


def test_a_block_alone_folds_down_only_and_says_why() -> None:
    block = Block("list").double()
    x = torch.randn(20, HIDDEN).double()
    before = block(x)
    report = smooth(block, x, quiet=True)
    torch.testing.assert_close(block(x), before, rtol=1e-9, atol=1e-9)
    assert [(one.bank, one.role, one.experts) for one in report.folded] == [
        ("routed", "down", 4),
        ("shared", "down", 1),
    ]
    assert [(one.role, one.reason.split(",")[0]) for one in report.skipped] == [("gate_up", "it was given alone")]
    assert "left moe all gate_up: it was given alone" in str(report)
    assert str(report).splitlines()[0].split() == [
        "block", "bank", "role", "experts", "scales", "alpha", "error", "routing",
    ]  # fmt: skip


def test_experts_alone_take_rows_with_their_routing() -> None:
    experts = FORMS["stack"]().double()
    x, index = torch.randn(30, HIDDEN).double(), torch.randint(4, (30, 2))
    weights = torch.rand(30, 2).double()
    experts.top_k = 2
    before = experts(x, index, weights)
    report = smooth(experts, (x, index, weights), quiet=True)
    torch.testing.assert_close(experts(x, index, weights), before, rtol=1e-9, atol=1e-9)
    assert [one.role for one in report.folded] == ["down"]


def test_data_that_can_be_read_once_is_enough() -> None:
    ids = ids_of(0)
    one, other = own_model("stack"), own_model("stack")
    report = smooth(one, (row[None] for row in ids), quiet=True)
    assert report == smooth(other, ids, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_mistakes_are_named() -> None:
    model = Model([Layer(Block("ungated"), norm=nn.Identity())])
    model.layers[0].mlp.shared_expert = nn.Identity()
    with pytest.raises(NothingToFold, match=r"(?s)smooth can fold nothing.*no norm makes its input.*act silu"):
        smooth(model, ids_of(0))
    with pytest.raises(BadOption, match=r"alpha=1\.5"):
        smooth(model, ids_of(0), 1.5)
    with pytest.raises(BadOption, match="they are of gate_up, down"):
        smooth(model, ids_of(0), roles=("gate",))
