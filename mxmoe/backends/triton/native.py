"""
Experts on native INT4 units: which of a GEMM's they are, and their launch beside the common one.

GPUs of sm_80 to sm_89 multiply 4-bit integers, and plain Triton cannot: such experts (w4a4, one scale per channel or
per 128) leave the common launch, have their classes last in its schedule, and get a launch for each of their schemes
(`int4.py`). Everywhere else, the interpreter included, the common launch widens their codes to 8 bits: the same sums,
exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.backends.triton.dispatch import Tables
from mxmoe.backends.triton.int4 import Int4Bands, Int4Options, int4_group_gemm
from mxmoe.backends.triton.int4_experts import Int4Experts
from mxmoe.backends.triton.int4_pack import pack_rows, quantize_rows, runs_on_int4
from mxmoe.backends.triton.launch import make_rows, run_gemm
from mxmoe.backends.triton.mode import HOPPER, arch_of, interpreting
from mxmoe.backends.triton.operands import Epilogue, Matrices, Rows
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import Config, Gemm
from mxmoe.ir import Scheme


def has_int4_units(device: torch.device) -> bool:
    """Say whether launches on a device multiply 4-bit integers: on sm_80 to sm_89, or what is told to decide so."""
    return not interpreting() and arch_of(device) < HOPPER


def native_schemes(gemm: Gemm, act: str) -> tuple[Scheme, ...]:
    """
    Name the schemes of a GEMM that INT4 units run, on a device that has them.

    The launch ends with the nonlinearity `act` of a gate and an up, whole sixteens of channels, or with sums ("none").
    """
    fits = gemm.n % 16 == 0 and act != "none" if gemm.gated else act == "none"
    return tuple(scheme for scheme in gemm.distinct if fits and gemm.always is None and runs_on_int4(scheme))


def multiply(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, gather: bool, x: Tensor, turn: int = 0, few_next: bool = False,
) -> None:  # fmt: skip
    """
    Multiply every scheduled row by its expert's weights: the common launch, and one for each scheme on INT4 units.

    Args:
        matrices, config, tables, which, out, epilogue, gather, few_next: as for `launch.run_gemm`.
        rows: `x` in the kinds of rows of the common launch.
        x: [rows, k], which experts on INT4 units quantize for themselves, turned by blocks of `turn` channels.
    """
    if matrices.gemm.row_kinds:
        run_gemm(matrices, config, rows, tables, which, out, epilogue, gather=gather, few_next=few_next)
    for experts in matrices.int4 if len(x) else ():
        _run_int4(experts, x, tables, which, out[0], epilogue, gather=gather, turn=turn)


def _run_int4(
    experts: Int4Experts, x: Tensor, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, gather: bool, turn: int,
) -> None:  # fmt: skip
    """Quantize rows [rows, k], turned first by blocks of `turn` channels if that is not 0, and multiply them."""
    scheme = experts.weights.scheme
    if turn:
        made = make_rows(x, (RowKind.of(scheme),), turn)
        words, scale = pack_rows(made.codes[0]), made.scales[0]
    else:
        words, scale = quantize_rows(x, scheme)
    options = Int4Options(gather, epilogue.act if experts.is_paired else None, epilogue.pair)
    bands = Int4Bands.of(tables, which, experts.group, experts.slot)
    int4_group_gemm(words, scale, experts.weights, bands, out, bias=experts.bias, options=options)
