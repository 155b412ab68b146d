"""
What `triton-sm89` would run on an RTX 4090, compiled without one: the right instruction, nothing spilled, room for it.

By default the schemes that the target offers, in one regime of rows each, and a mix; `--all-kernels` compiles every
scheme that has a body, in every regime. Results are cached by Triton, so that only changed kernels are compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton")

# loaded before anything of ours, which would have kernels interpreted: compiling in this process is quicker
import triton  # noqa: F401

from mxmoe.backends.triton.ahead import Binary, compile_all
from mxmoe.backends.triton.binaries import gemm_request
from mxmoe.backends.triton.choose_ada import HEIGHTS, REGIMES, RESIDENT_WARPS, ada_config, config_for
from mxmoe.backends.triton.cubin import LARGEST_PROGRAM_BYTES, occupancy
from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.mode import arch_of
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.device import unit_of
from mxmoe.ir import Scheme
from mxmoe.target import find_target

ADA = 89
OFFERED = tuple(map(Scheme.parse, ("bf16", *find_target("triton-sm89").candidates)))
OTHERS = tuple(
    scheme
    for scheme in map(
        Scheme.parse,
        ("fp16", "w8a8_e4m3", "w4a8_g128_sym_e4m3", "w4a8_sym", "w4a4_sym", "w8a16_sym", "w8a16_g128_asym", "w4a16_sym",
         "w4a16_g32_asym", "w4a16_g64_sym", "w3a16_asym", "w3a16_g128_sym", "w2a16_asym", "w2a16_g32_asym"),
    )
    if body_of(scheme)
)  # fmt: skip
ROWS = (4, 32, 64, 300)
"""A number of rows in each regime."""
INSTRUCTIONS = {
    "bf16": "HMMA.16816.F32.BF16",
    "fp16": "HMMA.16816.F32",
    "int8": "IMMA.16832.S8.S8",
    # plain Triton widens 4-bit integers; the launch on native units is tested in test_int4.py
    "int4": "IMMA.16832.S8.S8",
    "fp8": "QMMA.16832.F32.E4M3.E4M3",
}
"""Matrix unit -> what it is called in machine code."""


def gemm(schemes: tuple[Scheme, ...], is_gated: bool) -> Gemm:
    """Qwen1.5-MoE's: 60 experts of 2048 x 1408."""
    experts = tuple(schemes[expert % len(schemes)] for expert in range(60))
    return Gemm(1408, 2048, experts, gated=True) if is_gated else Gemm(2048, 1408, experts)


@lru_cache
def compiled(schemes: tuple[Scheme, ...], rows: int, is_gated: bool) -> Binary:
    one = gemm(schemes, is_gated)
    act = "silu" if is_gated else "none"
    request = gemm_request(one, ada_config(one, rows), arch=ADA, top_k=4, gather=is_gated, act=act)
    return compile_all([request])[0]


def cases() -> Iterator[object]:
    every = pytest.mark.every_kernel
    usual = {scheme: ROWS[at % len(ROWS)] for at, scheme in enumerate(OFFERED)}
    for scheme in (*OFFERED, *OTHERS):
        for rows in ROWS:
            for is_gated in (True, False):
                is_usual = usual.get(scheme) == rows and is_gated
                name = f"{scheme}-{rows}-{'gate_up' if is_gated else 'down'}"
                yield pytest.param((scheme,), rows, is_gated, id=name, marks=() if is_usual else every)
    mixes = ((OFFERED[3], *OFFERED[-2:]), OFFERED)
    for mix, rows in ((mixes[0], 32), (mixes[0], 300), (mixes[1], 4), (mixes[1], 300)):
        marks = () if (mix, rows) == (mixes[0], 32) else every
        yield pytest.param(mix, rows, True, id=f"mix-of-{len(mix)}-{rows}", marks=marks)


@pytest.mark.parametrize(("schemes", "rows", "is_gated"), list(cases()))
def test_machine_code(schemes: tuple[Scheme, ...], rows: int, is_gated: bool) -> None:
    binary = compiled(schemes, rows, is_gated)
    facts = binary.facts()
    for scheme in schemes:
        assert facts.count(INSTRUCTIONS[unit_of(scheme)]) > 0, facts.instructions
    units = {INSTRUCTIONS[unit_of(scheme)].split(".")[0] for scheme in schemes}
    assert {stem for stem in ("HMMA", "IMMA", "QMMA", "DMMA") if facts.count(stem)} == units
    assert facts.count("LDGSTS") > 0, "operands are copied while others are multiplied"
    assert facts.spill_loads == facts.spill_stores == facts.stack_bytes == 0
    assert facts.shared_bytes <= LARGEST_PROGRAM_BYTES[ADA]
    assert occupancy(facts, binary.num_warps) * binary.num_warps >= RESIDENT_WARPS


def test_products_are_those_of_the_tile() -> None:
    """A step of w8a8 with a gate, 64 channels, 16 rows: 2 x 64 x 16 x 128 multiply-adds, 16 x 8 x 32 each, 4 warps."""
    scheme = Scheme.parse("w8a8_sym")
    one = gemm((scheme,), True)
    request = gemm_request(one, ada_config(one, 4), arch=ADA, top_k=4, gather=True, act="silu")
    facts = compile_all([request])[0].facts()
    assert facts.count("IMMA") == 2 * 64 * 16 * 128 // (16 * 8 * 32) // 4


@pytest.mark.parametrize(
    ("rows", "regime"), [(1, 0), (16, 0), (16.5, 1), (32, 1), (33, 2), (96, 2), (97, 3), (4096, 3)]
)
def test_regimes(rows: float, regime: int) -> None:
    one = gemm(OFFERED, True)
    config = ada_config(one, rows)
    assert config.shape(Scheme.parse("w8a8_sym")).heights == HEIGHTS[regime]
    assert config.shape(Scheme.parse("w3a16_g128_asym")).heights == HEIGHTS[min(regime, 2)]
    assert config.shape(Scheme.parse("w4a8_g128_sym")).heights == HEIGHTS[min(regime, 2)]
    assert len(HEIGHTS) == len(REGIMES) + 1


def test_ada_tiles_are_chosen_for_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    one = gemm(OFFERED[:2], False)
    arch_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert config_for(one, 64, 4, torch.device("cuda", 7)) == ada_config(one, 64 * 4 / 60)
    assert config_for(one, 64, 4, torch.device("cpu")) != ada_config(one, 64 * 4 / 60)
    arch_of.cache_clear()
