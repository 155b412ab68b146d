"""How packed codes become operands: the kernels for every byte, and their PTX bit by bit without a GPU."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from mxmoe.backends.triton import decode
from mxmoe.backends.triton.interpreter import mend_interpreter

from .small_blocks import DEVICE

PTX = tl.constexpr(DEVICE == "cuda")
BYTES = torch.arange(256, dtype=torch.uint8)
mend_interpreter()


@triton.jit
def parts_kernel(p_ptr: tl.tensor, low_ptr: tl.tensor, high_ptr: tl.tensor, WAY: tl.constexpr) -> None:
    at = tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :]
    p = tl.load(p_ptr + at)
    if WAY == 0:
        low, high = decode.int8_parts(p, PTX)
    elif WAY == 1:
        low, high = decode.e4m3_parts(p, PTX)
    elif WAY == 2:
        low, high = decode.bf16_nibbles(p, PTX)
    else:  # multipliers from WAY - 2 on
        low, high = decode.multiplied_parts(p, (tl.arange(0, 4) + (WAY - 2))[:, None], PTX)
    tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty))
    tl.store(high_ptr + at, high.to(high_ptr.dtype.element_ty))


@triton.jit
def codes_kernel(p_ptr: tl.tensor, to: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> None:
    at = tl.arange(0, 256)
    p = tl.load(p_ptr + at)
    tl.store(to + at, decode.float_codes(p & ((1 << BITS) - 1), BITS, DTYPE, PTX).to(tl.float32))


@triton.jit
def cast_kernel(x_ptr: tl.tensor, to: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(to + at, decode.cast(tl.load(x_ptr + at), to.dtype.element_ty, PTX))


def run_parts(way: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both parts of all bytes, in float64."""
    low, high = (torch.empty(256, dtype=dtype, device=DEVICE) for _ in range(2))
    parts_kernel[(1,)](BYTES.to(DEVICE), low, high, way)
    return low.cpu().double(), high.cpu().double()


def test_nibbles_become_the_high_half_of_an_int8() -> None:
    low, high = run_parts(0, torch.int8)
    codes = BYTES.int()
    assert torch.equal(low * decode.INT8_STEP.value, ((codes & 15) - 8).double())
    assert torch.equal(high * decode.INT8_STEP.value, ((codes >> 4) - 8).double())


def test_signs_and_magnitudes_become_subnormals() -> None:
    low, high = run_parts(1, torch.float8_e4m3fn)
    p = BYTES.int()
    sign_low, sign_high = 1 - 2 * (p >> 7), 1 - 2 * ((p >> 6) & 1)
    assert torch.equal(low * decode.E4M3_STEP.value, (sign_low * (p & 7)).double())
    assert torch.equal(high * decode.E4M3_STEP.value, (sign_high * ((p >> 3) & 7)).double())


@pytest.mark.parametrize("first", [1, 5, 9, 13])
def test_nibbles_become_multiples(first: int) -> None:
    low, high = run_parts(first + 2, torch.int8)
    codes, multipliers = BYTES.int(), first + torch.arange(256) // 64
    assert torch.equal(low, (((codes & 15) - 8) * multipliers).double())
    assert torch.equal(high, (((codes >> 4) - 8) * multipliers).double())


def test_nibbles_become_numbers() -> None:
    low, high = run_parts(2, torch.bfloat16)
    assert torch.equal(low, (BYTES & 15).double())
    assert torch.equal(high, (BYTES >> 4).double())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float16], ids=str)
def test_codes_become_numbers(bits: int, dtype: Any) -> None:  # noqa: ANN401  # a type of Triton's
    out = torch.empty(256, dtype=torch.float32, device=DEVICE)
    codes_kernel[(1,)](BYTES.to(DEVICE), out, bits, dtype)
    assert torch.equal(out.cpu(), (BYTES & ((1 << bits) - 1)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_even(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (3000,), generator=random, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(0x3F80, 0x3F80 + 1000, dtype=torch.int32) * 2**16 + 0x8000
    edges = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, -3e38, 1e-40, 2.0**-133])
    x = torch.cat([bits.view(torch.float32), halves.view(torch.float32), edges])
    if DEVICE == "cpu":  # the interpreter takes the smallest numbers for 0
        x = x.where((x.abs() >= 2.0**-126) | x.isnan(), 0.0)
    if dtype == torch.float16:
        x = x[~(x.abs() > 65504) | ~x.isfinite()]
    x = torch.nn.functional.pad(x, (0, 4096 - len(x))).contiguous()
    out = torch.empty(4096, dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x.to(DEVICE), out, 4096)
    wanted = x.to(dtype)
    assert torch.equal(out.cpu().nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))


# The PTX, run by Python: on numbers, or on the bit vectors of a prover

WORD = 0xFFFFFFFF


def _lop3(a: Any, b: Any, c: Any, table: int) -> Any:  # noqa: ANN401  # numbers or bit vectors
    """Any function of three bits: bit 4a + 2b + c of `table`."""
    out = a ^ a
    for row in range(8):
        if table >> row & 1:
            out = out | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out & WORD


def _prmt(a: int, b: int, selector: int) -> int:
    """Bytes of b:a picked by the nibbles of the selector."""
    data = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(data[selector >> 4 * at & 7] for at in range(4)), "little")


def _bf16(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def _fma_bf16x2(a: int, b: int, c: int) -> int:
    out = 0
    for shift in (0, 16):
        value = _bf16(a >> shift & 0xFFFF) * _bf16(b >> shift & 0xFFFF) + _bf16(c >> shift & 0xFFFF)
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        assert not bits & 0xFFFF, "the result is a bf16"
        out |= bits >> 16 << shift
    return out


def _shift_right(a: Any, n: int) -> Any:  # noqa: ANN401  # as above
    if isinstance(a, int):
        return a >> n
    from z3 import LShR

    return LShR(a, n)


OPS: Mapping[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n & WORD,
    "shr.b32": _shift_right,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "mad.lo.u32": lambda a, b, c: a * b + c & WORD,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma_bf16x2,
}


def run_ptx(text: str, word: Any, outputs: int, more: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:  # noqa: ANN401  # as above
    """Run a block of inline PTX on its input, which is numbered behind the outputs, and `more` registers."""
    registers: dict[str, Any] = {f"${outputs}": word, **more}
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, _, rest = line.rstrip(";").partition(" ")
        to, *operands = [one.strip() for one in rest.split(",")]
        read = [registers[one] if re.match(r"[$a-z]", one) else int(one, 0) for one in operands]
        registers[to] = OPS[name](*read)
    return [registers[f"${number}"] for number in range(outputs)]


def _bytes_of(word: int) -> list[int]:
    return list(word.to_bytes(4, "little"))


def _words() -> list[int]:
    """Every byte at every place, beside others."""
    return [
        byte << 8 * place | (0xA5C33C5A * (byte + 1) & WORD & ~(0xFF << 8 * place))
        for byte in range(256)
        for place in range(4)
    ]


def test_ptx_of_nibbles() -> None:
    for word in _words():
        low, high = run_ptx(decode.HIGH_NIBBLES.value, word, 2)
        for byte, a, b in zip(_bytes_of(word), _bytes_of(low), _bytes_of(high), strict=True):
            assert (a, b) == (16 * ((byte & 15) - 8) & 0xFF, 16 * ((byte >> 4) - 8) & 0xFF)


def test_ptx_of_subnormals() -> None:
    for word in _words():
        low, high = run_ptx(decode.SUBNORMALS.value, word, 2)
        for byte, a, b in zip(_bytes_of(word), _bytes_of(low), _bytes_of(high), strict=True):
            assert (a, b) == (byte & 0x87, (byte << 1) & 0x80 | (byte >> 3) & 7)


def test_ptx_of_bf16_nibbles() -> None:
    for word in _words():
        registers = run_ptx(decode._BF16_NIBBLES.value, word, 4)
        halves = [_bf16(one >> shift & 0xFFFF) for one in registers for shift in (0, 16)]
        assert halves[:4] == [byte & 15 for byte in _bytes_of(word)]
        assert halves[4:] == [byte >> 4 for byte in _bytes_of(word)]


def _middle(multiplier: int) -> int:
    return multiplier * decode.MINUS_EIGHTS.value + decode.MIDDLES.value & WORD


@pytest.mark.parametrize("multiplier", range(1, 17))
def test_ptx_of_multiples_for_all_words(multiplier: int) -> None:
    z3 = pytest.importorskip("z3")
    word = z3.BitVec("word", 32)
    more = {"$3": z3.BitVecVal(multiplier, 32), "$7": z3.BitVecVal(_middle(multiplier), 32)}
    low, high = run_ptx(decode.MULTIPLIED.value, word, 2, more)
    for place in range(4):
        byte, a, b = (z3.Extract(8 * place + 7, 8 * place, one) for one in (word, low, high))
        solver = z3.Solver()
        solver.add(z3.Or(a != ((byte & 15) - 8) * multiplier, b != (z3.LShR(byte, 4) - 8) * multiplier))
        assert solver.check() == z3.unsat


@pytest.mark.parametrize("name", ["HIGH_NIBBLES", "SUBNORMALS"])
def test_ptx_for_all_words(name: str) -> None:
    z3 = pytest.importorskip("z3")
    word = z3.BitVec("word", 32)
    low, high = run_ptx(getattr(decode, name).value, word, 2)
    for place in range(4):
        byte, a, b = (z3.Extract(8 * place + 7, 8 * place, one) for one in (word, low, high))
        if name == "HIGH_NIBBLES":
            wanted = (16 * ((byte & 15) - 8), 16 * (z3.LShR(byte, 4) - 8))
        else:
            wanted = (byte & 0x87, ((byte << 1) & 0x80) | (z3.LShR(byte, 3) & 7))
        solver = z3.Solver()
        solver.add(z3.Or(a != wanted[0], b != wanted[1]))
        assert solver.check() == z3.unsat, solver.model()
