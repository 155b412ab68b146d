"""Peers as far as they run without a GPU, the blocks of vLLM's kernel, and the published figures."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fetch_peers import jitted
from moe_contender import Contender, Unsupported, by_name, check_rows
from moe_operands import metadata, quantize_rows, sorted_rows, stored, tokens_of, widened
from moe_peers import PUBLISHED, aligned, fused_tiles, peers, torch_bf16
from moe_workloads import MODELS, PARTS, Cell, rotations
from peer_triton_kernels import dequantize_mxfp4

TINY = MODELS["tiny"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_torch_agrees_with_float32(part: str, tokens: int) -> None:
    ready = torch_bf16(Cell(TINY, tokens, part), "cpu")
    assert ready.check() < 0.01
    assert ready.counts.sum() == tokens * TINY.top_k
    for launch in ready.launches:
        assert torch.isfinite(launch()).all()


def test_a_wrong_row_is_noticed() -> None:
    cell = Cell(TINY, 16, "gate_up")
    turn = rotations(cell, 16, device="cpu")[0]
    weight = widened(stored("bf16", *cell.gemms[0], TINY.experts, 1, "cpu")[0])
    inputs = sorted_rows(cell, tokens_of(cell, "cpu"), turn)
    experts = turn.ids.flatten()[turn.order].tolist()
    found = torch.stack([inputs[row].float() @ weight(expert).T for row, expert in enumerate(experts)])
    assert check_rows(found, turn, inputs, weight) < 1e-5
    found[-1] = found[0]
    assert check_rows(found, turn, inputs, weight) > 0.1


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantized_weights_and_rows_come_back(kind: str) -> None:
    weight, scale = stored(kind, 64, 128, 4, 1, "cpu")[0]
    assert float(widened((weight, scale))(2).std()) == pytest.approx(128**-0.5, rel=0.3)
    x = torch.randn(16, 128)
    codes, steps = quantize_rows(x, kind)
    assert float((codes.float() * steps - x).norm() / x.norm()) < (0.05 if kind == "fp8" else 0.01)


def test_metadata_is_that_of_the_rotation() -> None:
    turn = rotations(Cell(TINY, 16, "block"), 16, device="cpu")[1]
    order, ends = metadata(turn, TINY.experts)
    assert torch.equal(order, turn.order)
    assert torch.equal(ends, turn.ends)


@pytest.mark.parametrize("height", [16, 64])
def test_blocks_hold_every_row_of_their_expert_once(height: int) -> None:
    turn = rotations(Cell(TINY, 50, "gate_up"), 16, device="cpu")[0]
    ids, experts, total, length = aligned(turn, height)
    assert int(total) == length == ids.numel() == experts.numel() * height
    rows = turn.order.numel()
    assert sorted(ids[ids < rows].tolist()) == list(range(rows))
    for block, expert in enumerate(experts.tolist()):
        mine = ids[block * height : (block + 1) * height]
        assert set(turn.ids.flatten()[mine[mine < rows].long()].tolist()) == {expert}


def test_mxfp4_values_by_hand() -> None:
    codes = torch.full((1, 16), 0x17, dtype=torch.uint8)  # low half 7: 6.0, high half 1: 0.5
    codes[0, 1] = 0x9F  # low half 15: -6.0, high half 9: -0.5
    values = dequantize_mxfp4(codes, torch.tensor([[128]], dtype=torch.uint8))
    assert values.shape == (1, 32)
    assert values[0, :4].tolist() == [12.0, 1.0, -12.0, -1.0]


def test_published_figures_cover_every_class_of_every_cell() -> None:
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {(row["model"], row["tokens"], row["part"], row["weight_class"]) for row in rows}
    assert len(cells) == 3 * 6 * 3 * 3
    assert all(np.isfinite(float(row["time_us"])) for row in rows)
    assert fused_tiles("fp8", Cell(MODELS["mixtral"], 8192, "gate_up")).count("/") == 5
    assert fused_tiles("fp8", Cell(TINY, 16, "gate_up")) == "16/64/128/1/4/5"


def test_packages_that_are_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_fused_moe", None)
    one = next(peer for peer in peers() if peer.name == "vllm_bf16")
    with pytest.raises(Unsupported, match="vllm_fused_moe"):
        one.make(Cell(TINY, 16, "gate_up"), "cpu")


def test_contenders_are_chosen_by_name_or_beginning() -> None:
    every: list[Contender] = peers()
    assert {one.name for one in by_name(every, ["tk*", "torch_fp8"])} == {
        "torch_fp8", "tk_bf16", "tk_fp8", "tk_mxfp4", "tk_mxfp4_4w",
    }  # fmt: skip
    assert by_name(every, None) == every
    with pytest.raises(SystemExit, match="no contender tk_fp9"):
        by_name(every, ["tk_fp9"])


def test_only_compiled_functions_are_taken_from_a_wheel(tmp_path: Path) -> None:
    source = "import vllm\n\n@triton.jit\ndef kernel(x):\n    return x\n\ndef host():\n    return vllm\n"
    taken = jitted(source)
    assert "def kernel" in taken
    assert "vllm\n" not in taken.split("\n", 1)[1]
    assert "def host" not in taken
    compile(taken, str(tmp_path / "taken.py"), "exec")
