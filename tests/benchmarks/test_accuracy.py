"""The accuracy study: its fast model is the definition, its plans are the pipeline's, and a short run makes a page."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import accuracy
import accuracy_speed
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from accuracy_bank import Layout, Mixed, Shelf, Tiles, fill_shelf
from accuracy_plans import BESIDE, METHODS, SETTINGS, Allocator, Job, jobs, settings_of
from accuracy_read import Margin, Table, spearman
from hypothesis import given, settings
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import mxmoe
from mxmoe.calib import collect_hessians, observe
from mxmoe.frontend import lift
from mxmoe.ir import Plan, Scheme, plan_of
from mxmoe.passes import Environment, parse_passes, run_passes
from mxmoe.quant import dequantize

SCHEMES = tuple(
    map(Scheme.parse, ("w2a16_g32_asym", "w4a16_g32_asym", "w4a4_g32_sym", "w5a5_sym", "w8a8_sym", "w8a8_e4m3"))
)
BLOCK = 32
# with some others a code lies at a rounding border, and sums in another order turn it
IDS = torch.arange(96).view(2, 48) * 5 % 64


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return Qwen2MoeForCausalLM(config).eval()


def shelf_of(model: Qwen2MoeForCausalLM, rotation: int | None, quantizer: str = "rtn") -> Shelf:
    layout = Layout.of(lift(model))
    hessians = collect_hessians(layout.lifted, IDS, quiet=True) if quantizer == "gptq" else None
    return fill_shelf(layout, SCHEMES, quantizer, hessians, rotation)


@pytest.mark.parametrize("rotation", [None, BLOCK])
@pytest.mark.parametrize("kind", ["mixed", *map(str, SCHEMES)])
def test_a_mixed_model_computes_what_the_eager_backend_does(
    model: Qwen2MoeForCausalLM, kind: str, rotation: int | None
) -> None:
    shelf = shelf_of(model, rotation)
    rows = shelf.layout.rows
    drawn = np.random.default_rng(0).integers(len(SCHEMES), size=len(rows))
    choice = [SCHEMES[i] if kind == "mixed" else Scheme.parse(kind) for i in drawn]
    mixed = Mixed(shelf.layout)
    mixed.take(shelf, choice)
    turned = {(row.block, row.bank): rotation for row in rows} if rotation else {}
    plan = Plan(dict(zip(rows, choice, strict=True)), rotations=turned)
    with torch.no_grad():
        found = mixed.model(input_ids=IDS).logits
        wanted = mxmoe.compile(copy.deepcopy(model), "eager", plan=plan, quiet=True)(input_ids=IDS).logits
        plain = model(input_ids=IDS).logits
    assert (found - wanted).norm() < 0.02 * (plain - wanted).norm()


def test_unquantized_it_is_the_model(model: Qwen2MoeForCausalLM) -> None:
    with torch.no_grad():
        found, wanted = (one(input_ids=IDS).logits for one in (Mixed(Layout.of(lift(model))).model, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.sampled_from([1, 6, 7]))
@settings(max_examples=100, deadline=None)
def test_tiles_hold_every_assignment_once_beside_its_own_expert(chosen: list[int], experts: int) -> None:
    expert = torch.tensor(sorted(one % experts for one in chosen))
    tiles = Tiles.of(expert, experts)
    assert len(set(tiles.slot.tolist())) == len(expert)
    assert torch.equal(tiles.expert[torch.div(tiles.slot, tiles.size, rounding_mode="floor")], expert)
    numbers = torch.arange(1, len(expert) + 1)
    laid = tiles.spread(numbers)
    assert len(laid) == len(tiles.expert) * tiles.size
    assert torch.equal(laid[tiles.slot], numbers)
    assert int(laid.sum()) == int(numbers.sum())


@pytest.mark.parametrize("rotation", [None, BLOCK])
def test_a_shelf_holds_what_the_quantizer_gives_one_by_one(model: Qwen2MoeForCausalLM, rotation: int | None) -> None:
    shelf = shelf_of(model, rotation, "gptq")
    lifted = shelf.layout.lifted
    weights = lifted.weights.using("gptq", collect_hessians(lifted, IDS, quiet=True))
    if rotation:
        weights = weights.rotated({name: rotation for name in lifted.weights if name.endswith(".down")})
    for row in shelf.layout.rows:
        for scheme in SCHEMES[:3]:
            found = shelf.one(f"{row.block}.{row.bank}[{row.expert}].{row.role}", scheme)
            wanted = weights.quantized(f"{row.block}.{row.bank}.{row.role}", row.expert, scheme)
            assert (found.codes != wanted.codes).float().mean() < 0.02  # codes near a rounding border may differ
            torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-2, atol=0)


def test_sensitivities_are_of_the_codes_on_the_shelf(model: Qwen2MoeForCausalLM) -> None:
    shelf = shelf_of(model, None, "gptq")
    stats = observe(shelf.layout.lifted, IDS, schemes=SCHEMES, quantizer=shelf.quantizer(), quiet=True, min_tokens=0)
    row = shelf.layout.rows[-1]
    weight = shelf.layout.dense((row.bank, row.role))[-1]
    for column, scheme in enumerate(SCHEMES[:2]):
        q = shelf.one(f"{row.block}.{row.bank}[{row.expert}].{row.role}", scheme)
        changed = stats.sensitivity(row.block, row.bank, row.role)[row.expert, column]
        assert changed > 0
        assert not torch.equal(dequantize(q), weight)


@pytest.mark.parametrize("name", ["squared", "mxmoe", "fisher, per expert", "pmq"])
def test_plans_are_those_of_the_pipeline(
    model: Qwen2MoeForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = ("w2a16_g32_asym", "w4a16_g32_asym")
    monkeypatch.setitem(SETTINGS, "test", accuracy.SETTINGS["2.25"].__class__(4.0, candidates, ()))
    lifted = lift(model, candidates=[Scheme.parse(scheme) for scheme in candidates])
    stats = observe(lifted, IDS, schemes=SCHEMES, gradients=True, quiet=True)
    allocator = Allocator(Layout.of(lifted), stats)
    found = allocator.plan(Job("study", "rtn", 0, "test", name))
    method = METHODS[name]
    options = f"granularity={method.granularity} budget-per={method.budget_per} weight-bits=4.0 r=1"
    steps = f'annotate-sensitivity{{method="{method.sensitivity}"}},annotate-cost,allocate-bits{{{options}}}'
    wanted = plan_of(run_passes(lifted.module, parse_passes(steps), Environment(stats)))
    assert dict(zip(allocator.layout.rows, found, strict=True)) == wanted.rows
    assert wanted.allocation is not None
    if name == "squared":
        assert math.isclose(allocator.predicted("squared", found), wanted.allocation.loss, rel_tol=1e-6)


def test_jobs_come_once_and_the_claims_first() -> None:
    listed = jobs([0, 1, 2])
    assert len({job.key for job in listed}) == len(listed)
    place = {job.key: number for number, job in enumerate(listed)}
    for seed in "012":
        assert place["study", "gptq", seed, "2.25", "fisher"] < place["study", "rtn", "0", "4.25", "pmq"]
    assert sum(job.model == "study" and job.quantizer == "gptq" and job.seed == 0 for job in listed) >= 40
    for setting in (name for name, one in SETTINGS.items() if one.bits):
        for quantizer in ("rtn", "gptq", "gptq+hadamard"):
            for seed in (0, 1, 2):
                same = [
                    j
                    for j in listed
                    if (j.model, j.setting, j.quantizer, j.seed) == ("study", setting, quantizer, seed)
                ]
                assert {job.method for job in same} >= {*METHODS, "random"}
    for quantizer in BESIDE:
        assert {job.setting for job in listed if job.quantizer == quantizer} == {*settings_of(quantizer)}
        assert {job.method for job in listed if job.quantizer == quantizer and job.setting == "2.5"} <= {
            "fisher",
            "all w2a16_g64_asym",
        }


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=20, unique=True))
@settings(max_examples=50, deadline=None)
def test_ranks_see_only_order(values: list[int]) -> None:
    grown = [math.exp(value / 10) for value in values]
    assert math.isclose(spearman(values, grown), 1.0)
    assert math.isclose(spearman(values, [-value for value in grown]), -1.0)


def test_equal_values_share_their_rank() -> None:
    assert math.isclose(spearman([1, 1, 2], [1, 2, 3]), math.sqrt(3) / 2)
    assert math.isnan(spearman([1, 2], [1, 2]))


def test_a_margin_is_clear_beyond_twice_its_noise() -> None:
    clear = Margin.of({0: 1.0, 1: 1.1, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 2.1})
    assert clear.is_clear
    assert math.isclose(clear.mean, 1.0, rel_tol=1e-9)
    assert not Margin.of({0: 1.0, 1: 3.0}, {0: 2.0, 1: 3.0}).is_clear
    assert not Margin.of({0: 1.0}, {0: 2.0}).is_clear
    assert Margin.of({0: 1.0, 1: 1.1}, {5: 2.0}).seeds == 2
    assert str(Margin.of({}, {0: 1.0})) == "–"


def test_a_short_run_measures_and_writes_the_page(tmp_path: Path) -> None:
    quantizers = ("rtn", "gptq", "gptq+hadamard", "rtn+hadamard")
    accuracy.main(["--smoke", "--results", str(tmp_path), "--docs", str(tmp_path), "--quantizers", *quantizers])
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["held_ppl"]) > 0 and float(row["held_kl"]) >= 0 for row in rows)
    assert all(float(row["weight_bits"]) <= 2.25 + 1e-6 for row in rows if row["setting"] == "2.25")
    floor = next(row for row in rows if row["setting"] == "bf16")
    assert float(floor["held_kl"]) < 1e-6
    about = json.loads((tmp_path / "accuracy.json").read_text())
    assert about["plans"] == len(rows) == len({tuple(row.values())[:5] for row in rows})
    assert not about["plans_left_out"]
    page = (tmp_path / "accuracy.md").read_text()
    assert all(f"### ({letter}) " in page for letter in "abcdef")
    assert "nan" not in page
    assert (tmp_path / "images" / "accuracy-ranks.png").stat().st_size > 1000
    assert len(Table.read(tmp_path / "accuracy.csv").lines) == len(rows)


def test_a_run_that_was_cut_is_resumed_and_another_model_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--smoke", "--results", str(tmp_path), "--docs", str(tmp_path), "--quantizers", "rtn", "smoothquant"]
    accuracy.main(common)
    whole = Table.read(tmp_path / "accuracy.csv").lines
    assert {line.quantizer for line in whole} == {"none", "rtn", "smoothquant"}
    text = (tmp_path / "accuracy.csv").read_text().splitlines(keepends=True)
    (tmp_path / "accuracy.csv").write_text("".join(text[:-3]))
    accuracy.main([*common, "--resume"])
    again = Table.read(tmp_path / "accuracy.csv").lines
    assert [(line.method, line.added) for line in again] == [(line.method, line.added) for line in whole]
    about = json.loads((tmp_path / "accuracy.json").read_text())
    assert about["command"].count("accuracy.py") == 2
    about["texts"]["held_out"] += 1
    (tmp_path / "accuracy.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="another texts"):
        accuracy.main([*common, "--resume"])


def test_the_observation_gives_what_full_passes_give(tmp_path: Path) -> None:
    accuracy_speed.main(["--smoke", "--results", str(tmp_path), "--schemes", "w4a16_g128_asym", "w2a16_g128_asym"])
    figures = json.loads((tmp_path / "accuracy_speed.json").read_text())["figures"]
    assert figures["full passes of the definition"] == 5 * 3 * 2
    assert len(figures["sampled"]) == 2
    for one in figures["sampled"]:
        assert math.isclose(one["observed"], one["squared_change"], rel_tol=2e-3)
