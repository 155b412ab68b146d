"""Collecting Hessians: run data through a module, and sum x x^T for every linear of every expert on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from mxmoe.calib.buffers import BankBuffer, Routed
from mxmoe.calib.collect import BlockCollector
from mxmoe.calib.hessians import BankHessians, Hessians, Transform
from mxmoe.calib.inputs import Feed, Inputs
from mxmoe.calib.like import BankLike, BlockLike, LiftedLike
from mxmoe.calib.observer import Run, evaluating
from mxmoe.errors import BadOption, NonFiniteObservation, NothingObserved, UnknownName
from mxmoe.quant import apply_act
from mxmoe.registry import near_names

T = TypeVar("T")


@dataclass(frozen=True)
class HessianOptions:
    """How Hessians are collected."""

    affinity: bool = True
    """Weigh each token by its router weight for the expert, as MoEQuant's affinity-guided quantization does (ICML 2025,
    arXiv 2505.03804): the loss is then that of the block's output. The weight is what the block in the end multiplies
    the expert's output with, its sign left out. False: every token counts one."""
    transform: Transform | None = None
    """What is done to the rows that a weight reads; of gate and up, which share a sum, it is asked for up."""
    prior: float = 0.1
    """As in `Hessians`."""
    min_tokens: int | None = None
    """As in `Hessians`."""
    device: str | torch.device | None = None
    """Where the sums are kept; None: where the rows are. "cpu" spares a GPU's memory, for one copy per expert."""
    max_buffer_mb: float = 512
    """Bound on waiting rows, 10^6 bytes; one call of the module may exceed it."""
    max_rows: int = 8192
    """Rows of one expert that are multiplied at a time."""

    def __post_init__(self) -> None:
        for option in ("max_buffer_mb", "max_rows"):
            if not getattr(self, option) > 0:
                text = f"{option}={getattr(self, option)}"
                raise BadOption(name="collect_hessians", option=text, reason="it must be positive")


def collect_hessians(
    lifted: LiftedLike,
    inputs: Inputs,
    *,
    blocks: Sequence[str] | None = None,
    options: HessianOptions | None = None,
    run: Run | None = None,
    quiet: bool = False,
) -> Hessians:
    """
    Sum x x^T over the inputs of every expert linear, in one pass over the data.

    Gate and up of an expert share a sum; down's is over act(gate(x), up(x)) in full precision. Memory: float32
    [experts, hidden, hidden] and [experts, intermediate, intermediate] for each bank, and the waiting rows; 1.5 GB for
    a layer of Qwen1.5-MoE (60 experts, 2048 and 1408). `hessians_by_block` bounds it for models with many layers.

    Args:
        lifted: what `lift` returned; it is left as it was.
        inputs: as in `observe`.
        blocks: names of the blocks to collect for; None: all.
        options: see `HessianOptions`.
        run: as in `observe`.
        quiet: no progress bar.

    Raises:
        EmptyCalibration, NonFiniteCalibration, BadCalibration: in the data.
        UnknownName: a block that is not there.
        NothingObserved: a bank that no token reached.
        NonFiniteObservation: activations within the model that are not finite.
    """
    options = options or HessianOptions()
    session = _Session(lifted, _chosen(lifted, blocks), options)
    feed = Feed(lifted)
    # batches for a `run` of the caller's own are the caller's business
    batches, count = feed.batches(inputs) if run is None else (cast("Iterable[Any]", inputs), None)
    with torch.no_grad(), evaluating(lifted.root), ExitStack() as hooks:
        for collector in session.collectors:
            hooks.enter_context(collector.hooked())
        for batch in tqdm(batches, desc="collecting Hessians", total=count, disable=quiet, unit="batch"):
            if run is not None:
                run(lifted.root, batch)
            elif feed.experts is None:
                feed.run(batch)
            else:
                session.push(feed.routed(batch))
            session.flush()
        session.reduce(0)
    return session.result()


class HessiansByBlock:
    """
    Hessians of a model with many layers, collected when they are asked for: `hessians(name, expert)`, as `Hessians`.

    Blocks are taken in groups whose sums fit into `max_gb`; asking for a weight of another group runs the data again
    and drops the sums before. Whoever goes through the blocks in order pays one pass for each group.
    """

    def __init__(
        self,
        lifted: LiftedLike,
        inputs: Inputs,
        *,
        max_gb: float = 16.0,
        options: HessianOptions | None = None,
        run: Run | None = None,
        quiet: bool = False,
    ) -> None:
        """
        Plan the groups; nothing runs yet.

        Args:
            lifted: as in `collect_hessians`, as the others that are not named here.
            inputs: they are read once for each group; an iterator is read into memory.
            max_gb: 10^9 bytes that the sums may take; one block may exceed it.
            options: as in `collect_hessians`.
            run: as in `observe`.
            quiet: no progress bar.

        Raises:
            BadOption: `max_gb` is not positive.
        """
        if not max_gb > 0:
            raise BadOption(name="HessiansByBlock", option=f"max_gb={max_gb}", reason="it must be positive")
        self.groups = tuple(_groups(lifted.blocks, max_gb * 1e9))
        self._lifted, self._options, self._run, self._quiet = lifted, options, run, quiet
        self._inputs = inputs if len(self.groups) < 2 else rereadable(inputs)
        self._of = {
            name: number
            for number, group in enumerate(self.groups)
            for block in lifted.blocks
            if block.name in group
            for bank in block.banks.values()
            for name in bank.shape.weights.values()
        }
        self._held: tuple[int, Hessians] | None = None

    def __call__(self, name: str, expert: int) -> Tensor | None:
        """Return one Hessian; collects it first where need be, and raises what `collect_hessians` raises then."""
        if name not in self._of:
            raise UnknownName(kind="Hessian", name=name, near=near_names(name, self._of))
        wanted = self._of[name]
        if self._held is None or self._held[0] != wanted:
            self._held = None
            blocks = self.groups[wanted]
            collected = collect_hessians(
                self._lifted, self._inputs, blocks=blocks, options=self._options, run=self._run, quiet=self._quiet
            )
            self._held = (wanted, collected)
        return self._held[1](name, expert)


def rereadable(inputs: T) -> T:
    """Return inputs that can be read more than once: an iterator is read into a list."""
    return cast("T", list(cast("Iterator[Any]", inputs))) if isinstance(inputs, Iterator) else inputs


def _groups(blocks: Sequence[BlockLike], bound: float) -> Iterator[tuple[str, ...]]:
    """Cut the blocks, in order, into groups whose sums take at most `bound` bytes."""
    group: list[str] = []
    total = 0
    for block in blocks:
        size = sum(
            4 * bank.shape.experts * (block.shape.hidden**2 + bank.shape.intermediate**2)
            for bank in block.banks.values()
        )
        if group and total + size > bound:
            yield tuple(group)
            group, total = [], 0
        group.append(block.name)
        total += size
    if group:
        yield tuple(group)


def _chosen(lifted: LiftedLike, blocks: Sequence[str] | None) -> list[BlockLike]:
    known = {block.name: block for block in lifted.blocks}
    for name in blocks or ():
        if name not in known:
            raise UnknownName(kind="block", name=name, near=near_names(name, known))
    return [block for name, block in known.items() if blocks is None or name in blocks]


class _Session:
    """Waiting rows of all banks, and the sums that they become."""

    def __init__(self, lifted: LiftedLike, blocks: Sequence[BlockLike], options: HessianOptions) -> None:
        self.options = options
        self.sums = [_Sums(block, bank, lifted.weights, options) for block in blocks for bank in block.banks.values()]
        self.collectors = [
            BlockCollector(block, {one.bank.shape.name: one.rows for one in self.sums if one.block is block}, self.full)
            for block in blocks
        ]

    def push(self, routed: Routed) -> None:
        """Add rows for experts that stand alone."""
        self.sums[0].rows.push(routed)
        self.full()

    def flush(self) -> None:
        for collector in self.collectors:
            collector.flush()

    def full(self) -> None:
        self.reduce(self.options.max_buffer_mb * 1e6)

    def reduce(self, bound: float) -> None:
        """Sum up the banks with the most waiting rows until what waits is within the bound."""
        while sum(one.rows.n_bytes for one in self.sums) > bound:
            max(self.sums, key=lambda one: one.rows.n_bytes).reduce()

    def result(self) -> Hessians:
        banks: dict[str, BankHessians] = {}
        for one in self.sums:
            banks |= one.result()
        return Hessians(banks, self.options.prior, self.options.min_tokens)


class _Sums:
    """The sums of one bank."""

    def __init__(
        self, block: BlockLike, bank: BankLike, weights: Mapping[str, Tensor], options: HessianOptions
    ) -> None:
        self.block, self.bank, self.weights, self.options = block, bank, weights, options
        self.rows = BankBuffer(block, bank, 0)
        self.tokens = torch.zeros(bank.shape.experts, dtype=torch.int64)
        self.outer: Tensor | None = None
        """[experts, hidden, hidden], of gate and up; None before the first row."""
        self.inner: Tensor | None = None
        """[experts, intermediate, intermediate], of down."""

    def reduce(self) -> None:
        """Turn what waits into sums, expert by expert."""
        waiting, self.rows.waiting = self.rows.waiting, []
        shape = self.bank.shape
        hidden = torch.cat([routed.hidden for routed in waiting])
        affinity = torch.cat([_affinity(routed) for routed in waiting]).flatten()
        index = torch.cat([routed.index for routed in waiting])
        width = index.shape[-1]
        # one sort and one transfer for the whole bank
        ranked, order = index.flatten().sort(stable=True)
        edges = torch.arange(shape.experts + 1, device=index.device, dtype=index.dtype)
        starts = torch.searchsorted(ranked, edges).tolist()
        outer, inner = self._sums(hidden.device)
        # asked for once per bank: a list of MLPs is copied into a stack each time
        names = {**shape.weights, **{f"{role}.bias": name for role, name in shape.biases.items()}}
        stacks = {role: self.weights[name] for role, name in names.items()}
        for expert in (one for one in range(shape.experts) if starts[one] < starts[one + 1]):
            own = {role: stack[expert].to(hidden.device, torch.float32) for role, stack in stacks.items()}
            places = order[starts[expert] : starts[expert + 1]]
            self.tokens[expert] += len(places)
            for part in places.split(self.options.max_rows):
                x = hidden[part // width].float()
                weight = affinity[part][:, None] if self.options.affinity else torch.ones_like(x[:, :1])
                self._add(outer[expert], shape.weights["up"], x, weight)
                gate = _linear(own, "gate", x) if shape.gated else None
                between = apply_act(shape.act, gate, _linear(own, "up", x), shape.act_params)
                self._add(inner[expert], shape.weights["down"], between, weight)

    def _add(self, total: Tensor, name: str, x: Tensor, weight: Tensor) -> None:
        change = self.options.transform(name) if self.options.transform else None
        x = x if change is None else change(x).float()
        total += ((x * weight).mT @ x).to(total.device)

    def _sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.outer is None or self.inner is None:
            kept = self.options.device or device
            shape, hidden = self.bank.shape, self.block.shape.hidden
            self.outer = torch.zeros((shape.experts, hidden, hidden), device=kept)
            self.inner = torch.zeros((shape.experts, shape.intermediate, shape.intermediate), device=kept)
        return self.outer, self.inner

    def result(self) -> dict[str, BankHessians]:
        """
        Give the sums by the name of the weight.

        Raises:
            NothingObserved: no row ever reached the bank.
            NonFiniteObservation: rows of an expert are not finite.
        """
        block, bank = self.block.name, self.bank.shape.name
        if self.outer is None or self.inner is None or not bool(self.tokens.any()):
            raise NothingObserved(bank=bank, block=block)
        for total in (self.outer, self.inner):
            # a row that is not finite shows on the diagonal
            finite = total.diagonal(dim1=1, dim2=2).isfinite().all(-1)
            if not bool(finite.all()):
                expert = int((~finite).nonzero()[0])
                raise NonFiniteObservation(expert=expert, block=block, bank=bank)
        common = BankHessians(self.outer, self.tokens, is_common=True)
        own = BankHessians(self.inner, self.tokens, is_common=False)
        return {name: own if role == "down" else common for role, name in self.bank.shape.weights.items()}


def _affinity(routed: Routed) -> Tensor:
    """What each row's output is multiplied with in the end, [rows, k] float32."""
    weight = routed.weight.float()
    return (weight if routed.factor is None else weight * routed.factor[:, None].float()).abs()


def _linear(own: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
    product = x @ own[role].mT
    bias = own.get(f"{role}.bias")
    return product if bias is None else product.add_(bias)
