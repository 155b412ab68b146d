"""What a launch of the group GEMM is compiled from, so that it can be compiled where it cannot be launched."""

from __future__ import annotations

from mxmoe.backends.triton import kernels
from mxmoe.backends.triton.ahead import Request
from mxmoe.backends.triton.dispatch import power_of_two_from
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of

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
        "PTX": True,
        "WALKS": config.per_sm > 0,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernels.group_gemm.arg_names}
    return Request(
        kernels.group_gemm, ordered, constants, arch, config.warps, registers=config.registers, code_path=code_path
    )
