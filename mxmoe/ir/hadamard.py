"""
Which widths have a Hadamard matrix that can be constructed: number theory only, the matrices are in `mxmoe.quant`.

A Hadamard matrix H has entries +1 and -1 and H H^T = n I. From one of order K those of order K 2^m follow by doubling
(Sylvester 1867); Paley (J. Math. Phys. 12, 1933) gives orders q + 1 and 2 (q + 1) from a finite field of q elements.
"""

from __future__ import annotations

from functools import cache
from math import isqrt

from mxmoe.errors import BadRotation

_SHOWN = 5


@cache
def paley_field(order: int) -> tuple[int, int] | None:
    """
    Find the field behind a Paley construction: (p, e) with q = p^e, or None where none gives this order.

    Construction I has order q + 1 with q = 3 mod 4, construction II 2 (q + 1) with q = 1 mod 4. Fields of p and of p^2
    elements are tried: 44 -> (43, 1), 20 -> (19, 1), 36 -> (17, 1), 100 -> (7, 2), 92 -> None.
    """
    if order % 4:
        return None
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        for e in (1, 2):
            p = q if e == 1 else isqrt(q)
            if q % 4 == rest and p**e == q and _is_prime(p):
                return p, e
    return None


@cache
def hadamard_base(n: int) -> int | None:
    """
    Find the smallest K for which n = K 2^m and a matrix of order K is known: 4096 -> 1, 1408 -> 44, 10944 -> 684.

    K is 1 or the order of a Paley construction; None where there is no such K: 7, 1412.
    """
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1
    order = 4 * odd
    while n % order == 0:
        if paley_field(order):
            return order
        order *= 2
    return None


@cache
def rotation_blocks(width: int) -> tuple[int, ...]:
    """All sizes above 1 that divide `width` and have a matrix, ascending: 12 -> 2, 4, 12; 1408 -> 2, ..., 128, ..."""
    small = [size for size in range(1, isqrt(width) + 1) if width % size == 0]
    return tuple(size for size in sorted({*small, *(width // s for s in small)}) if size > 1 and hadamard_base(size))


def check_rotation(width: int, block: int) -> None:
    """
    Check that `width` channels can be rotated in blocks of `block`.

    Raises:
        BadRotation: the block is no divisor, or no matrix of its size is known; with the nearest blocks that work.
    """
    if block > 1 and width % block == 0 and hadamard_base(block):
        return
    reason = "no Hadamard matrix of this size is known here" if block > 1 and width % block == 0 else "it must divide"
    if block < 2:
        reason = "a block has at least 2 channels"
    near = sorted(sorted(rotation_blocks(width), key=lambda size: abs(size - block))[:_SHOWN])
    known = f"blocks of {', '.join(map(str, near))} work" if near else "no block does"
    raise BadRotation(width=width, block=block, reason=reason, known=known)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))
