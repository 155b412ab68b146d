"""The divided kernel compiled for sm_90 without one: its instructions, its shared memory, and what it spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import driver

from mxmoe.backends.triton import choose_ada, hopper, kernels_hopper
from mxmoe.backends.triton.backend import Outline
from mxmoe.backends.triton.cubin import read_cubin
from mxmoe.backends.triton.dispatch import Dispatch
from mxmoe.backends.triton.launch import Epilogue, Matrices, Rows
from mxmoe.backends.triton.layout import allocate_arena
from mxmoe.backends.triton.rehearsal import Launches, Nowhere, rehearsing
from mxmoe.backends.triton.schedule import allocate
from mxmoe.backends.triton.tiles import Gemm, classes_of
from mxmoe.ir import Scheme, moe_ops

from .child import run_in_child
from .joined_blocks import EXPERTS, TOP_K, make

MOST_SHARED = 232_448
"""Bytes that a program may have on sm_90."""
MOST_STACK = 64
"""Bytes of a thread; a few scalars wait there while a tile is multiplied."""
SM_COUNT, TOKENS, N, K = 132, 64, 256, 512
TALL = (16, 64, 128)
"""Rows of tiles: of each body once."""
MIXES = {
    ("w8a8_sym", "w4a8_g128_sym"): ("IGMMA",),
    ("bf16", "w4a8_sym_e4m3"): ("HGMMA", "QGMMA"),
    ("w4a8_g128_sym_iscale", "w8a8_sym"): ("IGMMA",),
    ("w8a8_e4m3",): ("QGMMA",),
    ("bf16", "w8a8_sym"): ("HGMMA", "IGMMA"),
}
"""Schemes of a launch -> the matrix products that it must have."""
SLIM, BACK = ("w8a8_e4m3",), ("bf16", "w8a8_sym")
"""Which of these has slim tiles, and which programs that begin with low ones."""
JOINED = (("w8a8_e4m3",),)
"""Schemes of blocks whose shared expert joins the routed ones."""


@pytest.mark.skipif(knobs.runtime.interpret, reason="run by test_without_a_gpu")
@pytest.mark.skipif(torch.cuda.is_available(), reason="would take the driver from the tests of the GPU")
@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_divided_machine_code(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    warmup = kernels_hopper.divided_gemm.warmup
    monkeypatch.setattr(kernels_hopper.divided_gemm, "warmup", lambda *a, **k: made.append(warmup(*a, **k)))
    monkeypatch.setattr(hopper, "programs_at_once", lambda _device: SM_COUNT)
    driver.set_active(Nowhere(90))  # pyright: ignore[reportArgumentType]
    gemm = Gemm(N, K, tuple(map(Scheme.parse, names)), gated=True)
    config = hopper.config_for(gemm, TALL, slim=names == SLIM)
    assert config is not None
    config = replace(config, back=3 if names == BACK else 0)
    tables = allocate(Dispatch(len(names), TOP_K, TOKENS, (classes_of(gemm, config)[0],)), "cpu")
    rows = Rows(
        tuple(torch.empty((TOKENS * TOP_K, K), dtype=kind.dtype) for kind in gemm.row_kinds),
        tuple(torch.empty((TOKENS * TOP_K, 1)) for _ in gemm.row_kinds),
    )
    out = torch.empty((1, TOKENS * TOP_K, N), dtype=torch.bfloat16)
    matrices = Matrices(gemm, allocate_arena(N, K, gemm.schemes, 2, "cpu"), None)
    hopper.run_hopper(matrices, config, rows, tables, 0, out, Epilogue("silu"), compile_only=True)
    (kernel,) = made
    facts = read_cubin(kernel.asm["cubin"], dynamic_shared_bytes=kernel.metadata.shared)  # pyright: ignore
    for stem in (*MIXES[names], "UTMALDG", "SYNCS"):
        assert facts.count(stem), stem
    assert facts.shared_bytes <= MOST_SHARED
    assert facts.stack_bytes <= MOST_STACK


@pytest.mark.skipif(knobs.runtime.interpret, reason="run by test_without_a_gpu")
@pytest.mark.skipif(torch.cuda.is_available(), reason="would take the driver from the tests of the GPU")
@pytest.mark.parametrize("names", JOINED, ids="+".join)
def test_divided_machine_code_of_joined_banks(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole call of a block, rehearsed: two divided launches, with what lies before, between and behind."""
    monkeypatch.setattr(choose_ada, "_divides", lambda _device: True)
    monkeypatch.setattr(choose_ada, "arch_of", lambda _device: 90)
    monkeypatch.setattr(hopper, "programs_at_once", lambda _device: SM_COUNT)
    # sizes that fill no tile
    module, _ = make(names, hidden=208, wide=432, narrow=144)
    (moe,) = moe_ops(module)
    block = Outline(moe, torch.device("cpu")).block()
    hidden = torch.zeros((TOKENS, 208), dtype=torch.bfloat16)
    assert block.joins(TOKENS)
    launches = Launches()
    with rehearsing(90, launches):
        block.run_block(hidden, torch.full((TOKENS, TOP_K), EXPERTS), torch.zeros((TOKENS, TOP_K)))
    kernels = dict(launches.kernels())
    divided = [kernel for name, kernel in kernels.items() if name.startswith("divided_gemm")]
    assert len(divided) == 2
    assert any(name.startswith("combine_both") for name in kernels)
    for kernel in divided:
        assert kernel.facts().shared_bytes <= MOST_SHARED
        assert kernel.facts().stack_bytes <= MOST_STACK


@pytest.mark.skipif(not knobs.runtime.interpret, reason="is run by itself")
def test_without_a_gpu() -> None:
    """Triton decides when it is loaded whether it interprets, so this takes a process of its own."""
    said = run_in_child(__file__, "test_divided_machine_code", TRITON_INTERPRET="0")
    assert said.count("PASSED") == len(MIXES) + len(JOINED)
