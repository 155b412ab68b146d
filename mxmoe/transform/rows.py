"""What the experts of a module are given while it runs: rows by expert, and who was chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mxmoe.calib import Feed, Inputs, evaluating
from mxmoe.frontend import ExpertViews, Lifted, LiftedBank, LiftedBlock
from mxmoe.ir import BankShape
from mxmoe.quant import apply_act

Receive = Callable[[LiftedBlock, str, int, Tensor], None]
"""(block, bank, expert, rows [n, hidden] in the module's dtype): called for every expert that was given something."""

Routing = dict[str, list[Tensor]]
"""Block -> bool [tokens, experts] of each call: who was chosen. Absent for lists of MLPs, which are given no index."""


def run_rows(lifted: Lifted, inputs: Inputs, receive: Receive, *, title: str, quiet: bool = False) -> Routing:
    """
    Run data through a lifted module and hand over what each expert of each bank is given.

    Raises:
        BadCalibration, EmptyCalibration, NonFiniteCalibration: inputs that the module does not take.
    """
    feed, routing = Feed(lifted), Routing()
    batches, count = feed.batches(inputs)
    with torch.no_grad(), evaluating(lifted.root), _hooked(lifted, receive, routing):
        for batch in tqdm(batches, desc=title, total=count, disable=quiet, unit="batch"):
            if feed.experts is None:
                feed.run(batch)
                continue
            routed = feed.routed(batch)
            block = lifted.blocks[0]
            name = next(name for name, bank in block.banks.items() if bank.module is lifted.root)
            _by_expert(block, name, routed.hidden, routed.index, receive, routing)
    return routing


def agreement(before: Routing, after: Routing) -> dict[str, float]:
    """Block -> share of the chosen experts that are chosen again, over the tokens of two runs on the same data."""
    found: dict[str, float] = {}
    for block, calls in before.items():
        one, two = torch.cat(calls), torch.cat(after[block])
        found[block] = float((one & two).sum() / one.sum().clamp(min=1))
    return found


def hidden_rows(shape: BankShape, expert: ExpertViews, rows: Tensor) -> Tensor:
    """Input of down [n, intermediate] for rows [n, hidden] of one expert, in float32."""
    x = rows.float()

    def linear(role: str) -> Tensor:
        bias = expert.biases.get(role)
        return torch.nn.functional.linear(x, expert.weights[role].float(), None if bias is None else bias.float())

    return apply_act(shape.act, linear("gate") if shape.gated else None, linear("up"), shape.act_params)


@dataclass
class Thinned:
    """At most `limit` rows out of as many as come, evenly spread over them, the same ones in every run."""

    limit: int
    count: int = 0
    """Rows that came."""
    stride: int = 1
    """Every how manyth is kept."""
    parts: list[Tensor] = field(default_factory=list[Tensor])
    places: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, width]; whenever there are too many, every second one goes."""
        place = torch.arange(self.count, self.count + len(rows), device=rows.device)
        self.count += len(rows)
        kept = place % self.stride == 0
        self.parts.append(rows[kept].clone())
        self.places.append(place[kept])
        while sum(map(len, self.parts)) > self.limit:
            self.stride *= 2
            self.parts = [part[at % self.stride == 0] for part, at in zip(self.parts, self.places, strict=True)]
            self.places = [at[at % self.stride == 0] for at in self.places]

    def rows(self) -> Tensor | None:
        """[at most limit, width] in float32, or None if none came."""
        return torch.cat(self.parts).float() if self.count else None


@contextmanager
def _hooked(lifted: Lifted, receive: Receive, routing: Routing) -> Generator[None]:
    with ExitStack() as stack:
        for block in lifted.blocks:
            for name, bank in block.banks.items():
                for index, entry in enumerate(bank.entries):
                    hook = _hook(block, name, bank, index, receive, routing)
                    stack.callback(entry.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hook(
    block: LiftedBlock, name: str, bank: LiftedBank, entry: int, receive: Receive, routing: Routing
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = _arguments(module, args, kwargs)
        rows = hidden.detach().reshape(-1, block.shape.hidden)
        if bank.kind in ("routed", "routed_norm"):
            _by_expert(block, name, rows, rest[0].reshape(len(rows), -1), receive, routing)
        elif bank.kind == "shared_stack":
            for expert in range(bank.shape.experts):
                receive(block, name, expert, rows)
        elif len(rows):
            receive(block, name, entry, rows)

    return hook


def _arguments(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    values = dict(zip(names, args, strict=False)) | kwargs
    return [values[name] for name in names if isinstance(values.get(name), Tensor)]


def _by_expert(block: LiftedBlock, name: str, rows: Tensor, index: Tensor, receive: Receive, routing: Routing) -> None:
    experts = block.banks[name].shape.experts
    # anything outside of the bank is padding
    inside = torch.where((index >= 0) & (index < experts), index, experts).long()
    chosen = torch.zeros(len(rows), experts + 1, dtype=torch.bool, device=rows.device).scatter_(1, inside, True)
    chosen = chosen[:, :experts]
    routing.setdefault(block.name, []).append(chosen.cpu())
    for expert in chosen.any(0).nonzero().flatten().tolist():
        receive(block, name, expert, rows[chosen[:, expert]])
