"""Calibration data as batches, each checked before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxmoe.calib.buffers import Routed
from mxmoe.calib.like import BankLike, LiftedLike
from mxmoe.errors import BadCalibration, EmptyCalibration, NonFiniteCalibration

Batch = Tensor | Mapping[str, Any] | tuple[Tensor, Tensor, Tensor]
"""
One batch, by what was lifted:

    a model          token ids [tokens] or [sequences, tokens], or a mapping of keyword arguments
    a block          hidden states [tokens, hidden] or [sequences, tokens, hidden], or a mapping of keyword arguments
    experts alone    (hidden [tokens, hidden], index [tokens, k], weights [tokens, k]); hidden states without routing
                     are spread evenly over the experts
"""
Inputs = Batch | Iterable[Batch]
"""A batch, or any iterable of batches; an iterable that is no sequence is read once, batch by batch."""

TOKENS_AT_ONCE = 4096
"""Tokens of a tensor that run through the module in one call."""


class Feed:
    """Checks batches for one lifted module and runs them, or hands them to its experts where they stand alone."""

    def __init__(self, lifted: LiftedLike) -> None:
        """Look at what was lifted."""
        block = lifted.blocks[0]
        self.root = lifted.root
        self.hidden = block.shape.hidden
        self.experts: BankLike | None = next((b for b in block.banks.values() if b.module is lifted.root), None)
        self.is_block = self.experts is not None or block.block is lifted.root
        # of the experts: a router before them may be kept in float32
        parameter = next((p for bank in block.banks.values() for p in bank.module.parameters()), None)
        self.device = device_of(lifted.root)
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.vocabulary = _vocabulary(lifted.root)
        self.has_own_routing = True

    def batches(self, inputs: Inputs) -> tuple[Iterator[Batch], int | None]:
        """
        Split the inputs into batches, and count them where that is possible; sequences are checked at once.

        Raises:
            EmptyCalibration, NonFiniteCalibration, BadCalibration: what `check` raises.
        """
        if isinstance(inputs, Tensor | Mapping) or _is_routed(inputs):
            inputs = [cast("Batch", inputs)]
        if not isinstance(inputs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
            inputs = [inputs]  # `check` says what a batch is
        if not isinstance(inputs, Sequence):
            return self._checked(inputs), None
        if not inputs:
            raise EmptyCalibration(what="the list of batches")
        for number, batch in enumerate(inputs):
            self.check(batch, number)
        split = [part for batch in inputs for part in _split(batch)]
        return iter(split), len(split)

    def _checked(self, inputs: Iterable[Batch]) -> Iterator[Batch]:
        number = -1
        for number, batch in enumerate(inputs):
            self.check(batch, number)
            yield from _split(batch)
        if number < 0:
            raise EmptyCalibration(what="the iterable of batches")

    def check(self, batch: object, number: int) -> None:
        """
        Check one batch; `number` is for messages.

        Raises:
            EmptyCalibration: no token in it.
            NonFiniteCalibration: NaN or infinity.
            BadCalibration: another type, dtype or shape than the module takes.
        """
        tensors = _tensors(batch)
        for tensor in tensors:
            if not tensor.numel():
                raise EmptyCalibration(what=f"batch {number}")
            if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
                raise NonFiniteCalibration(batch=number, index=(~finite).nonzero()[0].tolist())
        if isinstance(batch, Mapping) and not self.experts:
            return
        wanted = self._fault(tensors, routed=_is_routed(batch))
        if wanted or isinstance(batch, Mapping):
            found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors) or type(batch).__name__
            raise BadCalibration(batch=number, found=found, wanted=wanted or "experts alone take tensors")

    def _fault(self, tensors: Sequence[Tensor], *, routed: bool) -> str | None:
        first = tensors[0] if tensors else None
        if first is None or (len(tensors) > 1 and not routed):
            return "a batch is a tensor, a mapping of arguments or (hidden, index, weights)"
        if not self.is_block:
            ids = len(tensors) == 1 and not first.is_floating_point() and first.dtype != torch.bool
            if not ids or first.dim() not in (1, 2):
                return "a model takes token ids [tokens] or [sequences, tokens], or a mapping"
            low, high = (int(bound) for bound in torch.aminmax(first))
            if self.vocabulary is not None and not 0 <= low <= high < self.vocabulary:
                return f"its ids go from {low} to {high}, the model knows 0 to {self.vocabulary - 1}"
            return self._unbound(input_ids=first)
        if not first.is_floating_point() or first.shape[-1] != self.hidden or first.dim() not in (2, 3):
            return f"hidden states are floats [tokens, {self.hidden}] or [sequences, tokens, {self.hidden}]"
        if not routed:
            return None if self.experts else self._unbound(first)
        if self.experts is None:
            return "this block routes by itself: pass hidden states only"
        _, index, weights = tensors
        fits = index.shape == weights.shape and index.dim() == 2 and len(index) == len(first) and first.dim() == 2
        return (
            None if fits and not index.is_floating_point() else "index and weights are [tokens, k], index of integers"
        )

    def _unbound(self, *args: Tensor, **named: Tensor) -> str | None:
        """Say so if the module cannot be called with a tensor alone."""
        try:
            inspect.signature(self.root.forward).bind(*args, **named)
        except TypeError as error:
            return f"{type(self.root).__name__} cannot be called with it alone ({error}): pass a mapping of arguments"
        return None

    def run(self, batch: Batch) -> object:
        """Run a batch through the module, and return what the module does."""
        if isinstance(batch, Mapping):
            named = {key: v.to(self.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            return self.root(**self._without_cache(named))
        assert isinstance(batch, Tensor), f"{type(batch)} goes to the experts"
        # a block wants sequences; a model wants batches of them
        wide = batch[None] if batch.dim() == (2 if self.is_block else 1) else batch
        if self.is_block:
            return self.root(wide.to(self.device, self.dtype))
        return self.root(**self._without_cache({"input_ids": wide.to(self.device)}))

    def routed(self, batch: Batch) -> Routed:
        """Give a batch as rows for the experts that stand alone, spread evenly if it has no routing."""
        assert self.experts is not None, "experts stand alone"
        if isinstance(batch, tuple):
            hidden, index, weights = (tensor.to(self.device) for tensor in batch)
            return Routed(hidden.to(self.dtype), index, weights)
        assert isinstance(batch, Tensor), f"{type(batch)} was checked"
        self.has_own_routing = False
        return spread(batch.reshape(-1, self.hidden).to(self.device, self.dtype), self.experts)

    def _without_cache(self, named: dict[str, Any]) -> dict[str, Any]:
        config = getattr(self.root, "config", None)
        return named if getattr(config, "use_cache", None) is None else {"use_cache": False, **named}


def spread(hidden: Tensor, bank: BankLike) -> Routed:
    """Route rows [tokens, hidden] evenly: token t to experts t k, t k + 1, ..., each with the weight 1 / k."""
    k, experts = bank.shape.top_k, bank.shape.experts
    everyone = bank.shape.name == "shared"
    slots = torch.arange(len(hidden) * k, device=hidden.device).reshape(-1, k) % experts
    weight = torch.full(slots.shape, 1.0 if everyone else 1 / k, device=hidden.device)
    return Routed(hidden, slots, weight)


def device_of(module: nn.Module) -> torch.device:
    """Give the device of a module's first parameter."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _vocabulary(root: nn.Module) -> int | None:
    """Count the token ids that a model has embeddings for; None where it does not say."""
    ask = getattr(root, "get_input_embeddings", None)
    try:
        return getattr(ask(), "num_embeddings", None) if callable(ask) else None
    except (NotImplementedError, AttributeError):  # how transformers says that there are none
        return None


def _is_routed(batch: object) -> bool:
    return isinstance(batch, tuple) and len(batch) == 3 and all(isinstance(item, Tensor) for item in batch)


def _tensors(batch: object) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    items: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch if _is_routed(batch) else ()  # type: ignore[assignment]
    return [item for item in items if isinstance(item, Tensor)]


def _split(batch: Batch) -> list[Batch]:
    """Cut tensors into calls of about `TOKENS_AT_ONCE` tokens, along their first axis; others stay whole."""
    if not isinstance(batch, Tensor) or batch.dim() < 2:
        return [batch]
    each = batch.shape[1] if not (batch.is_floating_point() and batch.dim() == 2) else 1
    return list(batch.split(max(1, TOKENS_AT_ONCE // each)))
