"""Predicted against measured: points, ranks by hand, and the whole way over a stand-in backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_plans import plan_of, target_costs
from moe_workloads import MODELS, TOKENS, Cell
from predict_plans import Point, agreement, held_out, main, points, predicted_us, ranks, read, spearman

from mxmoe.ir import Scheme

REAL = ["qwen15_moe", "mixtral", "dsv3"]
UNIFORM = ("bf16", "w8a8_sym", "w8a8_e4m3", "w4a8_g128_sym_iscale", "w4a16_g128_asym")


def test_there_are_enough_points_and_no_two_alike() -> None:
    found = points(REAL, TOKENS)
    assert len({point.key for point in found}) == len(found) >= 60
    assert len({point.plan for point in found}) == len(found)
    assert {point.cell.part for point in found} == {"gate_up", "down"}


def test_a_point_does_not_depend_on_which_others_are_asked_for() -> None:
    every = {point.key for point in points(REAL, TOKENS)}
    assert {point.key for point in points(["dsv3"], [512])} <= every


def test_ranks_share_ties() -> None:
    assert ranks([10.0, 30.0, 20.0, 20.0]).tolist() == [0.0, 3.0, 1.5, 1.5]


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=30, unique=True))
@settings(max_examples=50, deadline=None)
def test_rank_correlation_ignores_what_keeps_the_order(values: list[float]) -> None:
    array = np.array(values)
    assert spearman(array, np.log(array) * 7) == pytest.approx(1)
    assert spearman(array, -array) == pytest.approx(-1)
    assert np.isnan(spearman(array, np.ones_like(array)))


def test_agreement_by_hand() -> None:
    found = agreement([110.0, 180.0, 300.0], [100.0, 200.0, 300.0])
    assert found["median_error_percent"] == pytest.approx(10)
    assert found["worst_error_percent"] == pytest.approx(10)
    assert found["spearman"] == 1
    assert found["median_ratio"] == 1


@pytest.mark.parametrize("plan", [*(f"all:{name}" for name in UNIFORM), "hot:0.25"])
@pytest.mark.parametrize("model", REAL)
def test_more_rows_take_longer(model: str, plan: str) -> None:
    costs = target_costs()[0]
    for part in ("gate_up", "down"):
        times = [predicted_us(Point(Cell(MODELS[model], tokens, part), plan), costs) for tokens in TOKENS]
        # factors of a profile have four digits
        assert times == pytest.approx(sorted(times), rel=1e-3)
        assert 0 < times[0] < times[2] < times[3] < times[4] < times[5]


def test_measure_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_backend: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    out, image = tmp_path / "found.csv", tmp_path / "found.png"
    main(["measure", "--dry-run", "--out", str(out)])
    rows = read(out)
    assert [row["status"] for row in rows] == ["ok"] * 8
    asked = len(fake_backend)
    main(["measure", "--dry-run", "--out", str(out)])
    assert len(fake_backend) == asked, "points that are there are not measured again"
    assert fake_backend[0] == plan_of(rows[0]["plan"], Cell(MODELS["tiny"], 1, "gate_up"))[0]
    main(["--out", str(out), "--image", str(image), "--folds", "0"])
    figures: dict[str, Any] = json.loads((tmp_path / "predict_plans.json").read_text())["figures"]
    assert figures["all"]["points"] == 8
    assert len(figures["points"]) == 8
    assert image.stat().st_size > 10_000


def test_mixes_are_predicted_by_profiles_that_never_saw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Scheme.parse("w8a8_sym"), Scheme.parse("w4a8_g128_sym")
    # each mix of its own time; were it fitted on, the profile would come close
    odd = [(4096, 4096, {a: {4: 2}, b: {4: 6}}, 60.0 * 8**at) for at in range(2)]
    even = [(4096, 4096, {one: {4: 8}}, 60.0) for one in (a, b)]
    monkeypatch.setattr("mxmoe.backends.triton.profile.launches", lambda *_: [*even, *odd])
    found = held_out(2)
    assert (found["folds"], found["points"]) == (2, 2)
    assert found["median_error_percent"] > 100


@pytest.mark.usefixtures("no_backend")
def test_without_a_backend_the_points_are_left_open(tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    main(["measure", "--dry-run", "--out", str(out), "--tokens", "1"])
    assert all(row["status"].startswith("failed: no kernels") for row in read(out))
