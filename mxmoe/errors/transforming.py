"""Transforming a model without changing what it computes."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class NothingToFold(MxmoeError):
    """No block has a place where scales could go."""

    message = "{what} can fold nothing into this module:\n{reasons}"


class ScaleOutOfRange(MxmoeError):
    """A scaled parameter would leave the range of its element type."""

    message = (
        "scaling {name} by {low:g} to {high:g} leaves the range of {dtype}; take a smaller factor, or convert"
        " the module with .to(torch.bfloat16) or .to(torch.float32) first"
    )


class NotWeightOnly(MxmoeError):
    """A scheme that AWQ's objective does not cover."""

    message = (
        "awq balances weights against 16-bit activations, and {scheme} is no weight-only scheme; use"
        " mxmoe.transform.smooth for schemes that quantize activations too"
    )


class NotAPowerOfTwo(MxmoeError):
    """A factor that a binary float cannot be multiplied with and divided by without rounding."""

    message = "outliers are planted by a power of two above 1, so that nothing is rounded, not by {factor:g}"


class NotPlanted(MxmoeError):
    """Outliers were taken out already."""

    message = "these outliers were removed before; plant_outliers plants new ones"


class NotTraceable(MxmoeError):
    """A module that cannot be run without data of the caller's."""

    message = "{cls} takes more than token ids, so it cannot be traced without data: pass inputs=<as for mxmoe.observe>"


class NoResidualStream(MxmoeError):
    """A module without the parts between which a residual stream runs."""

    message = (
        "{cls} has no {missing} as causal language models of transformers have it; rotate_model takes whole models"
        " whose layers hold input_layernorm, self_attn, post_attention_layernorm and mlp"
    )


class UnknownPart(MxmoeError):
    """A parameter of which a rotation does not know whether it reads the residual stream."""

    message = "{cls} cannot be rotated: what {name} {shape} does to the residual stream is not known"


class RotationChanges(MxmoeError):
    """A residual stream that something reads which was not found."""

    message = (
        "{cls} cannot be rotated: turning its residual stream changes its output by {change:.1%}, so something else"
        " reads or writes it; the model is as it was"
    )


class CannotPrune(MxmoeError):
    """Experts that cannot be taken out of a block."""

    message = "cannot prune {what}: {reason}"
