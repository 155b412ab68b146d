"""The table of quantizers, and what a quantizer is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mxmoe.ir import Scheme
from mxmoe.quant.quantized import Quantized
from mxmoe.registry import Registry


class Quantizer(Protocol):
    """
    A function that chooses the codes of a weight: `quantizer(weight, scheme, name="experts.3.up") -> Quantized`.

    The result has the given scheme and the weight's shape; float schemes are a cast for every quantizer. Refuse what
    `mxmoe.quant.checked_weight` refuses.
    """

    def __call__(
        self, weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None
    ) -> Quantized:
        """
        Quantize `weight` [..., n, k].

        Args:
            weight: any float dtype.
            scheme: what to quantize to.
            name: what to call the weight in errors.
            hessian: float32 or float64 [..., k, k], sum of x x^T over the tokens that reach this weight, or None
                without calibration; a quantizer that cannot do without raises.
        """
        ...


QUANTIZERS = Registry("quantizer", "mxmoe.quantizers", {"rtn": "mxmoe.quant.rtn:quantize"})
