"""The table of quantizers, and what a quantizer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mxmoe.errors import UnknownName
from mxmoe.ir import Scheme
from mxmoe.quant.options import WithOptions, split_options, with_options
from mxmoe.quant.quantized import Quantized
from mxmoe.registry import Registry, near_names


class Quantizer(Protocol):
    """
    A function that chooses the codes of a weight: `quantizer(weight, scheme, name="experts.3.up") -> Quantized`.

    The result has the given scheme and the weight's shape; float schemes are a cast for every quantizer. Refuse what
    `mxmoe.quant.checked_weight` refuses. One with options is an instance of a `WithOptions` dataclass.
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


QUANTIZERS = Registry(
    "quantizer",
    "mxmoe.quantizers",
    {
        "gptq": "mxmoe.quant.gptq:gptq",
        "rtn": "mxmoe.quant.rtn:quantize",
        "rtn_mse": "mxmoe.quant.clip:rtn_mse",
        "hqq": "mxmoe.quant.hqq:hqq",
    },
)
"""Name -> a function, or the instance with default options of a dataclass: a quantizer in both cases."""


def find_quantizer(quantizer: str | Quantizer) -> Quantizer:
    """
    Return the quantizer of a name, of `name{option=value option=value}`, or the one that is given.

    find_quantizer("gptq{damping=0.05 act-order=false}") is Gptq(damping=0.05, act_order=False), whose `str` is the
    text again.

    Raises:
        BadQuantizer: the text does not parse.
        UnknownName: no quantizer of that name.
        BadOption: an option that it does not have, or a value that the option cannot take.
    """
    if isinstance(quantizer, str):
        name, options = split_options(quantizer)
        return with_options(QUANTIZERS[name], name, options)
    if not callable(quantizer):
        raise UnknownName(kind="quantizer", name=quantizer, near=near_names(str(quantizer), QUANTIZERS))
    return quantizer


def quantize_each(
    quantizer: Quantizer,
    weight: Tensor,
    schemes: Sequence[Scheme],
    *,
    name: str = "weight",
    hessian: Tensor | None = None,
) -> list[Quantized]:
    """
    Quantize one weight to several schemes; as one call for each, and faster with a quantizer that shares work.

    Such a quantizer has a method `each` with these arguments.
    """
    each = getattr(quantizer, "each", None)
    if each is not None:
        return each(weight, schemes, name=name, hessian=hessian)
    return [quantizer(weight, scheme, name=name, hessian=hessian) for scheme in schemes]


def spell_quantizer(quantizer: str | Quantizer) -> str:
    """Write a quantizer as `find_quantizer` reads it; a function that is not registered has its own name."""
    if isinstance(quantizer, str | WithOptions):
        return str(find_quantizer(quantizer)) if "{" in str(quantizer) else str(quantizer)
    return getattr(quantizer, "__name__", type(quantizer).__name__)


def needs_hessian(quantizer: str | Quantizer) -> bool:
    """Say whether a quantizer declares that it is only itself with Hessians; raises what `find_quantizer` raises."""
    return bool(getattr(find_quantizer(quantizer), "needs_hessian", False))
