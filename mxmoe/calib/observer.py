"""`observe`: run data through a module once, and come back with what allocation needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from mxmoe.calib.buffers import BankBuffer
from mxmoe.calib.collect import BlockCollector
from mxmoe.calib.inputs import Feed, Inputs, device_of, spread
from mxmoe.calib.like import LiftedLike
from mxmoe.calib.stats import Stats
from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant import Quantizer, find_quantizer

Run = Callable[[nn.Module, Any], object]
"""Runs one batch through the lifted module."""


def observe(
    lifted: LiftedLike,
    inputs: Inputs,
    *,
    schemes: Sequence[Scheme | str],
    run: Run | None = None,
    min_tokens: int = 32,
    max_buffer_mb: float = 512,
    max_rows: int = 8192,
    quantizer: str | Quantizer = "rtn",
    quiet: bool = False,
) -> Stats:
    """
    Observe routing and sensitivity of every block in one pass over the data.

    Each bank's rows wait in a buffer until the memory for them is used up, and are then reduced to sums (`Reduction`).
    The sums are exact over all data: neither the bound nor the batches change them beyond float32 rounding. What the
    block does to a bank's output afterwards (a shared expert's gate, a scaling factor) is asked of the block itself.

    Args:
        lifted: what `lift` returned; it is left as it was.
        inputs: see `mxmoe.calib.inputs.Batch`: a batch or an iterable of them.
        schemes: to evaluate each linear under, by value or name.
        run: runs one batch through `lifted.root`; by default tensors are token ids of a model or hidden states of a
            block, and mappings are keyword arguments.
        min_tokens: experts with fewer tokens take the `BANK_MEAN` fallback of the statistics.
        max_buffer_mb: bound on the memory of waiting rows, over all blocks, 10^6 bytes; one call may exceed it.
        max_rows: rows of one expert that are reduced at a time; bounds the memory of a reduction.
        quantizer: how weights are quantized, a name in `QUANTIZERS` or such a function.
        quiet: no progress bar.

    Raises:
        EmptyCalibration, NonFiniteCalibration, BadCalibration: in the data; sequences are checked before any work.
        BadScheme: a scheme name that is none.
        BadOption: a bound that is not positive.
        NothingObserved: a bank that no token reached.
        NonFiniteObservation: activations within the model that are not finite.
        NonFiniteWeights: from the quantizer.
    """
    session = _Session(lifted, schemes, max_buffer_mb, max_rows, quantizer)
    feed = Feed(lifted)
    batches, count = feed.batches(inputs) if run is None else _unchecked(inputs)
    with torch.no_grad(), _evaluating(lifted.root), session.hooked():
        for batch in tqdm(batches, desc="observing", total=count, disable=quiet, unit="batch"):
            if run is not None:
                run(lifted.root, batch)
            elif feed.experts is None:
                feed.run(batch)
            else:
                session.push(feed.routed(batch))
            session.flush()
        session.reduce(quiet=quiet)
    routing = "observed" if feed.has_own_routing else "uniform"
    return session.stats(Stats((), {}, min_tokens, routing=routing))


def observe_weights(
    lifted: LiftedLike,
    schemes: Sequence[Scheme | str],
    *,
    tokens_per_expert: int = 64,
    seed: int = 0,
    max_rows: int = 8192,
    quantizer: str | Quantizer = "rtn",
    quiet: bool = False,
) -> Stats:
    """
    Estimate sensitivity without data: standard normal hidden states, each expert as often as every other.

    The module is not run. The statistics say `data_free`: they know the weights, and nothing of routing, of outliers
    in the activations, or of what the block does to a bank's output.

    Raises:
        BadScheme, BadOption, NonFiniteWeights: as `observe`.
    """
    if tokens_per_expert < 1:
        raise BadOption(
            name="observe_weights", option=f"tokens_per_expert={tokens_per_expert}", reason="it is at least 1"
        )
    session = _Session(lifted, schemes, float("inf"), max_rows, quantizer)
    device = device_of(lifted.root)
    blocks = tqdm(lifted.blocks, desc="estimating", disable=quiet, unit="block")
    with torch.no_grad():
        for number, block in enumerate(blocks):
            blocks.set_postfix_str(block.name)
            most = max(bank.shape.experts / bank.shape.top_k for bank in block.banks.values())
            generator = torch.Generator().manual_seed(seed + number)
            hidden = torch.randn((round(tokens_per_expert * most), block.shape.hidden), generator=generator).to(device)
            for name, bank in block.banks.items():
                session.buffers[block.name, name].push(spread(hidden, bank))
            session.reduce_block(block.name)
    return session.stats(Stats((), {}, 0, data_free=True, routing="uniform"))


class _Session:
    """Buffers of all banks, and the bound on what they hold."""

    def __init__(
        self,
        lifted: LiftedLike,
        schemes: Sequence[Scheme | str],
        max_buffer_mb: float,
        max_rows: int,
        quantizer: str | Quantizer,
    ) -> None:
        for option, value in (("max_buffer_mb", max_buffer_mb), ("max_rows", max_rows)):
            if not value > 0:
                raise BadOption(name="observe", option=f"{option}={value}", reason="it must be positive")
        self.lifted = lifted
        self.schemes = tuple(dict.fromkeys(Scheme.parse(str(scheme)) for scheme in schemes))
        if not self.schemes:
            raise BadOption(name="observe", option="schemes=()", reason="there must be at least one scheme")
        self.quantizer = find_quantizer(quantizer)
        self.bound = max_buffer_mb * 1e6
        self.max_rows = int(max_rows)
        self.buffers = {
            (block.name, name): BankBuffer(block, bank, len(self.schemes))
            for block in lifted.blocks
            for name, bank in block.banks.items()
        }
        self.collectors = [
            BlockCollector(block, {name: self.buffers[block.name, name] for name in block.banks}, self.bounded)
            for block in lifted.blocks
        ]

    @contextmanager
    def hooked(self) -> Generator[None]:
        with ExitStack() as stack:
            for collector in self.collectors:
                stack.enter_context(collector.hooked())
            yield

    def push(self, routed: object) -> None:
        """Add rows for experts that stand alone."""
        next(iter(self.buffers.values())).push(cast("Any", routed))
        self.bounded()

    def flush(self) -> None:
        for collector in self.collectors:
            collector.flush()

    def bounded(self) -> None:
        """Reduce the fullest banks until what waits is within the bound."""
        while sum(buffer.n_bytes for buffer in self.buffers.values()) > self.bound:
            fullest = max(self.buffers.values(), key=lambda buffer: buffer.n_bytes)
            fullest.reduce(self.lifted.weights, self.schemes, self.quantizer, self.max_rows)

    def reduce_block(self, block: str) -> None:
        for (name, _), buffer in self.buffers.items():
            if name == block:
                buffer.reduce(self.lifted.weights, self.schemes, self.quantizer, self.max_rows)

    def reduce(self, *, quiet: bool) -> None:
        """Reduce all that waits."""
        blocks = tqdm(self.lifted.blocks, desc="reducing", disable=quiet, unit="block")
        for block in blocks:
            blocks.set_postfix_str(block.name)
            self.reduce_block(block.name)

    def stats(self, like: Stats) -> Stats:
        """Give all sums, with the options of `like`."""
        banks = {key: buffer.stats() for key, buffer in self.buffers.items()}
        macs = sum(buffer.macs for buffer in self.buffers.values())
        return Stats(self.schemes, banks, like.min_tokens, like.data_free, like.routing, macs)


def _unchecked(inputs: Inputs) -> tuple[Any, int | None]:
    """Batches for a `run` of the caller's own, who knows what they are; only an empty list is refused."""
    feedable = [inputs] if isinstance(inputs, torch.Tensor | dict) else inputs
    return feedable, len(cast("Any", feedable)) if hasattr(feedable, "__len__") else None


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Switch dropout and router jitter off, and give every submodule its mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
