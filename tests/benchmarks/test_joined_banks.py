"""Every way to run two banks, over a small block in the interpreter."""

from __future__ import annotations

from typing import Any

import joined_banks
import pytest
import torch

import mxmoe

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs there")

SMALL = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def test_all_ways_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_banks, "SIZES", SMALL)
    compiled: Any = mxmoe.compile(joined_banks.block("cpu"), "triton-sm90", schemes="w8a8_sym", quiet=True)
    (run,) = compiled.compilation.executables.values()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((3, 64), generator=generator).bfloat16()
    index = torch.rand((3, 4), generator=generator).topk(2).indices
    made = {
        name: way.run_block(hidden, index, torch.ones((3, 2)).bfloat16() / 2)
        for name, way in joined_banks.ways(run, 3, 2).items()
    }
    assert list(made) == ["apart_us", "joined_us", "joined_whole_us"]
    for bank in ("routed", "shared"):
        exact = made["apart_us"][bank].float()
        assert exact.norm() > 0
        for one in made.values():
            assert (one[bank].float() - exact).norm() < joined_banks.MOST_ERROR * exact.norm()
