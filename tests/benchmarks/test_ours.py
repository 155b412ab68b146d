"""Our contenders over a stand-in backend: what they ask for, what they launch, and that a launch per scheme adds up."""

from __future__ import annotations

import pytest
import torch
from group_gemm import measure
from moe_plans import INT8, W4A8
from moe_workloads import MODELS, PARTS, Cell
from ours import mixed, ours, split, uniform

TINY = MODELS["tiny"]
CELL = Cell(TINY, 16, "gate_up")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["ours_w8a8_sym", "ours_w4a16_g128_asym", "ours_hot025"])
def test_a_row_comes_out(name: str, part: str, fake_backend: list[tuple[str, ...]]) -> None:
    one = next(own for own in ours() if own.name == name)
    row = measure(one, Cell(TINY, 16, part), "cpu")
    assert row["status"] == "ok"
    assert float(row["error"]) < 0.01
    assert row["bound"] == ("mixed" if one.weight_class == "mixed" else "memory")
    assert float(row["roof_us"]) > 0
    assert fake_backend


def test_uniform_contenders_ask_for_one_scheme(fake_backend: list[tuple[str, ...]]) -> None:
    uniform(W4A8, CELL, "cpu")
    assert {scheme for asked in fake_backend for scheme in asked} == {W4A8}


def test_a_plan_keeps_its_routing_and_changes_its_weights(fake_backend: list[tuple[str, ...]]) -> None:
    ready = mixed("hot:0.25", CELL, "cpu")
    assert len(ready.launches) == len(fake_backend) > 1
    assert set(fake_backend) == {fake_backend[0]}
    assert fake_backend[0].count(INT8) == 2
    first, second = ready.launches[0](), ready.launches[1]()
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_one_launch_per_scheme_covers_every_row_once(fake_backend: list[tuple[str, ...]]) -> None:
    apart = split("hot:0.25", False, CELL, "cpu").launches[0]()
    assert len(apart) == 2
    assert not ((apart[0] != 0).any(1) & (apart[1] != 0).any(1)).any()
    whole = mixed("hot:0.25", CELL, "cpu").launches[0]()
    # the stand-in's weights know no scheme, so the parts add up to the whole
    torch.testing.assert_close(apart[0] + apart[1], whole)
    assert {len(set(asked)) for asked in fake_backend} == {1, 2}
