"""AWQ: input channels that carry large activations are scaled up before their weights are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mxmoe.calib import Inputs, rereadable
from mxmoe.errors import BadOption, NotWeightOnly
from mxmoe.frontend import ExpertViews, LiftedBlock
from mxmoe.ir import BankShape, Scheme
from mxmoe.quant import Quantizer, dequantize, find_quantizer
from mxmoe.transform.edges import Edge
from mxmoe.transform.fold import fold_down, fold_input, power_of_two, why_not_down
from mxmoe.transform.report import Folded, TransformReport
from mxmoe.transform.rows import Thinned, hidden_rows, run_rows
from mxmoe.transform.smooth import INPUTS, finish, prepare

GRID = tuple(step / 20 for step in range(20))
"""Exponents that are tried; 0 scales nothing, so that no objective gets worse."""

_LEAST = 1e-4
_AT_ONCE = 1 << 26
"""Weights that are tried together: bounds the memory of the search to a few of these in float32."""


def awq(
    model: nn.Module,
    inputs: Inputs,
    schemes: Sequence[Scheme | str],
    *,
    roles: Sequence[str] = INPUTS,
    quantizer: str | Quantizer = "rtn",
    rows: int = 256,
    exact: bool = False,
    quiet: bool = False,
) -> TransformReport:
    """
    Scale the input channels of all experts so that weight-only quantization loses the least, in place.

    `s_j = mean|x_j|^alpha`, divided by the root of its largest times its smallest value, with the alpha of 0, 0.05 ...
    0.95 that has the least `||Q(W diag(s)) diag(s)^-1 x - W x||^2` (Lin et al., AWQ, 2024, eq. 4 and 5). What gate and
    up read is read by the router and the shared expert too, so that a block has one such scale, chosen for the sum over
    its experts with as many tokens as they have; it goes into the norm in front of the block. What down reads is each
    expert's own, with an alpha of its own, and goes into its up.

    Memory, beside the module: `rows` rows of every expert of every block, and while scales are tried a few float32
    copies of 2^26 weights, or of one linear.

    Args:
        model: a whole model, or a decoder layer; of a block alone only `down` can be folded.
        inputs: calibration data, as for `mxmoe.observe`.
        schemes: weight-only schemes to choose for, by value or name. Of several, each counts by the share of its own
            error that is left.
        roles: which inputs: gate_up, down.
        quantizer: how weights will be quantized, without Hessians.
        rows: tokens of each expert that errors are measured on; evenly taken from all that it is given.
        exact: round scales to powers of two, as in `smooth`.
        quiet: no progress bar.

    Returns:
        What was folded and the error that is left, what was not and why, and how many routing decisions are the same.

    Raises:
        NotWeightOnly: a scheme that quantizes activations, or nothing.
        NothingToFold, ScaleOutOfRange: as `smooth`.
        BadOption: no scheme, no rows, or a role that is none.
        NoMoeBlock, BadCalibration, ...: what `mxmoe.lift` and `mxmoe.observe` raise.
    """
    parsed = [Scheme.parse(str(scheme)) for scheme in schemes]
    for scheme in parsed:
        if not scheme.is_weight_only:
            raise NotWeightOnly(scheme=scheme)
    if not parsed or rows < 1:
        option = f"rows={rows}" if parsed else "schemes=()"
        raise BadOption(name="awq", option=option, reason="there must be at least one")
    inputs = rereadable(inputs)  # they are run before and after
    lifted, edges, skipped = prepare("awq", model, inputs, roles)
    seen = {edge.block.name: _Seen(edge, rows) for edge in edges}

    def receive(block: LiftedBlock, bank: str, expert: int, given: Tensor) -> None:
        seen[block.name].add(bank, expert, given)

    before = run_rows(lifted, inputs, receive, title="observing", quiet=quiet)
    search = _Search(parsed, find_quantizer(quantizer), exact)
    folded: list[Folded] = []
    bar = tqdm(edges, desc="searching scales", disable=quiet, unit="block")
    for edge in bar:
        bar.set_postfix_str(edge.block.name)
        one = seen[edge.block.name]
        with torch.no_grad():
            # down first: its rows are computed from gate and up as they were observed
            downs = one.fold_downs(search) if "down" in roles else []
            if "gate_up" in roles and edge.gain is not None:
                folded.append(one.fold_input(search))
        folded += downs
    return finish(lifted, inputs, folded, skipped, before, quiet=quiet)


@dataclass(frozen=True)
class _Linear:
    """A weight whose columns are scaled, rows that it multiplies, and how many rows they stand for."""

    name: str
    weight: Tensor
    """[n, k], the module's own storage."""
    rows: Tensor
    """Float32 [m, k]."""
    count: int
    owner: int = 0
    """Which of the scales is its own."""


@dataclass(frozen=True)
class _Choice:
    """The best of the grid."""

    scale: Tensor
    alpha: float
    error: float
    """Relative to no scale."""


@dataclass(frozen=True)
class _Search:
    """Tries the grid, on stacks of linears."""

    schemes: Sequence[Scheme]
    quantizer: Quantizer
    exact: bool

    def best(self, mean: Tensor, linears: Sequence[_Linear]) -> list[_Choice]:
        """Choose the scales [owners, k] for inputs of which `mean` [owners, k] are the mean magnitudes."""
        scales = [self._scale(mean, alpha) for alpha in GRID]
        errors = torch.zeros((len(GRID), len(self.schemes), len(mean)), dtype=torch.float64, device=mean.device)
        for stack in _stacked(linears):
            for i, scale in enumerate(scales):
                for j, scheme in enumerate(self.schemes):
                    errors[i, j].index_add_(0, stack.owner, self._errors(scale[stack.owner].float(), scheme, stack))
        # a scheme without error has nothing to gain
        left = (errors / torch.where(errors[0] > 0, errors[0], 1.0)).mean(1).cpu().numpy()
        first = np.where(left[0] > 0, left[0], 1.0)
        chosen = left.argmin(0).tolist()  # the first on a tie
        return [
            _Choice(scales[i][owner], GRID[i], float(left[i, owner] / first[owner])) for owner, i in enumerate(chosen)
        ]

    def _scale(self, mean: Tensor, alpha: float) -> Tensor:
        """AWQ's scales [owners, k], float64; 1 for channels that were always zero."""
        used = mean > 0
        least = torch.where(used, mean, torch.inf).amin(-1, keepdim=True)
        power = torch.maximum(mean, least).pow(alpha)
        scale = power / (power.amax(-1, keepdim=True) * power.amin(-1, keepdim=True)).sqrt()
        scale = torch.where(used, scale.clamp(min=_LEAST), 1.0)
        return power_of_two(scale) if self.exact else scale

    def _errors(self, scale: Tensor, scheme: Scheme, stack: _Stack) -> Tensor:
        """Squared output error of each linear of a stack under scales [linears, k], float64 [linears]."""
        s = scale.unsqueeze(1)
        scaled = dequantize(self.quantizer(stack.weight * s, scheme, name=stack.name, hessian=None))
        change = stack.rows @ (scaled / s - stack.weight).mT
        return change.square().sum((-2, -1), dtype=torch.float64) * stack.factor


@dataclass(frozen=True)
class _Stack:
    """Linears of one shape, side by side."""

    name: str
    weight: Tensor
    """Float32 [linears, n, k]."""
    rows: Tensor
    """Float32 [linears, m, k], zeros behind the rows of each."""
    factor: Tensor
    """Float64 [linears], what a row stands for."""
    owner: Tensor
    """int64 [linears]."""


def _stacked(linears: Sequence[_Linear]) -> Iterator[_Stack]:
    """Put linears of one shape together, as many at a time as `_AT_ONCE` has room for."""
    shapes: dict[torch.Size, list[_Linear]] = {}
    for one in linears:
        shapes.setdefault(one.weight.shape, []).append(one)
    for shape, alike in shapes.items():
        size = max(1, _AT_ONCE // shape.numel())
        for part in (alike[at : at + size] for at in range(0, len(alike), size)):
            device = part[0].weight.device
            factors = [one.count / len(one.rows) for one in part]
            yield _Stack(
                part[0].name if len(part) == 1 else f"{part[0].name} to {part[-1].name}",
                torch.stack([one.weight.float() for one in part]),
                torch.nn.utils.rnn.pad_sequence([one.rows for one in part], batch_first=True),
                torch.tensor(factors, dtype=torch.float64, device=device),
                torch.tensor([one.owner for one in part], device=device),
            )


@dataclass
class _Seen:
    """Mean magnitudes and some rows of what the experts of one block are given."""

    edge: Edge
    limit: int
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])
    """(bank, expert) -> sum of |x|, float64 [hidden]."""
    down_sums: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])
    """(bank, expert) -> the same of what down is given, [intermediate]."""
    rows: dict[tuple[str, int], Thinned] = field(default_factory=dict[tuple[str, int], Thinned])

    def add(self, bank: str, expert: int, given: Tensor) -> None:
        """Take in the rows of one expert."""
        key = bank, expert
        self.rows.setdefault(key, Thinned(self.limit)).add(given)
        inner = hidden_rows(self._shape(bank), self._views(key), given)
        for into, rows in ((self.sums, given), (self.down_sums, inner)):
            found = rows.abs().sum(0, dtype=torch.float64)
            into[key] = into[key] + found if key in into else found

    def fold_input(self, search: _Search) -> Folded:
        """Fold the one scale of what all experts read."""
        linears = [
            _Linear(f"{self._name(key)}.{role}", self._views(key).weights[role], rows, thinned.count)
            for key, thinned in self.rows.items()
            if (rows := thinned.rows()) is not None
            for role in ("gate", "up")
            if role in self._views(key).weights
        ]
        count = sum(thinned.count for thinned in self.rows.values())
        mean = torch.stack(list(self.sums.values())).sum(0, keepdim=True) / count
        best = search.best(mean, linears)[0]
        fold_input(self.edge, best.scale)
        experts = sum(map(len, self.edge.experts.values()))
        return _folded(self.edge.block.name, "all", "gate_up", experts, [best])

    def fold_downs(self, search: _Search) -> list[Folded]:
        """Fold the scales of what each expert's down reads."""
        folded: list[Folded] = []
        for bank in self.edge.experts:
            if why_not_down(self._shape(bank)):
                continue
            keys = [key for key in sorted(self.rows) if key[0] == bank]
            linears: list[_Linear] = []
            for owner, key in enumerate(keys):
                views, given = self._views(key), self.rows[key].rows()
                assert given is not None, f"{key} was given rows"
                inner = hidden_rows(self._shape(bank), views, given)
                linears.append(_Linear(f"{self._name(key)}.down", views.weights["down"], inner, len(inner), owner))
            if not keys:
                continue
            choices = search.best(torch.stack([self.down_sums[k] / self.rows[k].count for k in keys]), linears)
            for key, best in zip(keys, choices, strict=True):
                fold_down(self._name(key), self._views(key), best.scale)
            folded.append(_folded(self.edge.block.name, bank, "down", len(choices), choices))
        return folded

    def _views(self, key: tuple[str, int]) -> ExpertViews:
        return self.edge.experts[key[0]][key[1]]

    def _shape(self, bank: str) -> BankShape:
        return self.edge.block.banks[bank].shape

    def _name(self, key: tuple[str, int]) -> str:
        return f"{self.edge.block.name}.{key[0]}[{key[1]}]"


def _folded(block: str, bank: str, role: str, experts: int, choices: Sequence[_Choice]) -> Folded:
    mean: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731  # used twice
    low = min(float(one.scale.min()) for one in choices)
    high = max(float(one.scale.max()) for one in choices)
    alpha, error = mean([one.alpha for one in choices]), mean([one.error for one in choices])
    return Folded(block, bank, role, experts, low, high, alpha, error)
