"""
How packed codes become matrix operands: bit tricks as inline PTX, and the same in plain arithmetic for the interpreter.

Packed weights are read in *units* of 64 bytes a row: byte `c` holds the codes of input channels c, 64 + c, 128 + c, ...
of the unit, lowest bits first, so that each *part* of a unit is an operand of 64 channels. 3-bit codes are a unit of
their high bits and two units of their low two bits; `layout.py` writes all of this and reads it back.
"""

# what is compiled is not what Triton's stubs describe: constants are their values, types are known
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

PART = tl.constexpr(64)
"""Channels of a part, bytes of a row of a unit."""

INT8_STEP = tl.constexpr(2.0**-4)
"""4-bit codes become the high nibble of an int8: sixteen times their value."""
E4M3_STEP = tl.constexpr(2.0**9)
"""Magnitudes become the mantissa of a subnormal e4m3, whose lowest bit is 2^-9."""

# a signed nibble with its top bit flipped lies in the byte's high half: 16 * (code - 8)
HIGH_NIBBLES = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $2, 4;
lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")

# codes times a multiplier of 1 to 16, in both nibbles of four bytes: $3 has it, $7 four times 128 - 8 times it, so that
# (code - 8) * multiplier + 128 stands in each byte and carries into none
MULTIPLIED = tl.constexpr("""{
.reg .b32 t, u;
and.b32 t, $2, 0x0F0F0F0F;
shr.b32 u, $2, 4;
and.b32 u, u, 0x0F0F0F0F;
mad.lo.u32 t, t, $3, $7;
mad.lo.u32 u, u, $3, $7;
xor.b32 $0, t, 0x80808080;
xor.b32 $1, u, 0x80808080;
}""")
MULTIPLIED_REGISTERS = tl.constexpr("=r,=r,r,r,r,r,r,r,r,r,r")
MIDDLES, MINUS_EIGHTS = tl.constexpr(-0x7F7F7F80), tl.constexpr(-0x08080808)
"""Four bytes of 128 and of -8, as an int32."""

# bits 7 and 2..0 are sign and magnitude of the low code, bits 6 and 5..3 those of the high one
SUBNORMALS = tl.constexpr("""{
.reg .b32 t, u;
and.b32 $0, $2, 0x87878787;
shr.b32 t, $2, 3;
and.b32 t, t, 0x07070707;
shl.b32 u, $2, 1;
lop3.b32 $1, u, 0x80808080, t, 0xEA;
}""")

# 0x4300 is 128 in bf16, whose last mantissa bit is 1: a code of up to 7 bits in it is 128 + code, exactly; times one
# minus 128 (0xC300), because bf16 has a subtraction only from sm_90 on
_BF16_NIBBLES = tl.constexpr("""{
.reg .b32 t0, t1, u0, u1, m, one, less;
mov.b32 m, 0x43004300;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC300C300;
prmt.b32 t0, $4, 0, 0x4140;
prmt.b32 t1, $4, 0, 0x4342;
shr.b32 u0, t0, 4;
shr.b32 u1, t1, 4;
lop3.b32 t0, t0, 0x000F000F, m, 0xEA;
lop3.b32 t1, t1, 0x000F000F, m, 0xEA;
lop3.b32 u0, u0, 0x000F000F, m, 0xEA;
lop3.b32 u1, u1, 0x000F000F, m, 0xEA;
fma.rn.bf16x2 $0, t0, one, less;
fma.rn.bf16x2 $1, t1, one, less;
fma.rn.bf16x2 $2, u0, one, less;
fma.rn.bf16x2 $3, u1, one, less;
}""")


@triton.jit
def cast(x: tl.tensor, DTYPE: tl.constexpr, PTX: tl.constexpr) -> Any:
    """Cast to the nearest value, halves to even; the interpreter's own cast to bf16 cuts off."""
    if (not PTX) and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        x = tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def int8_parts(p: tl.tensor, PTX: tl.constexpr) -> Any:
    """Bytes [n, 64] of 4-bit codes -> both parts as int8 [n, 64], 16 * (code - 8)."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            HIGH_NIBBLES, "=r,=r,r", [p], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = ((p << 4) ^ 0x80).to(tl.int8, bitcast=True)
        high = ((p & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def e4m3_parts(p: tl.tensor, PTX: tl.constexpr) -> Any:
    """Bytes [n, 64] of sign-magnitude codes -> both parts as e4m3 [n, 64], code * 2^-9."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            SUBNORMALS, "=r,=r,r", [p], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
    else:
        low = (p & 0x87).to(tl.float8e4nv, bitcast=True)
        high = (((p << 1) & 0x80) | ((p >> 3) & 7)).to(tl.float8e4nv, bitcast=True)
    return low, high


@triton.jit
def multiplied_parts(p: tl.tensor, m: tl.tensor, PTX: tl.constexpr) -> Any:
    """Bytes [n, 64] of 4-bit codes, int32 multipliers [n, 1] up to 16 -> both parts as int8 [n, 64], (code - 8) * m."""
    if PTX:
        middle = m * MINUS_EIGHTS + MIDDLES
        low, high = tl.inline_asm_elementwise(
            MULTIPLIED, MULTIPLIED_REGISTERS, [p, m, middle], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = (((p & 15).to(tl.int32) - 8) * m).to(tl.int8)
        high = (((p >> 4).to(tl.int32) - 8) * m).to(tl.int8)
    return low, high


@triton.jit
def bf16_nibbles(p: tl.tensor, PTX: tl.constexpr) -> Any:
    """Bytes [n, 64] of 4-bit codes -> both parts, the codes 0 to 15, as `float_codes` gives them in bf16."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            _BF16_NIBBLES, "=r,=r,=r,=r,r", [p], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low = float_codes(p & 15, 4, tl.bfloat16, PTX)
        high = float_codes(p >> 4, 4, tl.bfloat16, PTX)
    return low, high


@triton.jit
def float_codes(codes: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr) -> Any:
    """
    uint8 codes below 2^BITS -> the same numbers in bf16 or fp16; exact.

    The interpreter has no bf16 arithmetic: without PTX it is float32 here, and what follows is rounded once.
    """
    if not PTX:
        value = codes.to(tl.float32)
    elif DTYPE == tl.float16:
        value = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    elif BITS <= 7:
        value = (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 128.0
    else:
        value = codes.to(tl.float32).to(tl.bfloat16)
    return value
