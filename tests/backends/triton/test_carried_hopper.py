"""What a call launches on an H200 that is not here: the divided kernel, where launches there take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mxmoe.backends.triton import choose_ada
from mxmoe.backends.triton.carried import Job, Kernel, compile_calls, install
from mxmoe.backends.triton.rehearsal import GPUS, standing_in
from mxmoe.backends.triton.tiles import DIVIDED_WARPS, Gemm
from mxmoe.backends.triton.tuned import for_device
from mxmoe.ir import Scheme, print_ir

from .small_blocks import Small
from .test_carried import job as both_banks

HOPPER, TOKENS = 90, 16
MOST_SHARED = 232_448
"""Bytes that a program may have on sm_90."""
MOST_STACK = 64
"""Bytes of a thread with 4-bit weights and a gate: a few scalars wait there while a tile is multiplied."""
PRODUCTS = {"w8a8_sym": "IGMMA", "w4a8_g128_sym": "IGMMA", "w8a8_e4m3": "QGMMA", "bf16": "HGMMA"}
"""Scheme -> the matrix products that it must have."""
MIXES = (("w8a8_sym", "w8a8_e4m3"), ("w4a8_g128_sym",), ("bf16",))


def job(names: tuple[str, ...]) -> Job:
    return Job(print_ir(Small(tuple(map(Scheme.parse, names)), 256, 128).module(), elide=None), (TOKENS,), HOPPER)


@cache
def carried(*names: str) -> Mapping[str, Kernel]:
    """As compiled in a process of its own."""
    return compile_calls(job(names), quiet=True)


def divided(kernels: Mapping[str, Kernel]) -> list[Kernel]:
    return [one for one in kernels.values() if one.name == "divided_gemm"]


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_machine_code_is_that_of_the_divided_kernel(names: tuple[str, ...]) -> None:
    kernels = carried(*names)
    assert not [name for name in kernels if name.startswith("group_gemm")], "every launch takes the divided kernel"
    assert len(divided(kernels)) == 2, "gate and up together, and down"
    wanted = {PRODUCTS[name] for name in names}
    for kernel in divided(kernels):
        facts = kernel.facts()
        assert (kernel.arch, facts.arch, kernel.num_warps) == (HOPPER, HOPPER, DIVIDED_WARPS)
        assert {stem for stem in PRODUCTS.values() if facts.count(stem)} == wanted
        assert facts.count("UTMALDG"), "operands come by tensor memory access"
        assert facts.shared_bytes <= MOST_SHARED
        if any(Scheme.parse(name).weight_bits == 4 for name in names):
            assert facts.stack_bytes <= MOST_STACK
        else:
            assert facts.spill_loads == facts.spill_stores == facts.stack_bytes == 0


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_every_launch_begins_early_and_waits_for_the_one_before(names: tuple[str, ...]) -> None:
    for kernel in carried(*names).values():
        assert kernel.metadata["launch_pdl"], kernel.name
        wait, lead = (kernel.ptx.find(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
        assert 0 < wait < lead, f"{kernel.name} lets others begin only when what came before it is done"
        assert kernel.ptx.find("ld.global") > wait, f"{kernel.name} reads nothing before"


def test_schemes_without_a_divided_body_have_the_whole_kernel() -> None:
    kernels = carried("w4a16_g128_sym")
    assert not divided(kernels)
    assert sum(name.startswith("group_gemm") for name in kernels) == 2


def test_banks_that_run_together_take_it_too() -> None:
    kernels = compile_calls(replace(both_banks("w8a8_sym", banks=("routed", "shared")), arch=HOPPER), quiet=True)
    assert "combine_both" in {one.name for one in kernels.values()}
    assert len(divided(kernels)) == 2, "gate and up of both banks, and down of both"


def test_calls_find_what_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty cache: the same calls add nothing to it, and get what went through bytes and back."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = {name: Kernel.from_bytes(one.to_bytes()) for name, one in carried("bf16").items()}
    assert made == carried("bf16")
    install(list(made.values()))
    before = sorted(tmp_path.rglob("*"))
    assert compile_calls(job(("bf16",)), quiet=True) == made
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("tokens", [1, 16, 512, 8192])
@pytest.mark.parametrize("name", ["bf16", "w8a8_e4m3", "w4a8_g128_sym", "w4a16_g128_sym"])
def test_tiles_are_those_of_an_h200(name: str, tokens: int) -> None:
    """Of a class that was measured there: where the measurement holds, and where the kernels have changed since."""
    gemm, nowhere = Gemm(1408, 2048, (Scheme.parse(name),) * 60, gated=True), torch.device("cpu")
    as_ever = choose_ada.config_for(gemm, tokens, 4, nowhere)
    there = choose_ada.choose(gemm, tokens, 4, HOPPER, for_device(GPUS[HOPPER]), divides=True)
    with standing_in(HOPPER):
        assert choose_ada.config_for(gemm, tokens, 4, nowhere) == there
    assert choose_ada.config_for(gemm, tokens, 4, nowhere) == as_ever
    with standing_in(89):
        assert choose_ada.config_for(gemm, tokens, 4, nowhere) == as_ever
    assert as_ever.warps != DIVIDED_WARPS, "a machine without a GPU runs the whole kernel"
