"""How far two backends may differ in a scheme: stated here once, with the reason, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

from mxmoe.ir import Scheme

FLOAT32_SUMS = 2.0**-16
BF16_ROUNDING = 2.0**-7
FP16_ROUNDING = 2.0**-10
E4M3_ACCUMULATORS = 2.0**-8


def tolerance(scheme: Scheme) -> float:
    """
    Relative Frobenius error `|y - y'| / |y|` allowed between two backends' outputs of one linear on equal inputs.

    - Integers (w8a8, w4a4, ...): 2^-16. The sums are exact; what is left is a handful of float32 roundings (2^-24 each)
      per group, with room for thousands of groups or for an output that cancels.
    - bf16 activations: 2^-7. A tensor core wants the decoded weight in bf16, which the definition does not round: one
      relative rounding of at most 2^-8, and as much again for outputs that cancel.
    - fp16 activations: 2^-10, likewise with roundings of 2^-11.
    - e4m3: 2^-8. Operands and products are exact, but the fp8 units of sm_89 and sm_90 keep about 14 bits of a sum.
    """
    if scheme.act_format == "int":
        return FLOAT32_SUMS
    return {"bf16": BF16_ROUNDING, "fp16": FP16_ROUNDING, "e4m3": E4M3_ACCUMULATORS}[scheme.act_format]


def block_tolerance(schemes: Iterable[Scheme]) -> float:
    """
    Relative Frobenius error allowed between two backends' outputs of a whole expert or block that uses these schemes.

    Two linears in a row, so twice the largest `tolerance`; and where activations are quantized, the inputs of `down`
    differ in their last float32 bits, so that a value near a rounding border may take the neighbouring code: one such
    flip moves a token by at most one step of 1 / (largest code) of its norm, of which we allow half.
    """
    schemes = tuple(schemes)
    linear = max((tolerance(s) for s in schemes), default=FLOAT32_SUMS)
    flip = max((_flip(s) for s in schemes), default=0.0)
    return 2 * linear + flip


def _flip(scheme: Scheme) -> float:
    """Half the relative change of a token when one of its activation codes moves by one."""
    if scheme.act_format == "e4m3":
        return 2.0**-5  # neighbours differ by up to an eighth of a value, which is a fraction of its token
    return 0.0 if scheme.act_bits == 16 else 2.0**-scheme.act_bits
