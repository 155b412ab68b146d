"""The real kernels over random packed weights, interpreted, in a process of their own: the mode is chosen once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from group_gemm import read_rows

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
