"""What a launch of the group GEMM is compiled from, so that it can be compiled where it cannot be launched."""

from __future__ import annotations

from collections.abc import Sequence

from mxmoe.backends.triton import kernels
from mxmoe.backends.triton.ahead import Request
from mxmoe.backends.triton.choose_ada import config_for_arch
from mxmoe.backends.triton.dispatch import power_of_two_from
from mxmoe.backends.triton.executable import Bank
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


def bank_requests(
    bank: Bank, *, arch: int, tokens: Sequence[int], top_k: int, dtype: str = "bf16", code_path: int | None = None
) -> dict[str, Request]:
    """
    Name and request the group GEMMs that a compiled bank launches for calls of some numbers of tokens.

    Tiles are those that a machine of this capability would choose. A call of 512 tokens has `gate_up512` and
    `down512`; `gate512` and `up512` where the nonlinearity is not fused. `compile_all` takes the values.

    Args:
        bank: from `TritonExecutable.banks`; where its weights lie does not matter.
        arch: compute capability times ten.
        tokens: of each call.
        top_k: experts of a token.
        dtype: of the hidden states, `bf16`, `fp16` or `fp32`.
        code_path: see `Request`.
    """
    found: dict[str, Request] = {}
    fused = bank.is_fused
    is_joined = len(bank.entries) == 1 and bank.entries[0].gemm.gated
    roles = ("gate_up",) if is_joined else ("gate", "up")[-len(bank.entries) :]
    filled = (*bank.act_params.values(), 0.0, 0.0)
    for count in tokens:
        for role, one in zip((*roles, "down"), bank.gemms, strict=True):
            config = config_for_arch(one.gemm, count, top_k, arch)
            parts = max(config.shape(scheme).parts for scheme in one.gemm.distinct)
            is_down = role == "down"
            found[f"{role}{count}"] = gemm_request(
                one.gemm,
                config,
                arch=arch,
                top_k=top_k,
                gather=not is_down,
                act=bank.act if fused and not is_down else "none",
                params=(filled[0], filled[1]) if fused and not is_down else (0.0, 0.0),
                has_bias=one.bias is not None,
                out="fp32" if parts > 1 or not (fused or is_down) else dtype,
                code_path=code_path,
            )
    return found
