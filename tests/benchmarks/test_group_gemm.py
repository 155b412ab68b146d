"""The command: cells in and rows out, cells that are there are skipped, what breaks is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import group_gemm
import pytest
from group_gemm import KEY, STUB, arguments, cells, main, measure, read_rows
from moe_contender import Contender, Prepared, Unsupported
from moe_workloads import MODELS, Cell

CELL = Cell(MODELS["tiny"], 16, "gate_up")


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_dry_run_writes_checked_rows_and_skips_them_the_next_time(tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    main(["--dry-run", "--out", str(out), "--tokens", "1"])
    rows = read_rows(out)
    assert [(row["part"], row["status"]) for row in rows] == [("gate_up", "ok"), ("down", "ok")]
    assert all(float(row["error"]) < 1e-3 and float(row["time_us"]) > 0 for row in rows)
    main(["--dry-run", "--out", str(out)])
    again = read_rows(out)
    assert again[:2] == rows
    assert len({tuple(row[key] for key in KEY) for row in again}) == len(again) == 4
    facts = json.loads(out.with_suffix(".json").read_text())
    assert len(facts["commands"]) == 2
    assert {"machine", "versions"} <= set(facts)


def test_no_cell_is_started_when_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.csv"
    main(["--dry-run", "--out", str(out), "--seconds", "0"])
    assert read_rows(out) == []
    assert "4 cells are left" in capsys.readouterr().out


def broken(error: Exception) -> Contender:
    def make(cell: Cell, device: str) -> Prepared:
        raise error

    return Contender("broken", "4bit", "w4a16", lambda _: 4.0, 2.0, "bf16", make)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unsupported("needs k % 256 == 0"), "unsupported: needs k % 256 == 0"),
        (RuntimeError("out\nof memory"), "failed: RuntimeError: out of memory"),
    ],
)
def test_what_breaks_becomes_a_row(error: Exception, status: str) -> None:
    row = measure(broken(error), CELL, "cpu")
    assert row["status"] == status
    assert "time_us" not in row


def test_a_lost_gpu_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure(broken(RuntimeError("CUDA error: an illegal memory access was encountered")), CELL, "cpu")


def test_failed_cells_are_tried_again_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.csv"
    command = ["--dry-run", "--out", str(out), "--contenders", "broken"]
    monkeypatch.setattr(group_gemm, "contenders", lambda: [broken(RuntimeError("no"))])
    main(command)
    assert len(read_rows(out)) == 6
    main(command)
    assert len(read_rows(out)) == 6
    main([*command, "--again"])
    assert len(read_rows(out)) == 12


def test_a_launch_far_from_float32_is_called_wrong() -> None:
    def make(cell: Cell, device: str) -> Prepared:
        ready = STUB.make(cell, device)
        return Prepared(ready.launches, lambda: 0.5, ready.counts)

    wrong = Contender("wrong", "bf16", "bf16", lambda _: 16.0, 2.0, "bf16", make)
    assert measure(wrong, CELL, "cpu")["status"] == "wrong"


def test_every_contender_has_its_cells() -> None:
    found = list(cells(arguments(["--models", "dsv3", "--tokens", "1", "512"])))
    assert all(one is not STUB for one, _ in found)
    assert {cell.tokens for _, cell in found} == {1, 512}
    blocks = {one.name for one, cell in found if cell.part == "block"}
    assert {"torch_bf16", "tk_fp8", "ours_w4a8_g128_sym", "ours_bits5"} <= blocks
    assert "vllm_fp8" not in blocks


@pytest.mark.usefixtures("no_backend")
def test_contenders_without_a_backend_say_so() -> None:
    ours = {one.name: one for one in group_gemm.contenders() if not one.is_peer}
    assert measure(ours["ours_bf16"], CELL, "cpu")["status"].startswith("unsupported: no kernels")
