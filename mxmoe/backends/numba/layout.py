"""
How a bank's matrices lie in memory for the kernels: the packed bytes, reordered, with a row of numbers that says where.

Nothing is decoded and nothing is added: a matrix takes exactly the bytes of its `Packed` form. For the float kernels
the bytes of 64 neighbouring columns (a panel) are interleaved, so that one load reads the same channel of many columns;
integer kernels read rows as they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mxmoe.backends.numba import kernels
from mxmoe.backends.numba.kernels import PANEL
from mxmoe.ir import Scheme
from mxmoe.quant import Packed, scale_dtype

_FLOAT_FAMILY = {
    "int": kernels.FLOAT_CODES,
    "e4m3": kernels.FLOAT_E4M3,
    "bf16": kernels.FLOAT_BF16,
    "fp16": kernels.FLOAT_FP16,
}


def family_of(scheme: Scheme) -> int:
    """Which way through a tile a scheme takes: INTEGER where activations are integers, else one of the FLOAT ones."""
    return kernels.INTEGER if scheme.act_format == "int" else _FLOAT_FAMILY[scheme.weight_format]


def to_panels(rows: np.ndarray) -> np.ndarray:
    """
    Interleave rows [n, r] by panels: flat, for each 64 rows first all their elements 0, then all their elements 1 ...

    The last panel is as narrow as what is left. With a panel of 2, rows [[1, 2], [3, 4], [5, 6]] -> 1 3 2 4 5 6.
    """
    whole = len(rows) // PANEL * PANEL
    head = rows[:whole].reshape(-1, PANEL, rows.shape[1]).transpose(0, 2, 1).reshape(-1)
    return np.concatenate([head, rows[whole:].T.reshape(-1)])


def from_panels(flat: np.ndarray, n: int) -> np.ndarray:
    """Undo `to_panels`: flat to rows [n, r]."""
    width = len(flat) // n
    whole = n // PANEL * PANEL
    head = flat[: whole * width].reshape(-1, width, PANEL).transpose(0, 2, 1).reshape(whole, width)
    return np.concatenate([head, flat[whole * width :].reshape(width, n - whole).T])


@dataclass(frozen=True, eq=False)
class Arena:
    """The packed matrices of one group GEMM in three flat arrays, and where each is."""

    payload: np.ndarray
    """uint8, all codes."""
    meta: np.ndarray
    """uint16, all scales, zero points and multipliers; a float32 takes two, and two bytes take one."""
    bias: np.ndarray
    """float32 [weights * experts * n], or empty."""
    matrices: np.ndarray
    """int64 [weights * experts, N_FIELDS]: what the kernels read of each matrix."""
    schemes: tuple[Scheme, ...]
    """The scheme of each expert; a group GEMM's weights share it."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and biases; alignment, a few bytes a matrix, is not counted."""
        n, k = (int(size) for size in self.matrices[0, [kernels.N, kernels.K]])
        one_weight = sum(n * (_row_bytes(s, k) + _row_meta_bytes(s, k)) for s in self.schemes)
        return one_weight * (len(self.matrices) // len(self.schemes)) + self.bias.nbytes


class ArenaBuilder:
    """Fills an `Arena` matrix by matrix, so that no second copy of a bank's weights ever exists."""

    def __init__(self, n: int, k: int, schemes: Sequence[Scheme], n_weights: int, bias: np.ndarray | None) -> None:
        """
        Reserve memory for `n_weights` matrices [n, k] per expert.

        Args:
            n: output channels.
            k: input channels.
            schemes: one per expert.
            n_weights: weights of the group GEMM, 2 for a fused gate_up.
            bias: float32 [weights, experts, n] or None.
        """
        self._shape = (n, k)
        self._schemes = tuple(schemes) * n_weights
        self._matrices = np.zeros((len(self._schemes), kernels.N_FIELDS), np.int64)
        payload = meta = 0
        for index, scheme in enumerate(self._schemes):
            payload += payload % 2  # 16-bit weights are read as 16-bit words
            meta += meta % 2
            self._matrices[index] = _describe(scheme, n, k, payload, meta, -1 if bias is None else index * n)
            payload += n * _row_bytes(scheme, k)
            meta += sum(_words(scheme, n, k))
        # 8 spare bytes: an integer row is read two bytes at a time, its last code too
        self._payload = np.zeros(payload + payload % 2 + 8, np.uint8)
        self._meta = np.zeros(meta + meta % 2, np.uint16)
        self._bias = np.zeros(0, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32).reshape(-1)
        self._n_experts = len(schemes)

    def put(self, weight: int, expert: int, packed: Packed) -> None:
        """Copy one packed matrix to its place."""
        index = weight * self._n_experts + expert
        row = self._matrices[index]
        assert packed.scheme == self._schemes[index], f"{packed.scheme} for a place of {self._schemes[index]}"
        assert (packed.n, packed.k) == self._shape, f"[{packed.n}, {packed.k}] for a place of {list(self._shape)}"
        codes = _order(packed.payload.numpy(), packed.scheme)
        start = row[kernels.PAYLOAD]
        self._payload[start : start + codes.size] = codes
        start = row[kernels.META]
        for tensor in (packed.scale, packed.zero, packed.multipliers):
            if tensor is not None:
                values = _order_meta(tensor, packed.scheme)
                self._meta[start : start + values.size] = values
                start += values.size

    def build(self) -> Arena:
        """Give the finished arena; the builder is spent."""
        return Arena(self._payload, self._meta, self._bias, self._matrices, self._schemes[: self._n_experts])


def read_back(arena: Arena, index: int) -> Packed:
    """Undo `ArenaBuilder.put`: the packed matrix `index` (weight * experts + expert) of an arena."""
    row = arena.matrices[index]
    scheme = arena.schemes[index % len(arena.schemes)]
    n, k, groups = (int(row[field]) for field in (kernels.N, kernels.K, kernels.GROUPS))
    size = n * _row_bytes(scheme, k)
    payload = arena.payload[row[kernels.PAYLOAD] : row[kernels.PAYLOAD] + size]
    words = _words(scheme, n, k)
    meta = arena.meta[row[kernels.META] :][: sum(words)]
    of_scale, of_zero, of_multipliers = np.split(meta, np.cumsum(words)[:2])
    scale = _disorder_meta(of_scale, n, scheme) if of_scale.size else None
    zero = _disorder_meta(of_zero, n, scheme) if of_zero.size else None
    multipliers = None
    if scheme.integer_scales:  # the last byte may be none of them
        flat = of_multipliers.copy().view(np.uint8)[: n * groups]
        multipliers = torch.from_numpy(flat.reshape(n, groups))
    return Packed(scheme, n, k, torch.from_numpy(_disorder(payload, n, scheme).copy()), scale, zero, multipliers)


def _describe(scheme: Scheme, n: int, k: int, payload: int, meta: int, bias: int) -> np.ndarray:
    row = np.zeros(kernels.N_FIELDS, np.int64)
    row[kernels.FAMILY] = family_of(scheme)
    row[kernels.BITS] = scheme.weight_bits
    row[kernels.K] = k
    row[kernels.N] = n
    row[kernels.GROUP] = scheme.group_size or k
    row[kernels.GROUPS] = scheme.n_groups(k)
    row[kernels.PAYLOAD] = payload
    row[kernels.META] = meta
    row[kernels.IS_WIDE] = _is_wide(scheme)
    row[kernels.IS_ASYM] = not scheme.symmetric
    row[kernels.HAS_MULTIPLIERS] = scheme.integer_scales
    row[kernels.ACT_GROUPED] = scheme.act_group_size is not None
    row[kernels.BIAS] = bias
    return row


def _row_bytes(scheme: Scheme, k: int) -> int:
    return -(-k * scheme.weight_bits // 8)


def _row_meta_bytes(scheme: Scheme, k: int) -> int:
    """Bytes of scales, multipliers and zero points of one row."""
    return (scheme.n_groups(k) * (scheme.scale_bits + scheme.zero_bits) + scheme.channel_bits) // 8


def _words(scheme: Scheme, n: int, k: int) -> tuple[int, int, int]:
    """16-bit words of the scales, zero points and multipliers of `n` rows, in this order in memory."""
    groups = n * scheme.n_groups(k)
    if scheme.integer_scales:
        return n * scheme.channel_bits // 16, 0, -(-groups // 2)
    return groups * scheme.scale_bits // 16, groups * scheme.zero_bits // 16, 0


def _is_wide(scheme: Scheme) -> bool:
    return scale_dtype(scheme) == torch.float32


def _order(payload: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Bytes [n, row bytes] of a packed payload in the kernels' order, flat."""
    if family_of(scheme) == kernels.INTEGER:
        return payload.reshape(-1)
    if scheme.is_float:
        return to_panels(payload.view(np.uint16)).view(np.uint8)
    return to_panels(payload)


def _disorder(flat: np.ndarray, n: int, scheme: Scheme) -> np.ndarray:
    """Undo `_order`: [n, row bytes]."""
    if family_of(scheme) == kernels.INTEGER:
        return flat.reshape(n, -1)
    if scheme.is_float:
        return np.ascontiguousarray(from_panels(flat.view(np.uint16), n)).view(np.uint8)
    return from_panels(flat, n)


def _order_meta(tensor: torch.Tensor, scheme: Scheme) -> np.ndarray:
    """Scales, zero points or multipliers [n, groups] as uint16 words in the kernels' order, flat."""
    if tensor.dtype == torch.uint8:
        flat = tensor.reshape(-1).numpy()
        return np.pad(flat, (0, flat.size % 2)).view(np.uint16)
    words = tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()
    ordered = words.reshape(-1) if family_of(scheme) == kernels.INTEGER else to_panels(words)
    return np.ascontiguousarray(ordered).view(np.uint16)


def _disorder_meta(words: np.ndarray, n: int, scheme: Scheme) -> torch.Tensor:
    """Undo `_order_meta`: [n, groups]."""
    wide = _is_wide(scheme)
    typed = words.copy().view(np.int32 if wide else np.int16)
    rows = typed.reshape(n, -1) if family_of(scheme) == kernels.INTEGER else from_panels(typed, n)
    return torch.from_numpy(np.ascontiguousarray(rows)).view(torch.float32 if wide else torch.bfloat16)
