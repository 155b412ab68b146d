"""`observe`: run data through a module once, and come back with what allocation needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from mxmoe.calib.facts import CHEAP, FACTS
from mxmoe.calib.gradients import Loss, differentiate, frozen, next_token_loss
from mxmoe.calib.inputs import Feed, Inputs, device_of, spread
from mxmoe.calib.like import LiftedLike
from mxmoe.calib.session import Session
from mxmoe.calib.stats import Stats
from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant import Quantizer

Run = Callable[[nn.Module, Any], object]
"""Runs one batch through the lifted module."""


def observe(
    lifted: LiftedLike,
    inputs: Inputs,
    *,
    schemes: Sequence[Scheme | str],
    run: Run | None = None,
    gradients: bool | Loss = False,
    facts: Sequence[str] = CHEAP,
    min_tokens: int = 32,
    max_buffer_mb: float | None = None,
    max_rows: int | None = None,
    quantizer: str | Quantizer = "rtn",
    quiet: bool = False,
) -> Stats:
    """
    Observe routing and sensitivity of every block in one pass over the data.

    Each bank's rows wait in a buffer until the memory for them is used up, and are then reduced to sums (`Reduction`).
    The sums are exact over all data: neither the bound nor the batches change them beyond float32 rounding. What the
    block does to a bank's output afterwards (a shared expert's gate, a scaling factor) is asked of the block itself.
    Where `lifted.module` rotates what goes to down (`rotate-down`), errors of down are those of the rotated product.

    With gradients every batch is also run backwards, and the same errors are weighed a second time, by the squared
    derivative of the loss in every channel of the bank's output (`BankStats.fisher_error`).

    Memory, besides the module and one call's activations (all layers' with gradients): the waiting rows, once more
    while they are sorted by expert, and what `Reduction.add` says for `max_rows` rows. On a GPU products of rows and
    weights that both came in 16 bits run in TF32, whose 11 bits hold them; a product with a quantized weight is then
    off by 2^-12 of itself at most in each factor, against the 2^-9 of the finest integer scheme's step.

    Args:
        lifted: what `lift` returned; it is left as it was.
        inputs: see `mxmoe.calib.inputs.Batch`: a batch or an iterable of them.
        schemes: to evaluate each linear under, by value or name.
        run: runs one batch through `lifted.root` and returns what it gives; by default tensors are token ids of a model
            or hidden states of a block, and mappings are keyword arguments.
        gradients: True for the loss of the next token, or a function (output, batch) -> loss; False for none.
        facts: what to find out of the weights themselves, names in `FACTS`.
        min_tokens: experts with fewer tokens take the `BANK_MEAN` fallback of the statistics.
        max_buffer_mb: bound on the memory of waiting rows, over all blocks, 10^6 bytes; one call may exceed it. None
            takes 512 on a CPU, and a quarter of the free memory of a GPU.
        max_rows: rows of one expert that are reduced at a time; bounds the memory of a reduction. None takes 8192 on a
            CPU and 32768 on a GPU.
        quantizer: how weights are quantized, a name in `QUANTIZERS` or such a function.
        quiet: no progress bar.

    Raises:
        EmptyCalibration, NonFiniteCalibration, BadCalibration: in the data; sequences are checked before any work.
        BadScheme: a scheme name that is none.
        BadOption: a bound that is not positive, gradients where there is no loss.
        UnknownName: no such quantizer or fact.
        NothingObserved: a bank that no token reached.
        NonFiniteObservation: activations within the model that are not finite.
        NonFiniteWeights: from the quantizer.
    """
    loss = next_token_loss if gradients is True else gradients or None
    session = Session(lifted, schemes, max_buffer_mb, max_rows, quantizer, gradients=loss is not None)
    _ = [FACTS[name] for name in facts]  # an unknown name is to be found out now
    feed = Feed(lifted)
    if loss is not None:
        _refuse_without_loss(feed, gradients)
    batches, count = feed.batches(inputs) if run is None else _unchecked(inputs)
    with evaluating(lifted.root), session.hooked():
        for batch in tqdm(batches, desc="observing", total=count, disable=quiet, unit="batch"):
            if feed.experts is not None and run is None:
                with torch.no_grad():
                    session.push(feed.routed(batch))
            elif loss is None:
                with torch.no_grad():
                    _ = feed.run(batch) if run is None else run(lifted.root, batch)
                    session.flush()
            else:
                with frozen(lifted.root), torch.enable_grad():
                    output = feed.run(batch) if run is None else run(lifted.root, batch)
                    session.flush()
                    differentiate(loss(output, batch), session.collectors)
        with torch.no_grad():
            session.reduce(quiet=quiet)
    routing = "observed" if feed.has_own_routing else "uniform"
    return session.stats(Stats((), {}, min_tokens, routing=routing), facts, quiet=quiet)


def observe_weights(
    lifted: LiftedLike,
    schemes: Sequence[Scheme | str],
    *,
    tokens_per_expert: int = 64,
    seed: int = 0,
    facts: Sequence[str] = CHEAP,
    max_rows: int | None = None,
    quantizer: str | Quantizer = "rtn",
    quiet: bool = False,
) -> Stats:
    """
    Estimate sensitivity without data: standard normal hidden states, each expert as often as every other.

    The module is not run. The statistics say `data_free`: they know the weights, and nothing of routing, of outliers
    in the activations, or of what the block does to a bank's output.

    Raises:
        BadScheme, BadOption, UnknownName, NonFiniteWeights: as `observe`.
    """
    if tokens_per_expert < 1:
        raise BadOption(
            name="observe_weights", option=f"tokens_per_expert={tokens_per_expert}", reason="it is at least 1"
        )
    session = Session(lifted, schemes, float("inf"), max_rows, quantizer)
    _ = [FACTS[name] for name in facts]
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
    return session.stats(Stats((), {}, 0, data_free=True, routing="uniform"), facts, quiet=quiet)


def _refuse_without_loss(feed: Feed, gradients: bool | Loss) -> None:
    """Raise where there is nothing to differentiate."""
    reason = None
    if feed.experts is not None:
        reason = "experts alone have no loss; observe the model that they are in"
    elif feed.is_block and gradients is True:
        reason = "a block has no loss of its own; observe the model, or pass a function (output, batch) -> loss"
    if reason:
        raise BadOption(name="observe", option="gradients", reason=reason)


def _unchecked(inputs: Inputs) -> tuple[Any, int | None]:
    """Batches for a `run` of the caller's own, who knows what they are; only an empty list is refused."""
    feedable = [inputs] if isinstance(inputs, torch.Tensor | dict) else inputs
    return feedable, len(cast("Any", feedable)) if hasattr(feedable, "__len__") else None


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Switch dropout and router jitter off, and give every submodule its mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
