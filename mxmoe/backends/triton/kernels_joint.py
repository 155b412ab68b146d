"""What routed experts and one that sees every token share between and behind their GEMMs: rows, and two sums."""

from __future__ import annotations

import triton
import triton.language as tl

from mxmoe.backends.triton.kernels import combine
from mxmoe.backends.triton.kernels_chain import wait_and_lead
from mxmoe.backends.triton.prepare import prepare_row


@triton.jit
def prepare_both(
    x_ptr: tl.tensor, codes: tl.tensor, scales: tl.tensor, hadamard_ptr: tl.tensor, first: tl.tensor,
    wide_ptr: tl.tensor, wide_codes: tl.tensor, wide_scales: tl.tensor, wide_hadamard_ptr: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, TURN: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_BLOCK: tl.constexpr, WIDE_KINDS: tl.constexpr, WIDE_TURN: tl.constexpr,
    PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Prepare `first` rows of K channels, and behind them rows of WIDE_K, one program each; see `prepare_row`."""
    wait_and_lead(PTX)
    program = tl.program_id(0)
    if program < first:
        prepare_row(program, x_ptr, codes, scales, hadamard_ptr, K, BLOCK, KINDS, TURN, PTX)
    else:
        prepare_row(
            program - first, wide_ptr, wide_codes, wide_scales, wide_hadamard_ptr,
            WIDE_K, WIDE_BLOCK, WIDE_KINDS, WIDE_TURN, PTX,
        )  # fmt: skip


@triton.jit
def combine_both(
    y_ptr: tl.tensor, place_of: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, always_ptr: tl.tensor,
    assignments: tl.tensor, part_stride: tl.tensor,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
) -> None:  # fmt: skip
    """Combine a token's choices into `out_ptr`, and copy what the always-on expert made of it to `always_ptr`."""
    combine(y_ptr, place_of, weight_ptr, out_ptr, part_stride, TOP_K, True, PARTS, H, BLOCK, PTX)
    combine(y_ptr, place_of + assignments, weight_ptr, always_ptr, part_stride, 1, False, PARTS, H, BLOCK, PTX)
