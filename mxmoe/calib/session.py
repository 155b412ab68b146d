"""One observation: the buffers of all banks, the bound on what they hold, and their reduction."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from tqdm import tqdm

from mxmoe.calib.buffers import BankBuffer, How, Routed
from mxmoe.calib.collect import BlockCollector
from mxmoe.calib.facts import facts_of
from mxmoe.calib.inputs import device_of
from mxmoe.calib.like import LiftedLike
from mxmoe.calib.stats import Stats
from mxmoe.errors import BadOption
from mxmoe.ir import Scheme, rotations
from mxmoe.quant import Quantizer, find_quantizer

CPU_BUFFER_MB = 512.0
GPU_BUFFER_SHARE = 0.25
CPU_ROWS, GPU_ROWS = 8192, 32768


class Session:
    """Buffers of all banks, and the bound on what they hold."""

    def __init__(
        self,
        lifted: LiftedLike,
        schemes: Sequence[Scheme | str],
        max_buffer_mb: float | None,
        max_rows: int | None,
        quantizer: str | Quantizer,
        *,
        gradients: bool = False,
    ) -> None:
        """
        Make empty buffers for every bank of a lifted module.

        Raises:
            BadOption: a bound that is not positive, or no scheme.
            UnknownName: no such quantizer.
        """
        for option, value in (("max_buffer_mb", max_buffer_mb), ("max_rows", max_rows)):
            if value is not None and not value > 0:
                raise BadOption(name="observe", option=f"{option}={value}", reason="it must be positive")
        self.lifted = lifted
        self.schemes = tuple(dict.fromkeys(Scheme.parse(str(scheme)) for scheme in schemes))
        if not self.schemes:
            raise BadOption(name="observe", option="schemes=()", reason="there must be at least one scheme")
        device = device_of(lifted.root)
        self.bound = _default_bound(device) if max_buffer_mb is None else max_buffer_mb * 1e6
        rows = (GPU_ROWS if device.type == "cuda" else CPU_ROWS) if max_rows is None else int(max_rows)
        found, turned = find_quantizer(quantizer), rotations(lifted.module)
        self.how = How(lifted.weights, self.schemes, found, rows, self.bound, turned)
        self.buffers = {
            (block.name, name): BankBuffer(block, bank, len(self.schemes))
            for block in lifted.blocks
            for name, bank in block.banks.items()
        }
        self.collectors = [
            BlockCollector(
                block,
                {name: self.buffers[block.name, name] for name in block.banks},
                self.bounded,
                gradients=gradients,
            )
            for block in lifted.blocks
        ]

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Hook all banks and blocks."""
        with ExitStack() as stack:
            for collector in self.collectors:
                stack.enter_context(collector.hooked())
            yield

    def push(self, routed: Routed) -> None:
        """Add rows for experts that stand alone."""
        next(iter(self.buffers.values())).push(routed)
        self.bounded()

    def flush(self) -> None:
        """Take in what was recorded outside of a call of its block."""
        for collector in self.collectors:
            collector.flush()

    def bounded(self) -> None:
        """Reduce the fullest banks until what waits is within the bound."""
        while sum(buffer.n_bytes for buffer in self.buffers.values()) > self.bound:
            max(self.buffers.values(), key=lambda buffer: buffer.n_bytes).reduce(self.how)

    def reduce_block(self, block: str) -> None:
        """Reduce what waits of one block."""
        for (name, _), buffer in self.buffers.items():
            if name == block:
                buffer.reduce(self.how)

    def reduce(self, *, quiet: bool) -> None:
        """Reduce all that waits; the bar counts experts."""
        total = sum(buffer.bank.shape.experts for buffer in self.buffers.values() if buffer.waiting)
        with tqdm(total=total, desc="reducing", disable=quiet, unit="expert") as bar:
            for (name, _), buffer in self.buffers.items():
                bar.set_postfix_str(name)
                buffer.reduce(self.how.watched(bar.update))

    def stats(self, like: Stats, facts: Sequence[str], *, quiet: bool) -> Stats:
        """Give all sums and the facts of the weights, with the options of `like`."""
        shapes = [buffer.bank.shape for buffer in self.buffers.values()]
        total = sum(shape.experts * len(shape.weights) for shape in shapes)
        with tqdm(total=total, desc="reading weights", disable=quiet or not facts, unit="linear") as bar:
            found = facts_of(self.lifted, facts, bar.update)
        banks = {key: buffer.stats(found[key]) for key, buffer in self.buffers.items()}
        macs = sum(buffer.macs for buffer in self.buffers.values())
        return Stats(self.schemes, banks, like.min_tokens, like.data_free, like.routing, macs)


def _default_bound(device: torch.device) -> float:
    """Bytes that rows may take: a part of what a GPU has free, a fixed amount elsewhere."""
    if device.type != "cuda":
        return CPU_BUFFER_MB * 1e6
    return GPU_BUFFER_SHARE * torch.cuda.mem_get_info(device)[0]
