"""Many rows on sm_90: which launches are taken, where rows are copied to, and the products against the definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from triton import knobs

from mxmoe.backends.triton import hopper
from mxmoe.backends.triton.dispatch import Dispatch
from mxmoe.backends.triton.launch import Epilogue, Matrices, Rows, make_rows
from mxmoe.backends.triton.layout import allocate_arena, body_of, put
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.schedule import allocate, build, build_reference
from mxmoe.backends.triton.tiles import Config, Gemm, Shape, classes_of
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, apply_act, dequantize, quantize

DENSE = ("bf16", "w8a8_sym", "w8a8_e4m3")
NIBBLES = ("w4a8_g128_sym", "w4a8_g128_sym_e4m3", "w4a8_sym")
OTHERS = ("w4a16_g128_asym", "w8a16_g128_sym", "w2a16_g64_asym")
interpreted = pytest.mark.skipif(not knobs.runtime.interpret, reason="run by test_rows_are_sorted_in_the_interpreter")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no sm_90 device"
)


def gemm_of(names: tuple[str, ...], n: int = 256, k: int = 512, gated: bool = True) -> Gemm:
    return Gemm(n, k, tuple(map(Scheme.parse, names)), gated)


@given(st.lists(st.sampled_from(DENSE + NIBBLES), min_size=1, max_size=6), st.booleans(), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_tiles_are_those_the_kernels_are_written_for(names: list[str], gated: bool, width: int) -> None:
    gemm = gemm_of(tuple(names), n=64 * width, gated=gated)
    config = hopper.config_for(gemm)
    assert config is not None
    tiling, _ = classes_of(gemm, config)
    for one in tiling.classes:
        dense = body_of(gemm.distinct[one.group]) == "dense"
        side_by_side = (256 if dense else 128) // (2 if gated else 1)
        assert one.n_tiles == -(-gemm.n // side_by_side)
        assert one.height in (64, 128)


@pytest.mark.parametrize("name", OTHERS)
def test_schemes_without_a_kernel_have_no_config(name: str) -> None:
    assert hopper.config_for(gemm_of(("bf16", name))) is None


def test_rows_of_no_whole_16_bytes_have_no_config() -> None:
    assert hopper.config_for(gemm_of(("w8a8_sym",), k=520)) is None
    assert hopper.config_for(gemm_of(("bf16",), k=520)) is not None


def test_only_launches_that_the_kernels_compute_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda _device: True)
    gemm = gemm_of(("bf16",))
    config = hopper.config_for(gemm)
    assert config is not None
    matrices = Matrices(gemm, allocate_arena(256, 512, gemm.schemes, 2, "cpu"), None)
    out, silu = torch.empty(1, 8, 256), Epilogue("silu")
    assert hopper.takes(matrices, config, out, silu)
    assert not hopper.takes(matrices, config, out, Epilogue())
    assert not hopper.takes(matrices, config, torch.empty(2, 8, 256), silu)
    assert not hopper.takes(matrices, config, torch.empty(1, 8, 512)[..., :256], silu)
    assert not hopper.takes(matrices, Config(8, (("bf16", Shape((64,), 128)),)), out, silu)
    monkeypatch.undo()
    assert not hopper.runs_on(torch.device("cpu"))


@st.composite
def routed_rows(draw: st.DrawFn) -> tuple[Dispatch, Tensor, Rows]:
    experts, always = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    tokens, top_k = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    words, scaled = draw(st.integers(1, 9)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # one id beyond the last expert is padding
    index = torch.randint(0, experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
    gemm = gemm_of(("bf16",) * (experts + always))
    config = hopper.config_for(gemm)
    assert config is not None
    dispatch = Dispatch(experts, top_k, tokens, (classes_of(gemm, config)[0],), always)
    codes = torch.randint(-128, 128, (tokens, 4 * words), generator=generator).to(torch.int8)
    scales = torch.rand((tokens, 1) if scaled else (0,), generator=generator)
    return dispatch, index, Rows((codes,), (scales,))


@interpreted
@given(routed_rows())
@settings(max_examples=50, deadline=None)
def test_every_sorted_row_is_its_tokens(case: tuple[Dispatch, Tensor, Rows]) -> None:
    dispatch, index, rows = case
    tables = allocate(dispatch, torch.device("cpu"))
    build_reference(tables, index)
    made = hopper.sort_rows(rows, tables)
    place = tables.table("place_of")
    for flat in range(dispatch.rows):
        routed = flat < dispatch.assignments
        token = flat // dispatch.top_k if routed else (flat - dispatch.assignments) % dispatch.tokens
        at = int(place[flat])
        if at >= 0:
            assert made.codes[0][at].equal(rows.codes[0][token])
            assert not rows.scales[0].numel() or made.scales[0][at].equal(rows.scales[0][token])


@pytest.mark.skipif(knobs.runtime.interpret, reason="is interpreted already")
def test_rows_are_sorted_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "test_every_sorted_row", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def weights_of(gemm: Gemm, seed: int) -> list[Quantized]:
    """By matrix and expert, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    matrices = 2 if gemm.gated else 1
    return [
        quantize(torch.randn((gemm.n, gemm.k), generator=generator) * gemm.k**-0.5, scheme)
        for _ in range(matrices)
        for scheme in gemm.schemes
    ]


def wanted(gemm: Gemm, made: list[Quantized], rows: Rows, expert: int, source: Tensor, bias: Tensor | None) -> Tensor:
    """Rows `source` through one expert, in float64."""
    scheme = gemm.schemes[expert]
    kind = gemm.row_kinds.index(RowKind.of(scheme))
    x = rows.codes[kind].cpu().double()[source]
    if scheme.act_bits < 16:
        x = x * rows.scales[kind].cpu().double()[source]
    sums: list[Tensor] = []
    for matrix in range(2 if gemm.gated else 1):
        q = made[matrix * len(gemm.schemes) + expert]
        y = x @ dequantize(q).double().T
        sums.append(y if bias is None else y + bias[matrix, expert].double())
    return apply_act("silu", sums[0], sums[1], {}) if gemm.gated else sums[0]


CASES = [
    *((gemm_of((name,) * 3, n, k, gated), False) for name in DENSE + NIBBLES for n, k, gated in ((192, 640, True),)),
    *((gemm_of((name,) * 3, n, k, gated), True) for name in DENSE + NIBBLES for n, k, gated in ((320, 384, False),)),
    (gemm_of((*DENSE, *NIBBLES), 256, 512, True), True),
    (gemm_of((*DENSE, *NIBBLES), 192, 128, False), False),
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("gemm", "biased"), CASES)
def test_products_are_those_of_the_definition(gemm: Gemm, biased: bool, alone: bool) -> None:
    if alone and not gemm.gated:
        pytest.skip("one matrix is alone anyway")
    tokens, top_k, experts = 333, 2, len(gemm.schemes)
    made, matrices = weights_of(gemm, 1), 2 if gemm.gated else 1
    arena = allocate_arena(gemm.n, gemm.k, gemm.schemes, matrices, "cuda")
    for number, q in enumerate(made):
        put(arena, number // experts, number % experts, q)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn((matrices, experts, gemm.n), generator=generator) if biased else None
    config = hopper.config_for(gemm)
    assert config is not None
    tiling, _ = classes_of(gemm, config)
    tables = allocate(Dispatch(experts, top_k, tokens, (tiling,)), torch.device("cuda"))
    # the last expert is used little, and some assignments are padding
    index = torch.rand((tokens, experts + 1), generator=generator).topk(top_k).indices.to(torch.int32)
    index[torch.rand(index.shape, generator=generator) < 0.4] = 0
    build(tables, index.cuda())
    x = torch.randn((tokens if gemm.gated else tokens * top_k, gemm.k), generator=generator).bfloat16().cuda()
    rows = make_rows(x, gemm.row_kinds)
    out = torch.full((1, tokens * top_k, gemm.n), float("nan"), dtype=torch.bfloat16, device="cuda")
    held = Matrices(gemm, arena, None if bias is None else bias.cuda())
    gather = gemm.gated
    if alone:  # up by itself, in the tiles of both
        held, gemm, made = held.alone(1), held.alone(1).gemm, made[experts:]
        bias = None if bias is None else bias[1:]
    epilogue = Epilogue("silu") if gemm.gated else Epilogue()
    assert hopper.takes(held, config, out, epilogue)
    hopper.run_hopper(held, config, rows, tables, 0, out, epilogue, gather=gather)
    row_of, start = tables.table("row_of").cpu().long(), 0
    for expert, count in enumerate(tables.table("counts").cpu().tolist()):
        source = row_of[start : start + count] // top_k if gather else torch.arange(start, start + count)
        want = wanted(gemm, made, rows, expert, source, bias)
        found = out[0, start : start + count].cpu().double()
        assert (found - want).norm() <= 6e-3 * want.norm(), gemm.schemes[expert]
        start += count
    assert out[0, start:].isnan().all()
