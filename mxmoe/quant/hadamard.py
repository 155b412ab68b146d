"""
Hadamard matrices, and the rotation by one: outliers of a few channels are spread over all, and no product changes.

A rotation R is a normalised Hadamard matrix H / sqrt(n), or a diagonal of blocks of one. It is orthogonal, so
(x R) (W R)^T = x W^T: QuaRot (Ashkboos et al., NeurIPS 2024, section 4) rotates what a linear reads and its weight.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mxmoe.errors import BadActivation
from mxmoe.ir import check_rotation, hadamard_base, paley_field
from mxmoe.quant.rtn import FLOATS


def hadamard(n: int) -> Tensor:
    """
    Construct a Hadamard matrix, int8 [n, n] of +1 and -1 with H H^T = n I exactly: n=2 -> [[1, 1], [1, -1]].

    It is the Kronecker product of a base of order K (`mxmoe.ir.hadamard_base`) and Sylvester's matrix of order n / K.

    Raises:
        BadRotation: no matrix of this size is known; with the nearest sizes that divide n and have one.
    """
    base = _base_of(n)
    return torch.kron(_paley(base), _sylvester(n // base))


def random_signs(n: int, seed: int = 0) -> Tensor:
    """Draw n times +1 or -1, float64 [n]; a seed always draws the same."""
    draws = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed))
    return 2.0 * draws.double() - 1.0


def rotate(x: Tensor, block: int | None = None, *, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """
    Multiply rows [..., n] by the normalised Hadamard matrix of size `block`, every `block` channels for themselves.

    Weights [out, in] are rotated along their input channels by the same call. With signs d the rotation is
    diag(d) H / sqrt(block); the inverse is its transpose. n log2(block / K) + n K additions and products a row, where K
    is the base: 1 for a power of two, 44 for 1408.

    Args:
        x: float tensor on any device; narrower types than float32 are raised to it.
        block: channels that are mixed; None mixes all n.
        signs: [n], +1 and -1, see `random_signs`.
        inverse: undo the rotation.

    Returns:
        [..., n], float64 for float64, else float32. [3, 1] -> [2.828427, 1.414214].

    Raises:
        BadActivation: not a float tensor, or without channels.
        BadRotation: `block` does not divide n or no matrix of its size is known; with the nearest that work.
    """
    if x.dtype not in FLOATS or x.dim() < 1 or x.shape[-1] < 1:
        raise BadActivation(found=f"{x.dtype} {list(x.shape)}", channels="channels")
    n = x.shape[-1]
    size = n if block is None else block
    base = _base_of(size, n)
    y = x if x.dtype == torch.float64 else x.to(torch.float32)
    d = None if signs is None else signs.to(y)
    # scaled first: sums of the largest floats stay finite
    y = (y if d is None or inverse else y * d) * size**-0.5
    if base > 1:
        matrix = _paley(base).to(y)
        y = torch.matmul(matrix if inverse else matrix.T, y.reshape(-1, base, size // base))
    y = _butterflies(y.reshape(-1, size // base)).reshape(x.shape)
    return y * d if d is not None and inverse else y


def _base_of(size: int, width: int | None = None) -> int:
    """Give the base of a size that divides a width, or raise BadRotation; one channel is left as it is."""
    if size == 1 and width in (None, 1):
        return 1
    check_rotation(size if width is None else width, size)
    base = hadamard_base(size)
    assert base is not None, f"{size=} was checked"
    return base


def _butterflies(y: Tensor) -> Tensor:
    """Multiply rows [rows, 2^m] by Sylvester's matrix: m times sums and differences of neighbours, bit by bit."""
    for _ in range(y.shape[-1].bit_length() - 1):
        even, odd = y[:, 0::2], y[:, 1::2]
        y = torch.cat((even + odd, even - odd), dim=-1)
    return y


def _sylvester(n: int) -> Tensor:
    """Give the matrix of a power of two, int8 [n, n]; entry (i, j) is -1 to the number of ones in i & j."""
    matrix = torch.ones((1, 1), dtype=torch.int8)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@cache
def _paley(order: int) -> Tensor:
    """
    Construct the matrix of a base order, int8 [order, order]; [[1]] for 1.

    From the Jacobsthal matrix Q[i, j] = character(i - j) of the field, bordered by ones to C. Construction I, where Q
    is skew: I + C with -1 in the first column. Construction II, where Q is symmetric: every entry of C becomes a 2 x 2
    matrix, 0 -> [[1, -1], [-1, -1]], c -> c [[1, 1], [1, -1]].
    """
    if order == 1:
        return torch.ones((1, 1), dtype=torch.int8)
    field = paley_field(order)
    assert field is not None, f"{order=} is no order of Paley's"
    p, e = field
    q = p**e
    bordered = torch.zeros((q + 1, q + 1), dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if q % 4 == 3 else 1
    bordered[1:, 1:] = _jacobsthal(p, e)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if q % 4 == 3:
        return bordered + eye
    signs, diagonal = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(bordered, signs.to(torch.int8)) + torch.kron(eye, diagonal.to(torch.int8))


def _jacobsthal(p: int, e: int) -> Tensor:
    """Give +1 where i - j is a square of the field, -1 where it is none, 0 where i = j: int8 [p^e, p^e], e 1 or 2."""
    numbers = torch.arange(p)
    squares = numbers * numbers % p
    if e == 1:
        is_square = torch.isin(numbers, squares)
        difference = (numbers[:, None] - numbers) % p
    else:
        # a + b t with t^2 = r, r no square of the integers modulo p, has the number a p + b
        r = int(numbers[~torch.isin(numbers, squares)][0])
        a, b = (part.reshape(-1) for part in torch.meshgrid(numbers, numbers, indexing="ij"))
        is_square = torch.isin(torch.arange(p * p), (a * a + r * b * b) % p * p + 2 * a * b % p)
        difference = (a[:, None] - a) % p * p + (b[:, None] - b) % p
    character = (2 * is_square.to(torch.int8) - 1).index_fill_(0, torch.tensor([0]), 0)
    return character[difference]
