"""What a launch of the group GEMM is compiled from, so that it can be compiled where it cannot be launched."""

from __future__ import annotations

from collections.abc import Sequence

from mxmoe.backends.triton import kernels
from mxmoe.backends.triton.ahead import Request
from mxmoe.backends.triton.dispatch import power_of_two_from
from mxmoe.backends.triton.int4 import Int4Options, launch_constants, launch_warps
from mxmoe.backends.triton.kernels_int4 import int4_kernel
from mxmoe.backends.triton.mode import ptx_for
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of
from mxmoe.ir import Scheme

_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "int": "*i8", "e4m3": "*fp8e4nv"}
"""Format of rows -> type of the pointer to them."""


def gemm_request(
    gemm: Gemm,
    config: Config,
    *,
    arch: int,
    top_k: int,
    gather: bool,
    act: str = "none",
    params: tuple[float, float] = (0.0, 0.0),
    has_bias: bool = False,
    out: str = "bf16",
    code_path: int | None = None,
) -> Request:
    """
    Give the request for the kernel that `launch.run_gemm` would launch for a GEMM with these tiles.

    Numbers that depend on the tokens are taken as they come, so that one binary serves every call.

    Args:
        gemm: sizes and the scheme of every expert.
        config: tiles and warps.
        arch: compute capability times ten.
        top_k: experts of a token.
        gather: rows are read by token, as for gate and up.
        act: the nonlinearity at the end, `none` for sums.
        params: its parameters.
        has_bias: sums have a bias added.
        out: type of the result, `bf16`, `fp16` or `fp32`.
        code_path: see `Request`.
    """
    _, classes = classes_of(gemm, config)
    kinds = gemm.row_kinds
    pointers = {"arena": "*u8", "base_ptr": "*i64", "bias_ptr": "*fp32", "y_ptr": f"*{out}"}
    signature = {
        "xs": tuple(_TYPES[kind.format] for kind in kinds),
        "x_scales": ("*fp32",) * len(kinds),
        **pointers,
        **dict.fromkeys(("row_of", "ends_ptr", "band_ptr"), "*i32"),
        **dict.fromkeys(("bands", "assignments", "tokens", "part_stride"), "i32"),
    }
    constants = {
        "CLASSES": classes,
        "CP": power_of_two_from(1 + len(classes)),
        "GROUPING": config.grouping,
        "LANES": len(gemm.schemes),
        "TOP_K": top_k,
        "GATHER": gather,
        "GATED": gemm.gated,
        "HAS_BIAS": has_bias,
        "ACT": act,
        "P": params[0],
        "Q": params[1],
        "BIAS_N": gemm.n,
        "LD": gemm.n,
        "PTX": ptx_for(arch),
        "WALKS": config.per_sm > 0,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernels.group_gemm.arg_names}
    return Request(
        kernels.group_gemm, ordered, constants, arch, config.warps, registers=config.registers, code_path=code_path
    )


def int4_request(
    scheme: Scheme,
    heights: Sequence[int],
    *,
    arch: int,
    gather: bool,
    is_gated: bool,
    has_bias: bool = False,
    out: str = "bf16",
    code_path: int | None = None,
) -> Request:
    """
    Give the request for the kernel that `int4.int4_group_gemm` would launch for experts of one scheme.

    Args:
        scheme: one that `runs_on_int4`.
        heights: of the classes of these experts, ascending.
        arch: compute capability times ten.
        gather: rows are read by token.
        is_gated: gate and up are packed as a pair, and SwiGLU is fused.
        has_bias: sums have a bias added.
        out: type of the result, `bf16`, `fp16` or `fp32`.
        code_path: see `Request`.
    """
    classes = tuple((at, height) for at, height in enumerate(sorted(heights, reverse=True)))
    is_grouped = scheme.group_size is not None
    pointers = {
        "x_ptr": "*i32",
        "x_scale_ptr": "*fp32",
        "w_ptr": "*i32",
        "w_scale_ptr": "*bf16" if is_grouped else "*fp32",
        "bias_ptr": "*fp32",
        "out_ptr": f"*{out}",
    }
    tables = ("row_of", "slot", "class_band", "band_expert", "band_row", "band_rows")
    constants = launch_constants(is_grouped, classes, Int4Options(gather, "silu" if is_gated else None), has_bias)
    signature = {
        **pointers,
        **{f"{name}_ptr": "*i32" for name in tables},
        **dict.fromkeys(("n", "steps", "top_k", "tokens"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = (*(name for name, kind in signature.items() if kind.startswith("*")), "n")
    warps = launch_warps(classes)
    return Request(int4_kernel, signature, constants, arch, warps, divisible=aligned, code_path=code_path)
