"""Choosing codes: quantizers, their options and the Hessians that they use."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class BadQuantizer(MxmoeError):
    """A string that names no quantizer because it does not parse."""

    message = "{text!r} is not a quantizer: {reason}; write name, or name{{option=value option=value}}"


class BadHessian(MxmoeError):
    """A Hessian that cannot belong to the weight, or with NaN or infinity in it."""

    message = "the hessian of {name} is {found}; it must be {wanted}"


class MissingHessians(MxmoeError):
    """A quantizer that is only itself with Hessians, and no data to collect them from."""

    message = (
        "quantizer {quantizer} needs Hessians, and there is no data to collect them from: pass"
        " inputs=<hidden states or token ids>, or quantize without data, with {free}"
    )


class BrokenHessians(MxmoeError):
    """A file of Hessians that is missing, cut short or damaged."""

    message = "{path} is not a readable file of Hessians ({reason}); write it again with Hessians.save"
