"""Rows for the kernels: code for code and scale for scale what `quantize_activation` makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from mxmoe.backends.triton import launch, prepare
from mxmoe.backends.triton.ahead import Request, compile_all
from mxmoe.backends.triton.dispatch import Dispatch, Tables, TileClass, Tiling
from mxmoe.backends.triton.interpreter import mend_interpreter
from mxmoe.backends.triton.launch import TURNS, begin, make_rows
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.schedule import FEW_ASSIGNMENTS, allocate, build_reference
from mxmoe.ir import Scheme
from mxmoe.quant import quantize_activation, rotate

from .small_blocks import DEVICE, DTYPES

# rows with NaN and inf are among what is tested; numpy says so where kernels are interpreted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
mend_interpreter()

SCHEMES = tuple(
    map(Scheme.parse, ("bf16", "fp16", "w8a8_sym", "w8a8_e4m3", "w4a4_sym", "w4a4_g128_sym", "w4a8_g128_sym"))
)
KINDS = {RowKind.of(scheme): scheme for scheme in SCHEMES}
IS_COMPILED = DEVICE == "cuda"
"""Every width and set of kinds is a kernel of its own: a few, where they are compiled."""
NASTY = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-38, 1e-45, 65504.0, 448.0)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """A few rows of any float type: of any size, with zeros, ties between codes, and numbers that break things."""
    widths = st.sampled_from((128, 264))
    k = draw(widths if IS_COMPILED else widths | st.sampled_from((16, 64, 192, 520)) | st.integers(1, 300))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn((5, k), generator=random)
    x[0] *= 2.0 ** draw(st.integers(-120, 120))
    x[1] = torch.randint(-254, 255, (k,), generator=random) / 2  # halves: ties where the largest is a code
    x[2] = draw(st.sampled_from((0.0, 1.0, -127.0)))
    for _ in range(draw(st.integers(0, 3))):
        x[draw(st.sampled_from((3, 4))), draw(st.integers(0, k - 1))] = draw(st.sampled_from(NASTY))
    if DEVICE == "cpu":  # the interpreter takes the smallest numbers for 0
        x = x.where((x.abs() >= 2.0**-126) | x.isnan(), 0.0)
    return x.to(draw(st.sampled_from(tuple(DTYPES.values()))))


def check_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu().float().nan_to_num(nan=12345.0), wanted.float().nan_to_num(nan=12345.0)), what


@settings(max_examples=40, deadline=None)
@given(x=rows(), kinds=st.just(set(KINDS)) if IS_COMPILED else st.sets(st.sampled_from(sorted(KINDS)), min_size=1))
def test_rows_are_those_of_the_definition(x: Tensor, kinds: set[RowKind]) -> None:
    ordered = tuple(sorted(kinds))
    made = make_rows(x.to(DEVICE), ordered)
    for kind, codes, scales in zip(ordered, made.codes, made.scales, strict=True):
        wanted, wanted_scales = quantize_activation(x, KINDS[kind])
        if kind.format in ("int", "e4m3"):
            check_equal(scales, wanted_scales, f"scales of {kind}")
        check_equal(codes, wanted, f"codes of {kind}")


def sorted_reference(tables: Tables, x: Tensor, kinds: tuple[RowKind, ...]) -> list[tuple[Tensor, Tensor]]:
    """Give codes and scales of every kind by the definition: row 5 of expert e is the 5th token that chose it."""
    dispatch, found = tables.dispatch, list[tuple[Tensor, Tensor]]()
    flat = tables.table("row_of").cpu().long()
    token = torch.where(flat < dispatch.assignments, flat // dispatch.top_k, (flat - dispatch.assignments) % len(x))
    for kind in kinds:
        codes, scales = quantize_activation(x, KINDS[kind])
        found.append((codes[token], scales[token]))
    return found


@st.composite
def routed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Dispatch]:
    """Rows of tokens, their choices with some padding, and what is fixed of their schedule."""
    always, top_k = draw(st.sampled_from(((0, 1), (0, 2), (1, 3)) if IS_COMPILED else ((0, 1), (0, 3), (1, 2), (2, 1))))
    x, experts = draw(rows()), draw(st.integers(top_k, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    index = torch.rand((len(x), experts + 2), generator=random).argsort(dim=1)[:, :top_k] - 1
    index = index.to(draw(st.sampled_from((torch.int32, torch.int64)))).contiguous()
    tiling = Tiling((TileClass(0, 64, 1), TileClass(0, 16, 1)), (0,) * (experts + always))
    return x, index, Dispatch(experts, top_k, len(x), (tiling,), always)


@settings(max_examples=40, deadline=None)
@given(
    case=routed(), way=st.sampled_from(("fused", "few", "many")),
    kinds=st.just(set(KINDS)) if IS_COMPILED else st.sets(st.sampled_from(sorted(KINDS)), min_size=1),
)  # fmt: skip
def test_rows_are_written_where_they_lie_sorted(
    case: tuple[Tensor, Tensor, Dispatch], way: str, kinds: set[RowKind]
) -> None:
    (x, index, dispatch), ordered = case, tuple(sorted(kinds))
    tables = allocate(dispatch, DEVICE, few_assignments=0 if way == "many" else FEW_ASSIGNMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "FUSED_TOKENS", 64 if way == "fused" else 0)
        made = begin(tables, index.to(DEVICE), x.to(DEVICE), ordered, is_sorted=True)
    reference = allocate(dispatch, DEVICE)
    build_reference(reference, index.to(DEVICE))
    for name in ("counts", "offsets", "row_of", "place_of"):
        assert torch.equal(tables.table(name), reference.table(name)), name
    real = int(reference.table("offsets")[-1])
    for kind, found, scales, (wanted, wanted_scales) in zip(
        ordered, made.codes, made.scales, sorted_reference(reference, x, ordered), strict=True
    ):
        assert found.shape == (dispatch.rows, x.shape[1])
        check_equal(found[:real], wanted[:real], f"codes of {kind}")
        if kind.format in ("int", "e4m3"):
            check_equal(scales[:real], wanted_scales[:real], f"scales of {kind}")


TYPES = {"bf16": "*bf16", "int": "*i8", "e4m3": "*fp8e4nv"}


def sorted_request(kinds: tuple[RowKind, ...], k: int, top_k: int, arch: int) -> Request:
    """What `sort_rows` launches."""
    block = 1 << (k - 1).bit_length()
    constants = {
        **{"TOP_K": top_k, "ALWAYS": 0, "PLACES": 1 << (top_k - 1).bit_length(), "K": k, "BLOCK": block},
        **{"KINDS": tuple(kind.spec for kind in kinds), "PTX": True},
    }
    signature = {
        **{"x_ptr": "*bf16", "codes": tuple(TYPES[kind.format] for kind in kinds), "scales": ("*fp32",) * len(kinds)},
        **{"place_ptr": "*i32", "rows": "i32", "tokens": "i32"},
        **dict.fromkeys(constants, "constexpr"),
    }
    warps = 8 if block > 2048 else 4
    return Request(prepare.prepare_sorted, signature, constants, arch, warps)


@pytest.mark.parametrize("arch", [89, 90])
def test_sorted_rows_are_quantized_once_and_stored_16_bytes_a_time(arch: int) -> None:
    cases = [((RowKind("int", 8),), 7168, 8), ((RowKind("e4m3", 8),), 2048, 4), ((RowKind("bf16", 16),), 4096, 6)]
    for (kinds, k, top_k), binary in zip(
        cases, compile_all([sorted_request(*case, arch) for case in cases]), strict=True
    ):
        facts, threads = binary.facts(), binary.num_warps * 32
        assert facts.spill_loads == facts.spill_stores == 0
        places, block = 1 << (top_k - 1).bit_length(), 1 << (k - 1).bit_length()
        wide = places * block * kinds[0].dtype.itemsize // (16 * threads)
        # beyond the last of six choices nothing is written, and the compiler sees it
        assert wide // 2 < facts.count("STG.E.128") <= wide
        assert facts.count("LDG.E.128") == block * 2 // (16 * threads)


@pytest.mark.parametrize("arch", [89, 90])
def test_codes_are_rounded_once(arch: int) -> None:
    """Triton's cast to e4m3 for sm_89 goes by way of fp16."""
    binary = compile_all([sorted_request((RowKind("e4m3", 8),), 2048, 4, arch)])[0]
    assert "cvt.rn.satfinite.e4m3x2.f32" in binary.ptx
    assert "f16.f32" not in binary.ptx.replace("bf16.f32", "")


def test_no_token_has_no_sorted_row() -> None:
    dispatch = Dispatch(2, 2, 0, (Tiling((TileClass(0, 16, 1),), (0, 0)),))
    index = torch.empty((0, 2), dtype=torch.int64, device=DEVICE)
    x = torch.empty((0, 64), dtype=torch.bfloat16, device=DEVICE)
    made = begin(allocate(dispatch, DEVICE), index, x, (RowKind("bf16", 16), RowKind("int", 8)), is_sorted=True)
    assert [tuple(codes.shape) for codes in made.codes] == [(0, 64), (0, 64)]


def test_rows_of_a_kind_are_used_as_they_are() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16, device=DEVICE)
    made = make_rows(x, (RowKind("bf16", 16), RowKind("int", 8)))
    assert made.codes[0] is x
    assert made.codes[1].dtype == torch.int8


@pytest.mark.parametrize("k", [1, 128])
def test_no_row(k: int) -> None:
    made = make_rows(torch.empty((0, k), device=DEVICE), (RowKind("bf16", 16), RowKind("int", 4, 128)))
    assert [tuple(codes.shape) for codes in made.codes] == [(0, k), (0, k)]


@pytest.mark.parametrize("turn", [2, 4, 8, *TURNS, 12, 24, 192, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_turned_before_they_are_held(turn: int, dtype: str) -> None:
    x = torch.randn((4, 384), generator=torch.Generator().manual_seed(turn)).to(DTYPES[dtype])
    x[2] = 0
    kinds = tuple(sorted(KINDS))
    made = make_rows(x.to(DEVICE), kinds, turn)
    turned = rotate(x, turn)
    for kind, codes, scales in zip(kinds, made.codes, made.scales, strict=True):
        wanted, wanted_scales = quantize_activation(turned, KINDS[kind])
        # sums in another order: a value at the border between two codes may take the other one
        if kind.format == "int":
            assert torch.allclose(scales.cpu(), wanted_scales, rtol=2**-20)
            apart = (codes.cpu().int() - wanted.int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 0.02
        else:
            step = {"bf16": 2.0**-7, "fp16": 2.0**-9, "e4m3": 2.0**-2}[kind.format]
            assert torch.allclose(codes.cpu().float(), wanted.float(), rtol=step, atol=1e-3)
            assert (codes.cpu().float() != wanted.float()).float().mean() < 0.05
