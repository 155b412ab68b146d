"""Outlier channels for models that have none: planted without changing the function, and taken out without a trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mxmoe.calib import Inputs
from mxmoe.errors import BadOption, NotAPowerOfTwo, NotPlanted, ScaleOutOfRange
from mxmoe.frontend import ExpertViews
from mxmoe.transform.edges import Edge, matrices_of
from mxmoe.transform.fold import fold_down, fold_input, why_not_down
from mxmoe.transform.report import Unfolded
from mxmoe.transform.smooth import INPUTS, prepare


@dataclass
class Planted:
    """Outliers in a module, and the way back."""

    factor: float
    channels: Mapping[str, tuple[int, ...]]
    """`<block>` -> channels of what all its experts read; `<block>.<bank>[<expert>]` -> of what its down reads."""
    skipped: tuple[Unfolded, ...]
    """Inputs without outliers, with the reason."""
    _undo: list[tuple[Edge | ExpertViews, str, Tensor, dict[str, Tensor]]] = field(
        default_factory=list[tuple[Edge | ExpertViews, str, Tensor, dict[str, Tensor]]], repr=False
    )

    def remove(self) -> None:
        """
        Take the outliers out: every parameter is bit for bit what it was.

        Raises:
            NotPlanted: that was done before.
        """
        if not self._undo:
            raise NotPlanted()
        while self._undo:
            place, name, scale, gains = self._undo.pop()
            if isinstance(place, Edge):
                fold_input(place, 1 / scale)
                for key, kept in gains.items():
                    _gains(place)[key].copy_(kept)
            else:
                fold_down(name, place, 1 / scale)


def plant_outliers(
    model: nn.Module,
    *,
    channels: int | Sequence[int] = 4,
    factor: float = 32.0,
    seed: int = 0,
    roles: Sequence[str] = INPUTS,
    inputs: Inputs | None = None,
) -> Planted:
    """
    Give what the experts read a few channels that are `factor` times as large, in place; the function stays the same.

    Small models trained for a study do not grow the outlier channels that make large ones hard to quantize. Here the
    norm in front of a block gets `factor` in some channels and all that reads them 1 / factor; so do rows of each
    expert's up and columns of its down. A power of two rounds nothing, so that the model computes bit for bit what it
    did, except behind norms that store their weight as a difference to one.

    Args:
        model: a whole model, or a decoder layer; of a block alone only `down` gets outliers.
        channels: how many, drawn for every input anew, or which ones for all of them.
        factor: a power of two above 1.
        seed: of the draw.
        roles: which inputs: gate_up, down.
        inputs: what to trace the module with, as for `mxmoe.observe`, if it does not take token ids.

    Returns:
        Where they are; its `remove` takes them out again.

    Raises:
        NotAPowerOfTwo: another factor.
        BadOption: channels that are not there, or a role that is none.
        ScaleOutOfRange: a weight would overflow its element type, or lose digits as it becomes denormal.
        NothingToFold: no input of any block can be scaled.
        NotTraceable: no inputs, and the module does not take token ids.
    """
    if not (factor > 1 and math.isfinite(factor) and math.frexp(factor)[0] == 0.5):
        raise NotAPowerOfTwo(factor=factor)
    _, edges, skipped = prepare("plant_outliers", model, inputs, roles)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, tuple[int, ...]] = {}
    places: list[tuple[Edge | ExpertViews, str, Tensor, dict[str, Tensor]]] = []
    for edge in edges:
        name = edge.block.name
        if "gate_up" in roles and edge.gain is not None:
            chosen[name] = _draw(channels, edge.block.shape.hidden, generator)
            kept = {key: gain.clone() for key, gain in _gains(edge).items()}
            places.append((edge, name, _scale(chosen[name], edge.block.shape.hidden, factor), kept))
        for bank, experts in edge.experts.items() if "down" in roles else ():
            shape = edge.block.banks[bank].shape
            for index, expert in enumerate(experts if not why_not_down(shape) else ()):
                where = f"{name}.{bank}[{index}]"
                chosen[where] = _draw(channels, shape.intermediate, generator)
                places.append((expert, where, _scale(chosen[where], shape.intermediate, factor), {}))
    for place, name, scale, _ in places:
        _check(place, name, scale)
    for place, name, scale, _ in places:
        if isinstance(place, Edge):
            fold_input(place, scale)
        else:
            fold_down(name, place, scale)
    return Planted(factor, chosen, tuple(skipped), places)


def _draw(channels: int | Sequence[int], width: int, generator: torch.Generator) -> tuple[int, ...]:
    if isinstance(channels, int):
        if not 1 <= channels <= width:
            reason = f"an input of {width} channels takes 1 to {width}"
            raise BadOption(name="plant_outliers", option=f"channels={channels}", reason=reason)
        return tuple(sorted(torch.randperm(width, generator=generator)[:channels].tolist()))
    given = tuple(sorted(set(channels)))
    if not given or given[0] < 0 or given[-1] >= width:
        reason = f"an input of {width} channels has those from 0 to {width - 1}"
        raise BadOption(name="plant_outliers", option=f"channels={list(channels)}", reason=reason)
    return given


def _scale(channels: Sequence[int], width: int, factor: float) -> Tensor:
    scale = torch.ones(width, dtype=torch.float64)
    scale[list(channels)] = 1 / factor
    return scale


def _gains(edge: Edge) -> dict[str, Tensor]:
    assert edge.gain is not None, f"{edge.block.name}: {edge.problem}"
    bias = edge.gain.bias
    return {"weight": edge.gain.weight, **({} if bias is None else {"bias": bias})}


def _check(place: Edge | ExpertViews, name: str, scale: Tensor) -> None:
    """Raise unless scaling and scaling back gives every weight again."""
    if isinstance(place, Edge):
        tensors = {key: (matrix, scale) for key, matrix in matrices_of(place).items()}
        if place.gain is not None and place.gain.offset == 0:
            tensors |= {f"{place.gain.path}.{key}": (gain, 1 / scale) for key, gain in _gains(place).items()}
    else:
        rows = {role: (place.weights[role], factor) for role, factor in (("down", scale), ("up", (1 / scale)[:, None]))}
        bias = {"up.bias": (place.biases["up"], 1 / scale)} if "up" in place.biases else {}
        tensors = {f"{name}.{key}": value for key, value in (rows | bias).items()}
    for key, (tensor, factors) in tensors.items():
        by = factors.to(tensor.device)
        there = (tensor.double() * by).to(tensor.dtype)
        if not torch.equal((there.double() / by).to(tensor.dtype), tensor):
            raise ScaleOutOfRange(name=key, low=float(factors.min()), high=float(factors.max()), dtype=tensor.dtype)
