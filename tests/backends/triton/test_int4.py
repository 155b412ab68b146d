"""
The INT4 launch: its packing, its machine code, and its program executed step by step in torch.

No machine without a GPU runs Gluon. Here the kernel's own Python runs on torch tensors: addresses, loops, masks, the
ring of buffers and the order of waits are the kernel's, and the matrix instruction is its definition in the PTX ISA.
Copies land when they are waited for, and their buffers hold nonsense until then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# before anything of ours, which would have kernels interpreted where there is no GPU: most of this file compiles
pytest.importorskip("triton")

from triton import knobs

from mxmoe.backends.triton import int4, kernels_int4
from mxmoe.backends.triton.ahead import compile_all
from mxmoe.backends.triton.binaries import int4_request
from mxmoe.backends.triton.cubin import LARGEST_PROGRAM_BYTES, occupancy
from mxmoe.backends.triton.dispatch import Dispatch, TileClass, Tiling
from mxmoe.backends.triton.int4 import PLAIN, Int4Bands, Int4Options, int4_group_gemm, int4_group_gemm_torch
from mxmoe.backends.triton.int4_pack import (
    PackedInt4,
    pack_channels,
    pack_int4,
    pack_int4_pair,
    pack_rows,
    pack_rows_torch,
    pair,
    quantize_rows,
    quantize_rows_torch,
    runs_on_int4,
    unpack_channels,
    unpack_int4,
    unpack_rows,
    unpair,
)
from mxmoe.backends.triton.schedule import allocate, build, build_reference
from mxmoe.errors import BadInt4
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, matmul, quantize, quantize_activation

GROUPED, CHANNEL = Scheme.parse("w4a4_g128_sym"), Scheme.parse("w4a4_sym")
BOTH = pytest.mark.parametrize("scheme", [GROUPED, CHANNEL], ids=str)
ON_ADA: dict[str, Any] = {"arch": 89, "gather": True}
EVERY = settings(max_examples=30, deadline=None)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    not (knobs.runtime.interpret or torch.cuda.is_available()), reason="run by test_kernels_in_the_interpreter"
)


def weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> Quantized:
    return quantize(torch.randn((n, k), generator=torch.Generator().manual_seed(seed)), scheme)


# ---------------------------------------------------------------------------------------------- Gluon, in torch


class Pointer:
    """Addresses in one flat tensor."""

    def __init__(self, memory: Tensor, offset: Tensor | int = 0) -> None:
        self.memory, self.offset = memory, torch.as_tensor(offset)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offset + step)


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def index(self, at: Tensor | int) -> Shared:
        return Shared(self.memory[int(at)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.permute(*order))

    def load(self, _layout: object) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)


def poison(memory: Tensor) -> Tensor:
    return memory.fill_(0x77777777 if memory.dtype == torch.int32 else float("nan"))


class Copies:
    """Copies under way: groups of (destination, addresses, mask), and of which a wait lets the oldest land."""

    def __init__(self) -> None:
        self.open: list[tuple[Tensor, Pointer, Tensor | None]] = []
        self.groups: list[list[tuple[Tensor, Pointer, Tensor | None]]] = []

    def async_copy_global_to_shared(self, to: Shared, source: Pointer, mask: Tensor | None = None) -> None:
        assert to.memory.shape == source.offset.shape
        poison(to.memory)
        self.open.append((to.memory, source, mask))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        while len(self.groups) > left:
            for to, source, mask in self.groups.pop(0):
                to.copy_(load(source, mask, 0.0))


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    if mask is None:
        return pointer.memory.view(-1)[pointer.offset.long()].clone()
    inside = torch.where(mask, pointer.offset, 0).long()
    return torch.where(mask, pointer.memory.view(-1)[inside], torch.tensor(other).to(pointer.memory.dtype))


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
    pointer.memory.view(-1)[offset[mask].long()] = value[mask]


def expand_dims(value: Pointer | Tensor, dim: int) -> Pointer | Tensor:
    if isinstance(value, Pointer):
        return Pointer(value.memory, value.offset.unsqueeze(dim))
    return value.unsqueeze(dim)


def nibbles(words: Tensor) -> Tensor:
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15) ^ 8) - 8


def mma(a: Tensor, b: Tensor) -> Tensor:
    """
    mma.m16n8k64 on the fragments of all lanes: a [M, N, 8, 4, 4 registers], b [.., 2 registers] -> int64 [.., 2, 2].

    PTX ISA: element i of a lies in row g (i < 8, 16 <= i < 24) or g + 8, column 8 t + i % 8 (+ 32 for i >= 16); of b in
    row 8 t + i % 8 (+ 32 for i >= 8), column g; of the sum in row g (i < 2) or g + 8, column 2 t + i % 2.
    """
    m, n = a.shape[:2]
    left = torch.zeros((m, n, 16, 64), dtype=torch.int64)
    right = torch.zeros((m, n, 64, 8), dtype=torch.int64)
    out = torch.zeros((m, n, 8, 4, 2, 2), dtype=torch.int64)
    for g in range(8):
        for t in range(4):
            for i in range(32):
                row, column = g + 8 * (8 <= i < 16 or i >= 24), 8 * t + i % 8 + 32 * (i >= 16)
                left[:, :, row, column] = nibbles(a[:, :, g, t])[..., i // 8, i % 8]
            for i in range(16):
                right[:, :, 8 * t + i % 8 + 32 * (i >= 8), g] = nibbles(b[:, :, g, t])[..., i // 8, i % 8]
    product = left @ right
    for g in range(8):
        for t in range(4):
            for i in range(4):
                out[:, :, g, t, i // 2, i % 2] = product[:, :, g + 8 * (i >= 2), 2 * t + i % 2]
    return out


def both_products(a0: Tensor, a1: Tensor, b: Tensor) -> Tensor:
    registers = b.flatten(-2)
    return mma(a0.flatten(-2), registers[..., :2]) + mma(a1.flatten(-2), registers[..., 2:])


def multiply_group(a0: Tensor, a1: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, total: Tensor) -> Tensor:
    return total + both_products(a0, a1, b).float() * (b_scale * a_scale)


def multiply_channel(a0: Tensor, a1: Tensor, b: Tensor, total: Tensor) -> Tensor:
    return (total + both_products(a0, a1, b)).to(torch.int32)


def as_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values: function(*map(torch.as_tensor, values))


def torch_gluon(program: int, programs: int, warps: int) -> dict[str, Any]:
    """Give the global names of the kernel's file, with torch behind them."""
    gl = types.SimpleNamespace(
        **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "permute", "reshape")},
        BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
        constexpr=object, arange=lambda low, high, layout: torch.arange(low, high, dtype=torch.int32),
        minimum=as_tensors(torch.minimum), where=torch.where, expand_dims=expand_dims, load=load, store=store,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), num_warps=lambda: warps,
        broadcast=lambda a, b: (a.expand_as(b), b), split=lambda a: a.unbind(-1),
        convert_layout=lambda a, *_, **__: a, static_range=range,
        program_id=lambda _: torch.tensor(program), num_programs=lambda _: programs,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(poison(torch.empty(shape, dtype=dtype))),
    )  # fmt: skip
    names: dict[str, Any] = {
        "gl": gl, "async_copy": Copies(), "multiply_group": multiply_group, "multiply_channel": multiply_channel,
        "accumulators": lambda *_: None, "halves": lambda *_: None,
        "act": lambda gate, up, *_: torch.nn.functional.silu(gate) * up, "__builtins__": __builtins__,
    }  # fmt: skip
    for name in ("_sources", "_copy_step", "_tile", "_store", "int4_kernel"):
        names[name] = types.FunctionType(getattr(kernels_int4, name).fn.__code__, names)
    return names


def run_in_torch(
    x: Tensor, x_scale: Tensor, weights: PackedInt4, bands: Int4Bands, out: Tensor,
    *, bias: Tensor | None = None, options: Int4Options = PLAIN, programs: int = 3,
) -> None:  # fmt: skip
    """`int4_group_gemm`, program after program."""
    views = (bands.row_of, bands.slot, bands.class_band, bands.band_expert, bands.band_row, bands.band_rows)
    tensors = (x, x_scale, weights.words, weights.scale, weights.scale if bias is None else bias, out, *views)
    is_grouped = weights.scheme.group_size is not None
    constants = int4.launch_constants(is_grouped, bands.classes, options, bias is not None)
    for program in range(programs):
        kernel = torch_gluon(program, programs, int4.launch_warps(bands.classes))["int4_kernel"]
        kernel(*map(Pointer, tensors), weights.n, weights.steps, bands.top_k, bands.tokens, **constants)


# ---------------------------------------------------------------------------------------------------- scenarios


def scenario(
    scheme: Scheme, *, n: int, k: int, counts: Sequence[int], heights: Sequence[int], gather: bool, act: bool,
    bias: bool, device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of `int4_group_gemm`: experts 1 and 3 of four are INT4; expert e has counts[e] rows of top-1 tokens."""
    generator = torch.Generator().manual_seed(len(counts) + n + k)
    tokens = sum(counts)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    index = index[torch.randperm(tokens, generator=generator)].unsqueeze(1).to(device)
    width = -(-(2 * n if act else n) // int4.WIDTH)
    classes = (*(TileClass(1, height, width) for height in heights), TileClass(0, 64, 1))
    tables = allocate(Dispatch(4, 1, tokens, (Tiling(classes, (0, 1, 0, 1)),)), device)
    (build_reference if device == "cpu" else build)(tables, index)
    slot = torch.tensor([9, 0, 9, 1], dtype=torch.int32, device=device)
    gates, ups = ([weight(n, k, scheme, seed + e) for e in (0, 1)] for seed in (0, 10))
    packed = pack_int4_pair(gates, ups) if act else pack_int4(gates)
    packed = PackedInt4(scheme, packed.n, packed.k, packed.words.to(device), packed.scale.to(device))
    x = torch.randn((tokens, k), generator=generator)
    words, x_scale = quantize_rows_torch(x, scheme)
    both = pair(*torch.randn((2, 2, n), generator=generator)) if act else torch.randn((2, n), generator=generator)
    out = torch.full((tokens, n), -7.0, dtype=dtype, device=device)
    named: dict[str, Any] = {"bias": None, "options": Int4Options(gather, "silu" if act else None)}
    if bias:
        named["bias"] = pack_channels(both).to(device)
    return (words.to(device), x_scale.to(device), packed, Int4Bands.of(tables, 0, 1, slot), out), named


def expected(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    out = torch.full_like(positional[4], -7.0)
    int4_group_gemm_torch(*positional[:4], out, **named)
    return out


CASES = [
    # (scheme, n, k, rows of experts 0 to 3, heights, gather, act, bias)
    (GROUPED, 128, 512, (3, 40, 0, 21), (32, 16), False, False, False),
    (GROUPED, 144, 384, (0, 70, 5, 1), (64, 16), True, False, True),
    (CHANNEL, 128, 256, (1, 16, 1, 0), (16,), True, False, False),
    (CHANNEL, 80, 200, (2, 33, 0, 130), (128, 32), False, False, True),
    (GROUPED, 96, 128, (2, 9, 0, 9), (16,), True, True, True),
    (CHANNEL, 64, 640, (4, 20, 4, 3), (64, 32, 16), False, True, False),
]
NAMES = ("scheme", "n", "k", "counts", "heights", "gather", "act", "bias")


# -------------------------------------------------------------------------------------------------------- tests


@BOTH
@EVERY
@given(n=st.integers(1, 40), k=st.integers(1, 300), experts=st.integers(1, 3))
def test_weights_come_back(scheme: Scheme, n: int, k: int, experts: int) -> None:
    given_ = [weight(n, k, scheme, seed) for seed in range(experts)]
    packed = pack_int4(given_)
    assert packed.words.shape == (experts, -(-n // 16), -(-k // 128), 2, 32, 4)
    for one, again in zip(given_, unpack_int4(packed), strict=True):
        assert one.scale is not None
        assert again.scale is not None
        assert torch.equal(one.codes, again.codes)
        assert torch.equal(one.scale, again.scale)


@EVERY
@given(rows=st.integers(0, 5), k=st.integers(1, 300), seed=st.integers(0, 9))
def test_rows_come_back(rows: int, k: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(pack_rows_torch(codes), k), codes)


@EVERY
@given(n=st.integers(1, 50), sixteens=st.integers(1, 4))
def test_channels_come_back(n: int, sixteens: int) -> None:
    values = torch.randn((2, n))
    assert torch.equal(unpack_channels(pack_channels(values), n), values)
    gate, up = torch.randn((2, 3, 16 * sixteens))
    for one, again in zip((gate, up), unpair(pair(gate, up)), strict=True):
        assert torch.equal(one, again)


def test_a_step_of_a_lane_is_sixteen_bytes() -> None:
    """Lane 4 g + t reads words 4 t to 4 t + 3 of row g, which begin at channels 8 t, 32 + 8 t, 64 + 8 t, 96 + 8 t."""
    codes = torch.zeros((1, 128), dtype=torch.int8)
    codes[0, [16, 48, 80, 112]] = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    assert pack_rows_torch(codes)[0, 8:12].tolist() == [1, 2, 3, 4]


@runs_kernels
@BOTH
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), k=st.integers(1, 1300), seed=st.integers(0, 99))
def test_kernel_quantizes_as_defined(scheme: Scheme, rows: int, k: int, seed: int) -> None:
    x = torch.randn((rows, k), generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
    words, scale = quantize_rows(x, scheme)
    wanted_words, wanted_scale = quantize_rows_torch(x, scheme)
    assert torch.equal(words, wanted_words)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(pack_rows(quantize_activation(x, scheme)[0]), wanted_words)


@runs_kernels
@BOTH
def test_kernel_lets_rows_that_are_no_numbers_spoil_themselves_only(scheme: Scheme) -> None:
    x = torch.randn((6, 256))
    x[0, 3], x[1, 200], x[2] = float("nan"), float("inf"), 0.0
    x[3, 0], x[4] = 3.4028234663852886e38, 1e-45
    x = x.to(DEVICE)
    words, scale = quantize_rows(x, scheme)
    wanted_words, wanted_scale = quantize_rows_torch(x, scheme)
    assert torch.equal(words, wanted_words)
    assert torch.equal(scale.isnan(), wanted_scale.isnan())
    assert torch.equal(scale.nan_to_num(), wanted_scale.nan_to_num())


@pytest.mark.skipif(knobs.runtime.interpret, reason="is run by itself")
def test_kernels_in_the_interpreter() -> None:
    """Triton decides when it is loaded whether it interprets, so this takes a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-vv", "-p", "no:cacheprovider", "-k", "test_kernel_", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("PASSED") == 4


def test_the_product_of_fragments_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-8, 8, (16, 128), dtype=torch.int8, generator=generator)
    right = torch.randint(-8, 8, (8, 128), dtype=torch.int8, generator=generator)
    codes = (left + 8).to(torch.uint8)
    packed = pack_int4([Quantized(CHANNEL, codes, torch.ones((16, 1)))])
    a0, a1 = (packed.words[0, :, 0, half].view(1, 1, 8, 4, 2, 2) for half in (0, 1))
    b = pack_rows_torch(right).view(1, 1, 8, 4, 2, 2)
    found = both_products(a0, a1, b)[0, 0].permute(2, 0, 1, 3).reshape(16, 8)
    assert torch.equal(found, left.long() @ right.long().T)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}")
def test_the_program_computes_what_is_defined(case: tuple[Any, ...]) -> None:
    positional, named = scenario(**dict(zip(NAMES, case, strict=True)))
    run_in_torch(*positional, **named)
    wanted = expected(positional, named)
    assert torch.equal(positional[4], wanted)
    assert (wanted == -7.0).any(), "rows of other experts stay as they were"


@BOTH
def test_the_twin_is_the_definition_of_a_linear(scheme: Scheme) -> None:
    positional, named = scenario(
        scheme, n=48, k=300, counts=(0, 20, 0, 0), heights=(16,), gather=False, act=False, bias=False
    )
    x = torch.randn((20, 300), generator=torch.Generator().manual_seed(1))
    words, scale = quantize_rows_torch(x, scheme)
    out = torch.zeros((20, 48))
    int4_group_gemm_torch(words, scale, *positional[2:4], out, **named)
    assert torch.equal(out, matmul(x, weight(48, 300, scheme)))


def test_schemes() -> None:
    runs = {name for name in ("w4a4_sym", "w4a4_g128_sym", "w4a4_g64_sym", "w4a4_g128_asym", "w4a8_sym", "w3a4_sym")
            if runs_on_int4(Scheme.parse(name))}  # fmt: skip
    assert runs == {"w4a4_sym", "w4a4_g128_sym"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: pack_int4([]), "no weight"),
        (lambda: pack_int4([weight(16, 128, Scheme.parse("w4a8_g128_sym"))]), "w4a8_g128_sym"),
        (lambda: pack_int4([weight(16, 128, GROUPED), weight(32, 128, GROUPED)]), "weights are"),
        (lambda: pack_int4_pair([weight(24, 128, GROUPED)], [weight(24, 128, GROUPED)]), "24 channels"),
        (lambda: pack_int4_pair([weight(16, 128, GROUPED)], [weight(16, 128, CHANNEL)]), "alike"),
        (lambda: quantize_rows(torch.zeros((1, 8)), Scheme.parse("w4a4_g64_sym")), "w4a4_g64_sym"),
    ],
)
def test_what_cannot_be_packed(wrong: Callable[[], object], reason: str) -> None:
    with pytest.raises(BadInt4, match=reason):
        wrong()


def test_what_cannot_be_launched() -> None:
    positional, named = scenario(**dict(zip(NAMES, CASES[0], strict=True)))
    x, x_scale, packed, bands, out = positional
    for wrong, reason in (
        ((x.long(), x_scale, packed, bands, out), "x is torch.int64"),
        ((x, x_scale[:, :1], packed, bands, out), r"x_scale is .* not contiguous"),
        ((x, x_scale[:5], packed, bands, out), "64 rows and x_scale 5"),
        ((x, x_scale, packed, bands, out[:, :8]), "out is"),
    ):
        with pytest.raises(BadInt4, match=reason):
            int4_group_gemm(*wrong, **named)
    low = Int4Bands(((0, 8),), *(getattr(bands, name) for name in Int4Bands.__slots__[1:]))
    with pytest.raises(BadInt4, match="heights are 16, 32, 64, 128"):
        int4_group_gemm(x, x_scale, packed, low, out, **named)


@BOTH
@pytest.mark.parametrize(("heights", "resident"), [((64, 32, 16), 2), ((128, 64, 32, 16), 1), ((16,), 3)])
def test_machine_code_of_ada(scheme: Scheme, heights: Sequence[int], resident: int) -> None:
    """Eight warps at work on a multiprocessor, native products, nothing spilled."""
    for binary in compile_all(
        [int4_request(scheme, heights, **ON_ADA, is_gated=one, has_bias=one) for one in (False, True)]
    ):
        facts = binary.facts()
        products = sum(int4.WIDTH // 16 * height // 8 * 2 // binary.num_warps for height in heights)
        assert facts.count("IMMA.16864.S4.S4") == products
        assert facts.spill_loads == facts.spill_stores == facts.stack_bytes == 0
        assert facts.shared_bytes <= LARGEST_PROGRAM_BYTES[89]
        assert facts.count("LDGSTS.E.BYPASS.128") > 0
        assert occupancy(facts, binary.num_warps) >= resident


def test_hopper_emulates_with_eight_bits() -> None:
    facts = compile_all([int4_request(GROUPED, (16,), arch=90, gather=True, is_gated=False)])[0].facts()
    assert facts.arch == 90
    assert facts.count("IMMA.16864") == 0
    assert facts.count("IMMA.16832.S8.S8") > 0
    assert facts.count("CALL") > 0


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}")
def test_on_the_device(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Exact; a fused activation alone may differ, in the last bit of an exponential."""
    positional, named = scenario(**dict(zip(NAMES, case, strict=True)), device="cuda", dtype=dtype)
    int4_group_gemm(*positional, **named)
    wanted = expected(positional, named)
    if named["options"].act is None:
        assert torch.equal(positional[4], wanted)
    else:
        torch.testing.assert_close(positional[4], wanted)


def test_one_binary_serves_every_call() -> None:
    """A number that is 1 is not made a constant, as Triton does by itself."""
    fixed = {param.name for param in kernels_int4.int4_kernel.params if param.do_not_specialize}
    assert fixed == {"steps", "top_k", "tokens"}
