"""Kernels compiled without a GPU, in this process and in a child, and what their machine code says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import triton
import triton.language as tl
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mxmoe.backends.triton.ahead import Binary, Request, code_path_option, compile_ahead, compile_all
from mxmoe.backends.triton.cubin import LIMITS, CubinFacts, occupancy, read_cubin
from mxmoe.device import DEVICES
from mxmoe.errors import AheadFailed, BrokenCubin, MissingTool, UnknownName


@triton.jit
def product(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    depth: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), SUM)
    for start in range(0, depth, K):
        left = tl.load(a + m[:, None] * depth + k[None, :] + start)
        right = tl.load(b + n[None, :] * depth + k[:, None] + start)
        total = tl.dot(left, right, total, out_dtype=SUM)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def wrong(x: tl.tensor) -> None:
    tl.store(x, tl.no_such_function())


@gluon.jit
def double(x: gl.tensor, n: gl.tensor, WIDTH: gl.constexpr, L: gl.constexpr) -> None:
    index = gl.arange(0, WIDTH, layout=L)
    gl.store(x + index, gl.load(x + index, mask=index < n) * 2, mask=index < n)


SUMS = {"bf16": (tl.float32, "*fp32"), "i8": (tl.int32, "*i32"), "fp8e4nv": (tl.float32, "*fp32")}
POINTERS_AND_DEPTH = ("a", "b", "c", "depth")


def request(kind: str, arch: int, *, code_path: int | None = None, m: int = 64, num_warps: int = 4) -> Request:
    dtype, out = SUMS[kind]
    signature = {"a": f"*{kind}", "b": f"*{kind}", "c": out, "depth": "i32"}
    signature |= dict.fromkeys(("M", "N", "K", "SUM"), "constexpr")
    constexprs = {"M": m, "N": 128, "K": 64, "SUM": dtype}
    return Request(product, signature, constexprs, arch, num_warps, 3, POINTERS_AND_DEPTH, code_path)


@cache
def facts(kind: str, arch: int, code_path: int | None = None) -> CubinFacts:
    return compile_all([request(kind, arch, code_path=code_path)])[0].facts()


@pytest.mark.parametrize(
    ("kind", "opcode", "count"),
    [("bf16", "HMMA.16816.F32.BF16", 64), ("i8", "IMMA.16832.S8.S8", 32), ("fp8e4nv", "QMMA.16832.F32.E4M3.E4M3", 32)],
)
def test_ada_multiplies_with_its_own_instructions(kind: str, opcode: str, count: int) -> None:
    """A warp of four multiplies 64 x 128 x 64: 64 products of 16 x 8 x 16, or 32 of 16 x 8 x 32."""
    found = facts(kind, 89)
    assert found.arch == 89
    assert found.count(opcode) == count
    assert found.count("LDGSTS") > 0
    assert found.spill_loads == found.spill_stores == found.stack_bytes == 0


@pytest.mark.parametrize(
    ("kind", "opcode"),
    [("bf16", "HGMMA.64x128x16.F32.BF16"), ("i8", "IGMMA.64x128x32.S8.S8"), ("fp8e4nv", "QGMMA.64x128x32.F32")],
)
def test_hopper_multiplies_warp_groups(kind: str, opcode: str) -> None:
    found = facts(kind, 90)
    assert found.arch == 90
    assert found.count(opcode) > 0
    assert not any(found.count(stem) for stem in ("HMMA", "IMMA", "QMMA"))


# Hopper has no mma.sync on fp8: ptxas widens to fp16, which holds every product of e4m3 exactly
@pytest.mark.parametrize(
    ("kind", "opcode"), [("bf16", "HMMA.16816.F32.BF16"), ("i8", "IMMA.16832.S8.S8"), ("fp8e4nv", "HMMA.16816.F32")]
)
def test_the_code_path_of_ada_is_machine_code_of_hopper(kind: str, opcode: str) -> None:
    ours, theirs = facts(kind, 89), facts(kind, 90, code_path=89)
    assert theirs.arch == 90
    assert theirs.count(opcode) > 0
    assert not any(theirs.count(stem) for stem in ("HGMMA", "IGMMA", "QGMMA", "UTMALDG"))
    assert theirs.count("LDGSTS") == ours.count("LDGSTS")
    assert theirs.shared_bytes == ours.shared_bytes, "the same stages in the same memory"


def test_shared_memory_is_that_of_the_stages() -> None:
    # what a product of three stages waits for lies in two buffers of 64 x 64 and 128 x 64 bf16
    assert facts("bf16", 89).shared_bytes == 2 * (64 + 128) * 64 * 2


def test_registers_that_do_not_fit_are_counted() -> None:
    spilled = compile_all([request("bf16", 89, m=128, num_warps=1)])[0].facts()
    assert spilled.registers == 255
    assert spilled.spill_loads > 0
    assert spilled.spill_stores > 0
    assert spilled.stack_bytes > 0


def test_gluon_functions_compile_alike() -> None:
    layout = gl.BlockedLayout([4], [32], [1], [0])
    signature = {"x": "*i32", "n": "i32", "WIDTH": "constexpr", "L": "constexpr"}
    constexprs = {"WIDTH": 128, "L": layout}
    binary = compile_ahead(double, signature, constexprs, arch=89, num_warps=1)
    assert (binary.name, binary.arch, binary.num_warps, binary.shared_bytes) == ("double", 89, 1, 0)
    assert binary.facts().count("LDG.E.128") == 0, "n may end within four elements"
    binary = compile_ahead(double, signature, constexprs, arch=89, num_warps=1, divisible=("x", "n"))
    assert binary.facts().count("LDG.E.128") == 1


def test_a_process_that_interprets_compiles_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    here = compile_all([request("i8", 89)])[0]
    monkeypatch.setattr(knobs.runtime, "interpret", not knobs.runtime.interpret)
    there = compile_all([request("i8", 89)])[0]
    assert (there.name, there.shared_bytes, there.cubin) == (here.name, here.shared_bytes, here.cubin)


@pytest.mark.parametrize("interpret", [False, True])
def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, interpret: bool) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", interpret)
    with pytest.raises(AheadFailed, match=r"wrong does not compile for sm_89: [\s\S]*no_such_function"):
        compile_ahead(wrong, {"x": "*i32"}, {}, arch=89)


@pytest.mark.parametrize("options", [{"arch": 75}, {"arch": 89, "code_path": 75}])
def test_unknown_capability(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownName, match="compute capability named '75'"):
        compile_ahead(wrong, {"x": "*i32"}, {}, **options)


def test_code_path_option() -> None:
    assert code_path_option(None) == {}
    assert code_path_option(89) == {"arch": "sm89"}
    with pytest.raises(UnknownName):
        code_path_option(75)


def test_bytes_that_are_no_cubin() -> None:
    with pytest.raises(BrokenCubin, match="the cubin of 4 bytes"):
        read_cubin(b"none")


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(tool: object, path: str) -> None:
        raise RuntimeError(f"Cannot find {tool} at {path}")

    monkeypatch.setattr(type(vars(type(knobs.nvidia))["cuobjdump"]), "transform", absent)
    with pytest.raises(MissingTool, match=r"cuobjdump .* TRITON_CUOBJDUMP_PATH"):
        Binary("x", 89, 4, 0, b"", "").facts()


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        (89, 128, 40 * 1024, 4, 2),  # by shared memory: 41 KiB each of 100
        (89, 128, 20 * 1024, 4, 4),  # by registers: 4 warps in each of four partitions
        (89, 168, 0, 4, 3),  # 168 * 32 = 5376 registers a warp, three a partition: twelve warps
        (89, 32, 0, 2, 24),  # by programs
        (89, 32, 0, 8, 6),  # by warps
        (89, 255, 99 * 1024, 8, 1),
        (89, 255, 99 * 1024 + 1, 8, 0),
        (90, 32, 0, 8, 8),
        (90, 168, 100 * 1024, 4, 2),
        (80, 64, 80 * 1024, 4, 2),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, programs: int) -> None:
    assert occupancy(CubinFacts(arch, registers, 0, shared, {}), warps) == programs


def test_limits_agree_with_the_device_rows() -> None:
    for row in DEVICES.values():
        assert LIMITS[row.compute_capability].shared_kb == row.smem_kb_per_sm


@triton.jit
def add_parts(xs: tl.tensor, y: tl.tensor, N: tl.constexpr) -> None:
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(xs[0] + at) + tl.load(xs[1] + at).to(tl.float32))


def test_tuples_of_pointers_are_aligned_alike() -> None:
    request = Request(
        add_parts, {"xs": ("*fp32", "*i8"), "y": "*fp32", "N": "constexpr"}, {"N": 512}, 89, 4, registers=32
    )
    facts = compile_all([request])[0].facts()
    assert facts.count("LDG.E.128") == 1
    assert facts.registers <= 32
