"""Repairing routers after quantization: tokens that arrive changed are to choose the experts that they chose before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mxmoe.calib.inputs import Feed, Inputs, device_of
from mxmoe.calib.like import BlockLike, LiftedLike
from mxmoe.calib.observer import evaluating
from mxmoe.calib.router import Router, find_router
from mxmoe.errors import BadOption, NoRouter

_HELD_OUT = 4
"""One token in so many is not fitted, and judges."""


@dataclass(frozen=True)
class Agreement:
    """How many of a token's experts are those of the reference, on average over the tokens of a block; 0 to 1."""

    before: float
    after: float
    is_changed: bool
    """Whether the block's router was replaced; it stays where the fit does not help tokens that it has not seen."""


@dataclass(frozen=True)
class RouterRepair:
    """What `repair_routers` did."""

    blocks: Mapping[str, Agreement]

    def report(self) -> str:
        """Say it in a line for each block, and one for all."""
        lines = [
            f"{name}: top-k agreement {one.before:.4f} -> {one.after:.4f}{'' if one.is_changed else ', left as it was'}"
            for name, one in self.blocks.items()
        ]
        before, after = (sum(getattr(one, w) for one in self.blocks.values()) for w in ("before", "after"))
        count = max(len(self.blocks), 1)
        return "\n".join([*lines, f"all: {before / count:.4f} -> {after / count:.4f}"])


def repair_routers(
    lifted: LiftedLike,
    model: nn.Module,
    inputs: Inputs,
    *,
    top: int | None = None,
    rest: float = 0.1,
    ridge: float = 0.01,
    quiet: bool = False,
) -> RouterRepair:
    """
    Fit the routers of a quantized model anew, block by block, so that they score as those of the reference.

    After EAC-MoE (ACL 2025, arXiv 2508.01625), which minimises the squared error of the reference's `top` highest
    logits by gradient descent once a block's predecessors are quantized. The problem is linear, so we solve it: for
    every expert the least squares over its tokens, where it is among the top, and with the weight `rest` over all
    others, so that it does not drift up there, drawn towards what it was by `ridge`. Blocks are fitted in order, each
    from the output of repaired ones. A router is kept where it helps a quarter of the tokens that were not fitted.

    Memory: for each block [tokens, experts] float32, and [tokens, hidden] float32 for one; a pass over the data for
    each block, and three more.

    Args:
        lifted: what `lift` returned for the reference; it is not changed.
        model: the quantized model, or block, of the same structure, changed in place. It must not be the reference
            itself: copy a model before it is compiled.
        inputs: as `observe` takes them; read several times, so no iterator.
        top: highest logits of the reference that count fully; None takes twice the experts of a token.
        rest: weight of all other logits, 0 to 1.
        ridge: how strongly a row is drawn to what it was, in parts of the mean squared activation.
        quiet: no progress bar.

    Raises:
        BadOption: numbers out of range, or inputs that can be read only once.
        NoRouter: a block whose router cannot be found.
        EmptyCalibration, NonFiniteCalibration, BadCalibration: in the data.
    """
    for option, value, fits in (("rest", rest, 0 <= rest <= 1), ("ridge", ridge, ridge > 0)):
        if not fits:
            raise BadOption(name="repair_routers", option=f"{option}={value}", reason="it is out of range")
    if iter(inputs) is inputs:  # pyright: ignore[reportUnnecessaryComparison]  # an iterator is its own
        raise BadOption(name="repair_routers", option="an iterator", reason="the data is read once for each block")
    places = [_Place.of(lifted, model, block) for block in lifted.blocks if "routed" in block.banks]
    wanted = _Pass(lifted.root, lifted, [(place.reference, place.own_bank) for place in places])
    given = _Pass(model, lifted, [(place.router, place.bank) for place in places])
    with torch.no_grad():
        seen = wanted.run(inputs, quiet=quiet)
        targets = [torch.cat(one.logits) for one in seen]
        chosen = [one.chosen(place.top_k) for place, one in zip(places, seen, strict=True)]
        first = given.run(inputs, quiet=quiet)
        before = [one.chosen(place.top_k) for place, one in zip(places, first, strict=True)]
        changed: list[bool] = []
        bar = tqdm(list(enumerate(places)), desc="repairing routers", disable=quiet, unit="block")
        for index, place in bar:
            bar.set_postfix_str(place.name)
            rows = torch.cat(given.run(inputs, only=index, quiet=True)[0].hidden).float()
            count = min(top or 2 * place.top_k, targets[index].shape[1])
            changed.append(_refit(place, rows, targets[index], count, rest, ridge))
        given.places = [(place.router, place.bank) for place in places]
        last = given.run(inputs, quiet=quiet)
    return RouterRepair(
        {
            place.name: Agreement(
                _agreement(chosen[i], before[i]),
                _agreement(chosen[i], last[i].chosen(place.top_k)),
                changed[i],
            )
            for i, place in enumerate(places)
        }
    )


@dataclass
class _Place:
    """A block's router in the reference and in the quantized model."""

    name: str
    top_k: int
    reference: Router
    router: Router
    own_bank: nn.Module | None
    """The routed experts of the reference, None where they are not told the choice."""
    bank: nn.Module | None

    @classmethod
    def of(cls, lifted: LiftedLike, model: nn.Module, block: BlockLike) -> _Place:
        found = find_router(block)
        if found is None:
            raise NoRouter(block=block.name)
        path = next(name for name, module in lifted.root.named_modules() if module is found.module)
        routed = block.banks["routed"]
        twin = _submodule(model, path)
        if twin is None or twin is found.module:
            raise NoRouter(block=block.name)
        name = next(key for key, value in found.module.named_parameters(recurse=False) if value is found.weight)
        parameter = dict(twin.named_parameters(recurse=False))[name]
        bias = None if found.bias is None else dict(twin.named_parameters(recurse=False))["bias"]
        is_told = routed.kind in ("routed", "routed_norm")
        bank = _submodule(model, routed.path) if is_told else None
        return cls(
            block.name,
            routed.shape.top_k,
            found,
            Router(twin, parameter, bias),
            routed.module if is_told else None,
            bank,
        )

    def replace(self, weight: Tensor) -> None:
        """Give the quantized model's router other rows; whoever shares the old ones keeps them."""
        old = self.router.weight
        name = next(key for key, value in self.router.module.named_parameters(recurse=False) if value is old)
        new = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
        setattr(self.router.module, name, new)
        self.router = Router(self.router.module, new, self.router.bias)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Find a path in a model, or in the block that a compiled block holds."""
    for root in (model, getattr(model, "block", None)):
        if isinstance(root, nn.Module):
            try:
                return root.get_submodule(path)
            except AttributeError:
                continue
    return None


@dataclass
class _Seen:
    """What went by one router in one pass."""

    hidden: list[Tensor] = field(default_factory=list[Tensor])
    """[tokens, hidden] of each call, where they are asked for."""
    logits: list[Tensor] = field(default_factory=list[Tensor])
    """[tokens, experts] of each call, elsewhere."""
    index: list[Tensor] = field(default_factory=list[Tensor])

    def chosen(self, top_k: int) -> Tensor:
        """[tokens, k]: the experts that the block took; of a list of experts, which is not told, the highest logits."""
        return torch.cat(self.index) if self.index else torch.cat(self.logits).topk(top_k, dim=-1).indices


class _Pass:
    """Runs the data through a module and records what its routers get, and what they choose."""

    def __init__(self, root: nn.Module, lifted: LiftedLike, places: Sequence[tuple[Router, nn.Module | None]]) -> None:
        self.lifted, self.places = lifted, places
        self.feed = copy.copy(Feed(lifted))
        self.feed.root = root
        self.feed.device = device_of(root)

    def run(self, inputs: Inputs, *, only: int | None = None, quiet: bool) -> list[_Seen]:
        """Run all data; record logits and choices at every router, or the tokens at one."""
        places = [self.places[only]] if only is not None else list(self.places)
        seen = [_Seen() for _ in places]
        batches, count = self.feed.batches(inputs)
        with evaluating(self.feed.root), _recording(places, seen, keeps_tokens=only is not None):
            for batch in tqdm(batches, desc="running", total=count, disable=quiet, unit="batch"):
                self.feed.run(batch)
        return seen


@contextmanager
def _recording(
    places: Sequence[tuple[Router, nn.Module | None]], seen: Sequence[_Seen], *, keeps_tokens: bool
) -> Generator[None]:
    def at_router(router: Router, one: _Seen) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else next(iter(named.values()))
            rows = hidden.detach().reshape(-1, hidden.shape[-1])
            if keeps_tokens:
                one.hidden.append(rows.clone())
            else:
                one.logits.append(_logits(router, rows.float()))

        return record

    def at_bank(one: _Seen) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            signature = getattr(module, "__signature__", None) or inspect.signature(module.forward)
            index: Tensor = list(signature.bind(*args, **named).arguments.values())[1]
            one.index.append(index.detach().reshape(-1, index.shape[-1]).clone())

        return record

    with ExitStack() as stack:
        for (router, bank), one in zip(places, seen, strict=True):
            stack.callback(router.module.register_forward_pre_hook(at_router(router, one), with_kwargs=True).remove)
            if bank is not None:
                stack.callback(bank.register_forward_pre_hook(at_bank(one), with_kwargs=True).remove)
        yield


def _logits(router: Router, rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """[tokens, experts] float32."""
    logits = rows @ (router.weight if weight is None else weight).float().T
    return logits if router.bias is None else logits + router.bias.float()


def _agreement(one: Tensor, other: Tensor) -> float:
    return float((one[:, :, None] == other.to(one.device)[:, None, :]).any(dim=-1).float().mean())


def _refit(place: _Place, rows: Tensor, target: Tensor, top: int, rest: float, ridge: float) -> bool:
    """Fit a router's rows, and keep them if they choose better where they were not fitted."""
    target = target.to(rows.device)
    held = torch.arange(len(rows), device=rows.device) % _HELD_OUT == _HELD_OUT - 1
    # too few tokens to hold any out: the fit judges itself
    fitted, judges = (~held, held) if bool(held.any()) else (~held, ~held)
    old = place.router.weight.float()
    new = _solve(place.router, rows[fitted], target[fitted], top, rest, ridge)
    goal = target[judges].topk(place.top_k, dim=-1).indices
    before, after = (
        _agreement(goal, _logits(place.router, rows[judges], weight).topk(place.top_k, dim=-1).indices)
        for weight in (old, new)
    )
    if not after > before:
        return False
    place.replace(new)
    return True


def _solve(router: Router, rows: Tensor, target: Tensor, top: int, rest: float, ridge: float) -> Tensor:
    """
    Minimise for every expert sum_t c_t (x_t . w - l_t)^2 + ridge m ||w - w_0||^2, m the mean over channels of
    sum_t c_t x_t^2.

    c is 1 where the expert is among the reference's top, `rest` elsewhere; the router's bias stays. In float64.
    """
    x, old = rows.double(), router.weight.double()
    left = target.double() - _logits(router, rows).double()
    is_top = torch.zeros_like(target, dtype=torch.bool).scatter_(1, target.topk(top, dim=-1).indices, True)
    whole = rest * (x.mT @ x)
    eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    found: list[Tensor] = []
    for expert in range(len(old)):
        own = x[is_top[:, expert]]
        gram = whole + (1 - rest) * (own.mT @ own)
        side = rest * (x.mT @ left[:, expert]) + (1 - rest) * (own.mT @ left[is_top[:, expert], expert])
        pull = ridge * gram.diagonal().mean()
        # an expert that nothing is known of stays
        known = float(pull) > 0
        found.append(old[expert] + torch.linalg.solve(gram + pull * eye, side) if known else old[expert])
    return torch.stack(found).float()
