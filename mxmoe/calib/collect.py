"""Hooks on the banks of a module: while it runs, every bank's rows go into its buffer with their weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mxmoe.calib.buffers import BankBuffer, Routed
from mxmoe.calib.like import BankLike, BlockLike
from mxmoe.calib.probe import first_tensor, probe_assignments, probe_factors


@dataclass
class Record:
    """One call of a bank, or of an entry of its list."""

    entry: int
    """Which of the bank's entries was called."""
    routed: Routed
    output: Tensor | None = None
    """What it gave, as a place to differentiate by; None where no gradient is wanted."""


class BlockCollector:
    """Collects for one block: banks record while the block runs, then the block's own weights are added."""

    def __init__(
        self, block: BlockLike, buffers: dict[str, BankBuffer], after: Callable[[], None], *, gradients: bool = False
    ) -> None:
        """Fill `buffers`, one per bank, and call `after` whenever they have grown; with `gradients` once they came."""
        self.block = block
        self.buffers = buffers
        self.after = after
        self.gradients = gradients
        self.pending: dict[str, list[Record]] = {name: [] for name in buffers}
        self.held: list[tuple[str, Record]] = []
        """Records that wait for their gradients."""
        self.is_probing = False

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Hook the banks and the block."""
        handles = [
            entry.register_forward_pre_hook(self._recorder(name, index, bank), with_kwargs=True)
            for name, bank in self.block.banks.items()
            for index, entry in enumerate(bank.entries)
        ]
        if self.gradients:
            handles += [
                entry.register_forward_hook(self._leaf(name, index))
                for name, bank in self.block.banks.items()
                for index, entry in enumerate(bank.entries)
            ]
        handles.append(self.block.block.register_forward_hook(self._finish, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def flush(self) -> None:
        """Take in what was recorded outside of a call of the block: the bank's output is all there is to see."""
        if any(self.pending.values()):
            self._take(None, None)

    def outputs(self) -> list[Tensor]:
        """Give what the held records are differentiated by."""
        outputs = [record.output for _, record in self.held]
        assert all(output is not None for output in outputs), f"{self.block.name} gave no output"
        return [output for output in outputs if output is not None]

    def release(self, gradients: Sequence[Tensor | None]) -> None:
        """Put the held records into the buffers, each with its gradient; None: the loss does not depend on it."""
        held, self.held = self.held, []
        for (name, record), gradient in zip(held, gradients, strict=True):
            hidden = record.routed.hidden
            slope = torch.zeros_like(hidden) if gradient is None else gradient.detach().reshape(hidden.shape)
            # float16 has no room for small gradients
            kept = slope.to(torch.float32 if hidden.dtype == torch.float16 else hidden.dtype)
            self.buffers[name].waiting.append(replace(record.routed, gradient=kept))
        self.after()

    def _leaf(self, name: str, index: int) -> Callable[..., Tensor | None]:
        def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:  # noqa: ANN401
            if self.is_probing:
                return None
            record = next(record for record in reversed(self.pending[name]) if record.entry == index)
            leaf: Tensor = output if output.requires_grad else output.detach().requires_grad_()
            record.output = leaf
            # a copy, since the block may write into what it was given
            return leaf.clone()

        return remember

    def _recorder(self, name: str, index: int, bank: BankLike) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not self.is_probing:
                self.pending[name].append(Record(index, read_call(module, bank, args, named)))

        return record

    def _finish(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: object) -> None:
        if self.is_probing or not any(self.pending.values()):
            return
        out = first_tensor(output)
        # the experts themselves are the block: there is nothing around them to ask
        alone = any(bank.module is self.block.block for bank in self.block.banks.values())
        if alone or out is None:
            self._take(None, None)
        else:
            self._take(lambda: module.forward(*args, **named), out.numel() // self.block.shape.hidden)

    def _take(self, call: Callable[[], object] | None, n_tokens: int | None) -> None:
        """Move what is pending into the buffers, with the factors that the block answers with."""
        pending, self.pending = self.pending, {name: [] for name in self.buffers}
        self.is_probing = True
        try:
            with torch.no_grad():
                factors = self._factors(call, n_tokens, pending)
        finally:
            self.is_probing = False
        for name, records in pending.items():
            buffer, bank = self.buffers[name], self.block.banks[name]
            rows = sum(len(record.routed.hidden) for record in records)
            is_list = bank.kind == "module_list"
            buffer.n_tokens += n_tokens if n_tokens and is_list else rows // (bank.shape.top_k if is_list else 1)
            found = factors[name]
            buffer.measured_at_bank |= bool(records) and call is not None and found is None
            for position, record in enumerate(records):
                routed = replace(record.routed, factor=None if found is None else found[position])
                if self.gradients:
                    self.held.append((name, Record(record.entry, routed, record.output)))
                else:
                    buffer.waiting.append(routed)
        if not self.gradients:
            self.after()

    def _factors(
        self, call: Callable[[], object] | None, n_tokens: int | None, pending: dict[str, list[Record]]
    ) -> dict[str, list[Tensor] | None]:
        """Bank -> one factor for each record, or None where the block does not tell."""
        found: dict[str, list[Tensor] | None] = dict.fromkeys(pending)
        if call is None or n_tokens is None:
            return found
        hidden = self.block.shape.hidden
        whole = [n for n, r in pending.items() if len(r) == 1 and self.block.banks[n].kind != "module_list"]
        silent = [e for b in self.block.banks.values() for e in b.entries]
        modules = [self.block.banks[name].module for name in whole]
        fit = all(len(pending[name][0].routed.hidden) == n_tokens for name in whole)
        if whole and fit:
            answers = probe_factors(call, modules, [m for m in silent if m not in modules], n_tokens, hidden)
            found |= {name: [answers[i]] if answers else None for i, name in enumerate(whole)}
        for name, records in pending.items():
            entries = self.block.banks[name].entries
            if self.block.banks[name].kind == "module_list" and _each_once(records):
                called = [entries[record.entry] for record in records]
                rows = [len(record.routed.hidden) for record in records]
                rest = [module for module in silent if module not in called]
                found[name] = probe_assignments(call, called, rows, rest, n_tokens, hidden)
        return found


def read_call(module: nn.Module, bank: BankLike, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
    """Read the rows, and where they go, off a call of a bank or of an entry of its list."""
    return _READ[bank.kind](module, bank, args, named)


def _each_once(records: Sequence[Record]) -> bool:
    return len({record.entry for record in records}) == len(records) > 0


def _arguments(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], count: int) -> list[Tensor]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    values = dict(zip(names, args, strict=False)) | named
    return [values[name].detach() for name in names[:count]]


def _rows(hidden: Tensor) -> Tensor:
    # a copy: the model may write into its own activations later
    return hidden.reshape(-1, hidden.shape[-1]).clone()


def _read_routed(module: nn.Module, bank: BankLike, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
    hidden, index, weights = _arguments(module, args, named, 3)
    width = index.shape[-1]
    return Routed(_rows(hidden), index.reshape(-1, width).clone(), weights.reshape(-1, width).clone())


def _read_shared(module: nn.Module, bank: BankLike, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
    return _whole(_rows(_arguments(module, args, named, 1)[0]), 0)


def _read_stack(module: nn.Module, bank: BankLike, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
    hidden, gammas = _arguments(module, args, named, 2)
    rows, experts = _rows(hidden), bank.shape.experts
    index = torch.arange(experts, device=rows.device).expand(len(rows), -1)
    return Routed(rows, index, gammas.reshape(-1, experts).clone())


def _read_entry(module: nn.Module, bank: BankLike, args: tuple[Any, ...], named: dict[str, Any]) -> Routed:
    index = next(i for i, entry in enumerate(bank.entries) if entry is module)
    return _whole(_rows(_arguments(module, args, named, 1)[0]), index)


def _whole(rows: Tensor, expert: int) -> Routed:
    """All rows to one expert, with weight one."""
    index = torch.full((len(rows), 1), expert, device=rows.device)
    return Routed(rows, index, torch.ones((len(rows), 1), device=rows.device))


_READ: dict[str, Callable[[nn.Module, BankLike, tuple[Any, ...], dict[str, Any]], Routed]] = {
    "routed": _read_routed,
    "routed_norm": _read_routed,
    "shared": _read_shared,
    "shared_stack": _read_stack,
    "module_list": _read_entry,
}
"""Kind of a bank -> how its call is read."""
