"""Bytes are counted once, and what is left is named with its reason."""

from __future__ import annotations

from torch import nn

from mxmoe.frontend import lift

from .blocks import MLP, PROJ, ListBlock, StackBlock

EXPERT = 3 * 16 * 24 * 4
"""Bytes of one expert of these blocks in float32."""


def test_bytes_of_a_model() -> None:
    model = nn.Sequential(StackBlock(), ListBlock(), MLP(16, 8, PROJ, nn.SiLU()))
    report = lift(model).report()
    assert [(t.path, t.experts, t.n_bytes) for t in report.taken] == [
        ("0.experts", 4, 4 * EXPERT),
        ("1.experts", 4, 4 * EXPERT),
    ]
    assert report.bytes_lifted == report.bytes_found == 8 * EXPERT
    assert {(s.path, s.kind, s.n_bytes) for s in report.skipped} == {
        ("0.gate", "torch", 256),
        ("1.gate", "torch", 256),
        ("2", "dense", 3 * 16 * 8 * 4),
    }


def test_experts_that_are_not_lifted_are_found_but_missing() -> None:
    model = nn.Sequential(StackBlock(), nn.Module())
    model[1].experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 4, bias=False)) for _ in range(2))
    report = lift(model).report()
    assert report.bytes_lifted == 4 * EXPERT
    assert report.bytes_found == 4 * EXPERT + 2 * 12 * 4
    text = str(report)
    assert text.startswith("lifted 18,432 of 18,528 bytes of expert weights (99.5%)")
    assert "left 1.experts (ModuleList, 96 bytes): called experts, in a structure that is not known" in text


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(StackBlock(), StackBlock())
    model[1].experts.down_proj = model[0].experts.down_proj
    report = lift(model).report()
    assert sum(t.n_bytes for t in report.taken) == 8 * EXPERT
    assert report.bytes_lifted == 8 * EXPERT - 4 * EXPERT // 3
