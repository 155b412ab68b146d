"""From one expert's rows to the squared error that quantizing each of its linears causes, all schemes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mxmoe.ir import BankShape, Scheme
from mxmoe.quant import Quantizer, apply_act, dequantize, fake_quantize_activation, rotate

Post = Callable[[Tensor], Tensor]
"""Applied to an expert's output rows before their router weight, e.g. a norm."""


Errors = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ExpertError:
    """What one expert's rows added up to."""

    squared_output: float
    """Sum over tokens of ||w f(x)||^2."""
    output_norm: float
    """Sum over tokens of ||w f(x)||."""
    squared_error: Errors
    """Role -> [scheme], sum over tokens of ||w (f_q(x) - f(x))||^2 with only that linear quantized."""
    fisher_error: Errors
    """Role -> [scheme], the same with every channel weighed by the squared gradient there; zeros without gradients."""
    macs: int
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
    rotation: int | None = None
    """Channels that are rotated together on their way to down, before they are cast; None: they are not."""

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

    5 products per scheme and 3 for the reference, instead of every expert's 3 for every (expert, role, scheme). Where
    rows come with the gradient of a loss, the same changes are also summed as that loss sees them, to second order
    (GEMQ, arXiv 2605.23078, and ModelOpt's auto_quantize): no product is added.

    Everything stays on the rows' device until `result` is asked for.
    """

    def __init__(
        self, expert: Expert, schemes: Sequence[Scheme], quantizer: Quantizer, *, keep_bytes: float = 0
    ) -> None:
        """Reduce over `schemes`, with weights quantized by `quantizer`; of these `keep_bytes` outlive a chunk."""
        self.expert = expert
        self.schemes = tuple(schemes)
        self.quantizer = quantizer
        self.roles = tuple(expert.weights)
        self.macs = 0
        down = expert.weights["down"]
        self._sources = {**expert.weights, "down": self._turned(down)}
        device = next(iter(expert.weights.values())).device
        shape = (len(self.roles), len(self.schemes))
        self._output = torch.zeros(2, dtype=torch.float64, device=device)
        self._squared = torch.zeros(shape, dtype=torch.float64, device=device)
        self._fisher = torch.zeros(shape, dtype=torch.float64, device=device)
        size = sum(weight.numel() * 4 for weight in expert.weights.values()) * len(self.schemes)
        self._kept: dict[tuple[str, Scheme], Tensor] | None = {} if size <= keep_bytes else None

    @property
    def result(self) -> ExpertError:
        """The sums so far."""
        squared_output, output_norm = self._output.tolist()
        squared, fisher = (
            dict(zip(self.roles, sums.cpu().numpy().copy(), strict=True)) for sums in (self._squared, self._fisher)
        )
        return ExpertError(squared_output, output_norm, squared, fisher, self.macs)

    def add(self, rows: Tensor, weight: Tensor, gradient: Tensor | None = None) -> None:
        """
        Add rows and what becomes of them.

        The cost is (3 + 5 schemes) products of rows x hidden x intermediate; one product less and two without a gate.
        Memory: about twelve float32 tensors of [rows, wider of hidden and intermediate], and one cast of the rows for
        each way in which schemes read activations.

        Args:
            rows: [rows, hidden], any float dtype.
            weight: [rows], what the expert's output is multiplied with.
            gradient: [rows, hidden], derivative of the loss by the expert's output f(x); None: there is no loss.
        """
        x, squared_weight = rows.float(), weight.double().square()
        slope = None if gradient is None else gradient.float()
        expert = self.expert
        gate = self._linear("gate", x) if expert.shape.gated else None
        up = self._linear("up", x)
        hidden = expert.act(gate, up)
        output = self._linear("down", hidden)
        reference = self._post(output)
        squares = reference.square().sum(-1).double()
        self._output[0] += squares @ squared_weight
        self._output[1] += squares.sqrt() @ squared_weight.sqrt()
        inputs = {"up": _Casts(x), "down": _Casts(self._turned(hidden))}
        inputs["gate"] = inputs["up"]
        for column, scheme in enumerate(self.schemes):
            for row, role in enumerate(self.roles):
                quantized = self._linear(role, inputs[role][scheme], scheme)
                if role == "down":
                    change = quantized.sub_(output)
                else:
                    pair = (quantized, up) if role == "gate" else (gate, quantized)
                    # the difference goes through down, not both sides: small errors keep their digits
                    change = self._product(expert.act(*pair).sub_(hidden), expert.weights["down"])
                if expert.post is not None:
                    change = self._post(output + change) - reference
                self._squared[row, column] += change.square().sum(-1).double() @ squared_weight
                if slope is not None:
                    self._fisher[row, column] += change.mul_(slope).square_().sum(-1).double().sum()

    def _turned(self, rows: Tensor) -> Tensor:
        """Rotate what down reads, and the weights it reads it with: their product is as it was."""
        return rows if self.expert.rotation is None else rotate(rows, self.expert.rotation)

    def _post(self, output: Tensor) -> Tensor:
        return output if self.expert.post is None else self.expert.post(output).float()

    def _linear(self, role: str, x: Tensor, scheme: Scheme | None = None) -> Tensor:
        weight = self.expert.weights[role] if scheme is None else self._quantized(role, scheme)
        product = self._product(x, weight)
        bias = self.expert.biases.get(role)
        return product if bias is None else product.add_(bias)

    def _quantized(self, role: str, scheme: Scheme) -> Tensor:
        kept = self._kept
        if kept is not None and (role, scheme) in kept:
            return kept[role, scheme]
        label = f"{self.expert.label}.{role}"
        weight = dequantize(self.quantizer(self._sources[role], scheme, name=label, hessian=None))
        if kept is not None:
            kept[role, scheme] = weight
        return weight

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        self.macs += len(x) * weight.numel()
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
