"""Scales that go into one parameter and out of the next: the function stays, the channels between change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mxmoe.errors import ScaleOutOfRange
from mxmoe.frontend import ExpertViews
from mxmoe.ir import BankShape
from mxmoe.quant import POINTWISE
from mxmoe.transform.edges import Edge, matrices_of

HOMOGENEOUS = ("identity", "relu")
"""Acts without a gate that a positive factor passes through."""


def why_not_down(shape: BankShape) -> str:
    """
    Say why nothing can be folded between up and down; "" where it can.

    h = f(g) u is linear in u, so that a factor on a row of up is one on a channel of h. Clamps on u, a 1 added to it,
    and acts of u itself are in the way.
    """
    if shape.gated:
        return "" if shape.act in POINTWISE else f"the act {shape.act} is not linear in up"
    return "" if shape.act in HOMOGENEOUS else f"without a gate, the act {shape.act} is not linear in up"


def fold_input(edge: Edge, scale: Tensor) -> None:
    """
    Divide the input of a block by `scale` [hidden] and multiply what reads it, in place and in float64.

    The norm's weight takes 1 / scale; router, gates, ups and every other reader take scale on their columns. Nothing is
    written unless all of it can be.

    Raises:
        ScaleOutOfRange: a parameter would leave the range of its element type.
    """
    gain = edge.gain
    assert gain is not None, f"{edge.block.name}: {edge.problem}"
    s = scale.double()
    norm = {f"{gain.path}.weight": (gain.weight, gain.offset)}
    if gain.bias is not None:
        norm[f"{gain.path}.bias"] = (gain.bias, 0.0)
    gains = {name: (tensor.double() + offset) / s.to(tensor.device) - offset for name, (tensor, offset) in norm.items()}
    for name, value in gains.items():
        _check(name, value, norm[name][0].dtype, 1 / s)
    matrices = matrices_of(edge)
    for name, matrix in matrices.items():
        _check(name, matrix.abs().amax(0).double() * s.to(matrix.device), matrix.dtype, s)
    for name, value in gains.items():
        norm[name][0].copy_(value)
    for matrix in matrices.values():
        _scale(matrix, s)


def fold_down(name: str, expert: ExpertViews, scale: Tensor) -> None:
    """
    Divide the input of one expert's down by `scale` [intermediate], in place and in float64.

    Rows of up, and its bias, take 1 / scale; columns of down take scale. `why_not_down` says where this is exact.

    Raises:
        ScaleOutOfRange: a parameter would leave the range of its element type.
    """
    s = scale.double()
    up, down, bias = expert.weights["up"], expert.weights["down"], expert.biases.get("up")
    largest: Mapping[str, Tensor] = {"up": up.abs().amax(1), **({} if bias is None else {"up.bias": bias.abs()})}
    for role, values in largest.items():
        _check(f"{name}.{role}", values.double() / s.to(values.device), up.dtype, 1 / s)
    _check(f"{name}.down", down.abs().amax(0).double() * s.to(down.device), down.dtype, s)
    _scale(up, (1 / s).unsqueeze(1))
    if bias is not None:
        _scale(bias, 1 / s)
    _scale(down, s)


def power_of_two(scale: Tensor) -> Tensor:
    """Round positive scales to the nearest power of two: 0.7 -> 0.5, 0.8 -> 1.0, 3.0 -> 4.0."""
    return torch.exp2(scale.double().log2().round())


def _scale(tensor: Tensor, factor: Tensor) -> None:
    tensor.copy_(tensor.double() * factor.to(tensor.device))


def _check(name: str, values: Tensor, dtype: torch.dtype, scale: Tensor) -> None:
    if not bool((values.abs() <= torch.finfo(dtype).max).all()):
        raise ScaleOutOfRange(name=name, low=float(scale.min()), high=float(scale.max()), dtype=dtype)
