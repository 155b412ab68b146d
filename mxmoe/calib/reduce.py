"""From one expert's rows to the squared error that quantizing each of its linears causes, all schemes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mxmoe.ir import BankShape, Scheme
from mxmoe.quant import Quantizer, apply_act, dequantize, fake_quantize_activation

Post = Callable[[Tensor], Tensor]
"""Applied to an expert's output rows before their router weight, e.g. a norm."""


@dataclass
class ExpertError:
    """What one expert's rows added up to."""

    squared_output: float = 0.0
    """Sum over tokens of ||w f(x)||^2."""
    squared_error: dict[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    """Role -> [scheme], sum over tokens of ||w (f_q(x) - f(x))||^2 with only that linear quantized."""
    macs: int = 0
    """Multiply-adds of all products that were executed."""


@dataclass(frozen=True)
class Expert:
    """
    The full-precision weights of one expert, in float32, and what is computed with them.

    f(x) = down(act(gate(x), up(x))), each linear with its bias if there is one.
    """

    shape: BankShape
    weights: Mapping[str, Tensor]
    """Role -> [n, k]."""
    biases: Mapping[str, Tensor]
    """Role -> [n]."""
    label: str
    """`block.bank[expert]`, for messages of the quantizer."""
    post: Post | None = None

    def act(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Combine gate and up rows [rows, intermediate]."""
        return apply_act(self.shape.act, gate, up, self.shape.act_params)


class Reduction:
    """
    Sums the errors of one expert over chunks of its rows.

    Sensitivity is that of MxMoE (Duanmu et al., ICML 2025, section 3.1): the change of the block's output when one
    linear alone is quantized, its weight and its input alike, squared. Of such a pass only what changes is computed:

        gate  gate and down of the expert's own rows; up is reused
        up    up and down of the expert's own rows; gate is reused
        down  down alone, from the hidden rows that are there

    5 products per scheme and 3 for the reference, instead of every expert's 3 for every (expert, role, scheme).
    """

    def __init__(self, expert: Expert, schemes: Sequence[Scheme], quantizer: Quantizer) -> None:
        """Reduce over `schemes`, with weights quantized by `quantizer`."""
        self.expert = expert
        self.schemes = tuple(schemes)
        self.quantizer = quantizer
        self.result = ExpertError(squared_error={role: np.zeros(len(self.schemes)) for role in expert.weights})

    def add(self, rows: Tensor, weight: Tensor) -> None:
        """
        Add rows [rows, hidden] (any float dtype) with their router weights [rows].

        The cost is (3 + 5 schemes) products of rows x hidden x intermediate; one product less and two without a gate.
        """
        x, squared_weight = rows.float(), weight.double().square()
        expert, result = self.expert, self.result
        gate = self._linear("gate", x) if expert.shape.gated else None
        up = self._linear("up", x)
        hidden = expert.act(gate, up)
        output = self._linear("down", hidden)
        reference = self._post(output)
        result.squared_output += _weighted(reference, squared_weight)
        inputs = {"up": _Casts(x), "down": _Casts(hidden)}
        inputs["gate"] = inputs["up"]
        for column, scheme in enumerate(self.schemes):
            for role in expert.weights:
                quantized = self._linear(role, inputs[role][scheme], scheme)
                if role == "down":
                    change = quantized.sub_(output)
                else:
                    pair = (quantized, up) if role == "gate" else (gate, quantized)
                    # the difference goes through down, not both sides: small errors keep their digits
                    change = self._product(expert.act(*pair).sub_(hidden), expert.weights["down"])
                if expert.post is not None:
                    change = self._post(output + change) - reference
                result.squared_error[role][column] += _weighted(change, squared_weight)

    def _post(self, output: Tensor) -> Tensor:
        return output if self.expert.post is None else self.expert.post(output).float()

    def _linear(self, role: str, x: Tensor, scheme: Scheme | None = None) -> Tensor:
        weight = self.expert.weights[role]
        if scheme is not None:
            weight = dequantize(self.quantizer(weight, scheme, name=f"{self.expert.label}.{role}", hessian=None))
        product = self._product(x, weight)
        bias = self.expert.biases.get(role)
        return product if bias is None else product.add_(bias)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        self.result.macs += len(x) * weight.numel()
        return x @ weight.mT


class _Casts:
    """Rows as the linears of some schemes read them; one cast for all schemes that read alike."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.cast: dict[tuple[object, ...], Tensor] = {}

    def __getitem__(self, scheme: Scheme) -> Tensor:
        key = (scheme.act_bits, scheme.act_format, scheme.act_group_size)
        if key not in self.cast:
            self.cast[key] = fake_quantize_activation(self.x, scheme)
        return self.cast[key]


def _weighted(rows: Tensor, squared_weight: Tensor) -> float:
    """Sum over rows of w^2 ||row||^2; the outer sum in float64."""
    return float(torch.dot(rows.square().sum(-1).double(), squared_weight))
