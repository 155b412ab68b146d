"""The real kernels over random packed weights, interpreted: in a process of their own, and a launch by itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from group_gemm import read_rows
from moe_operands import tokens_of
from moe_workloads import MODELS, Cell

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "group_gemm.py"


@pytest.mark.slow
def test_kernels_agree_with_float32_on_random_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "found.csv"
    names = ["ours_w4a16_g128_asym", "ours_hot025"]
    options = ["--dry-run", "--tokens", "1", "--parts", "gate_up", "block", "--out", str(out), "--contenders", *names]
    subprocess.run([sys.executable, str(SCRIPT), *options], check=True, capture_output=True, timeout=300)
    rows = read_rows(out)
    assert {row["contender"] for row in rows} == set(names)
    for row in rows:
        assert row["status"] == "ok", row
        # a product is as exact as its 16-bit output; a block also rounds what it quantizes
        assert float(row["error"]) < (0.005 if row["part"] == "gate_up" else 0.05), row


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_rows_are_sorted_before_a_launch_that_reads_them_so(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from mxmoe.backends.triton import hopper, launch

    bank: Any = pytest.importorskip("random_bank")
    ran: list[int] = []

    def run_hopper(matrices: Any, config: Any, rows: Any, *given: Any, **_: object) -> None:  # noqa: ANN401
        """The whole kernel in the same tiles, instead of one that no interpreter runs."""
        ran.append(len(rows.codes[0]))
        launch.run_gemm(matrices, replace(config, warps=8, per_sm=0), rows, *given, gather=False)

    monkeypatch.setattr(hopper, "run_hopper", run_hopper)
    monkeypatch.setattr(bank, "config_for", lambda gemm, *_: hopper.config_for(gemm))
    cell = Cell(MODELS["tiny"], 5, part)
    x, ids = tokens_of(cell, "cpu"), torch.rand((5, 8)).argsort(dim=1)[:, :2].contiguous()
    ids[2, 1] = 8  # padding
    for scheme in ("w8a8_sym", "bf16"):
        product = bank.prepare(cell, [[scheme] * 8], "cpu", 0)
        bound = product.bind(x, ids, torch.ones(5, 2))
        assert not ran, "nothing runs before the launch"
        assert bound.check() < 0.005
        assert ran == [10], "by assignment"
        ran.clear()
