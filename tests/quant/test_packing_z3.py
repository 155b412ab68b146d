"""
Proofs over all words that the bit stream is decoded as defined: code i is bits [i * b, (i + 1) * b).

The functions proved are the ones that run: `decode_code` serves every unpacking, `encode_word` every packing, and both
repeat with a period of eight codes, so one period stands for a row of any length.
"""

import pytest
import z3

from mxmoe.quant.packing import PERIOD, code_position, decode_code, encode_word

ALL_BITS = range(1, 9)


def prove(claim: z3.BoolRef) -> None:
    solver = z3.Solver()
    solver.add(z3.Not(claim))
    verdict = solver.check()
    assert verdict == z3.unsat, f"counterexample: {solver.model() if verdict == z3.sat else verdict}"


def stream_of(bits: int, spare: int = 0) -> z3.BitVecRef:
    """One period of the stream, all bytes free, and `spare` bytes behind it."""
    return z3.BitVec("stream", 8 * (bits + spare))


def byte_of(stream: z3.BitVecRef, index: int, width: int) -> z3.BitVecRef:
    """Byte `index` of a stream, widened with zeros as an integer register would be."""
    return z3.ZeroExt(width - 8, z3.Extract(8 * index + 7, 8 * index, stream))


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_decoding_two_bytes_gives_the_bits_of_the_code(bits: int, width: int) -> None:
    # one spare byte, so that the byte behind the last code exists and is free to be anything
    stream = stream_of(bits, spare=1)
    for index in range(PERIOD):
        byte, shift = code_position(index, bits)
        code = decode_code(byte_of(stream, byte, width), byte_of(stream, byte + 1, width), shift, bits)
        definition = z3.Extract((index + 1) * bits - 1, index * bits, stream)
        prove(code == z3.ZeroExt(width - bits, definition))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_positions_repeat_with_the_period(bits: int) -> None:
    index = z3.BitVec("index", 64)
    prove(
        z3.Implies(
            z3.ULT(index, 2**32),
            z3.And(
                z3.LShR((index + PERIOD) * bits, 3) == z3.LShR(index * bits, 3) + bits,
                ((index + PERIOD) * bits) & 7 == (index * bits) & 7,
            ),
        )
    )


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_high_byte_is_not_needed_by_codes_that_end_in_the_low_one(bits: int) -> None:
    low, high, other = z3.BitVecs("low high other", 16)
    small = z3.And(z3.ULT(low, 256), z3.ULT(high, 256), z3.ULT(other, 256))
    for shift in range(8):
        same = decode_code(low, high, shift, bits) == decode_code(low, other, shift, bits)
        if shift + bits <= 8:
            prove(z3.Implies(small, same))
        else:
            with pytest.raises(AssertionError, match="counterexample"):
                prove(z3.Implies(small, same))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shift", range(8))
def test_a_code_masked_where_it_stands_is_the_code_times_a_power_of_two(bits: int, shift: int) -> None:
    """Kernels that work in floats skip the shift and scale by 2^-shift: exact, as the product is below 2^15."""
    low, high = z3.BitVecs("low high", 32)
    small = z3.And(z3.ULT(low, 256), z3.ULT(high, 256))
    word = low | (high << 8) if shift + bits > 8 else low
    masked = word & (((1 << bits) - 1) << shift)
    code = decode_code(low, high, shift, bits)
    prove(z3.Implies(small, z3.And(masked == code << shift, z3.ULT(masked, 2**15))))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_decoding_undoes_encoding(bits: int) -> None:
    codes = [z3.BitVec(f"code{i}", 64) for i in range(PERIOD)]
    small = z3.And(*(z3.ULT(code, 2**bits) for code in codes))
    word = encode_word(codes, bits)
    for index in range(PERIOD):
        byte, shift = code_position(index, bits)
        # as in unpack_codes: behind the last byte of a period its own last byte is read again
        low, high = (byte_of(word, j, 32) for j in (byte, min(byte + 1, bits - 1)))
        decoded = decode_code(low, high, shift, bits)
        prove(z3.Implies(small, z3.ZeroExt(32, decoded) == codes[index]))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_encoding_leaves_no_bit_outside_its_bytes(bits: int) -> None:
    codes = [z3.BitVec(f"code{i}", 64) for i in range(PERIOD)]
    small = z3.And(*(z3.ULT(code, 2**bits) for code in codes))
    word = encode_word(codes, bits)
    for index, code in enumerate(codes):
        definition = z3.Extract((index + 1) * bits - 1, index * bits, word)
        prove(z3.Implies(small, z3.ZeroExt(64 - bits, definition) == code))
    if bits < 8:
        prove(z3.Implies(small, z3.LShR(word, 8 * bits) == 0))
