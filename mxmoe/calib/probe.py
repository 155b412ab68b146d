"""How a block weighs what its banks give: read off the block itself, by calling it with stubs in their place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Stub = Callable[[Tensor], Tensor]
"""rows [rows, H] -> what the stub gives for them [rows, H]."""
_LEAK = 0.02
"""Part of a stub's output that may turn up in other channels; a norm or a projection leaks far more."""


def first_tensor(output: object) -> Tensor | None:
    """Give a block's hidden states: its output, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def probe_factors(
    call: Callable[[], object], modules: Sequence[nn.Module], silent: Sequence[nn.Module], n_tokens: int, hidden: int
) -> list[Tensor] | None:
    """
    Find what a block multiplies each module's output with, per token: [n_tokens] float32 for each module.

    Stub i gives 1 in channel i and 0 elsewhere, so a block that weighs and adds shows factor i in channel i of its
    output: the sigmoid of a shared expert's gate, a routed scaling factor. None: the block does something else, a norm
    or a projection behind the sum, or it has fewer channels than modules. `silent` modules give nothing meanwhile.
    """
    if len(modules) > hidden:
        return None
    quiet: dict[nn.Module, Stub] = {module: torch.zeros_like for module in (*modules, *silent)}
    base = _run(call, quiet, n_tokens, hidden)
    out = _run(call, quiet | {module: _one_hot(i) for i, module in enumerate(modules)}, n_tokens, hidden)
    if base is None or out is None:
        return None
    change = out - base
    if not _stays(change, len(modules)):
        return None
    return [change[:, index].contiguous() for index in range(len(modules))]


def probe_assignments(
    call: Callable[[], object],
    entries: Sequence[nn.Module],
    n_rows: Sequence[int],
    silent: Sequence[nn.Module],
    n_tokens: int,
    hidden: int,
) -> list[Tensor] | None:
    """
    Find what a block multiplies each row of each entry's output with: [rows of the entry] float32 for each.

    For a list of MLPs that the block calls on their own tokens, in an order of its own. An entry's stub gives 1 in one
    channel and the binary digits of the row's number in the next ones; the block's output then shows for each token
    the factor and the row it belongs to. As many entries at a time as there are channels for. None: as above.
    """
    digits = max(1, max(n_rows, default=1)).bit_length()
    at_once = hidden // (1 + digits)
    if not at_once:
        return None
    quiet: dict[nn.Module, Stub] = {entry: torch.zeros_like for entry in (*entries, *silent)}
    base = _run(call, quiet, n_tokens, hidden)
    factors: list[Tensor] = []
    for start in range(0, len(entries), at_once):
        group = entries[start : start + at_once]
        numbered = {entry: _numbered(i * (1 + digits), digits) for i, entry in enumerate(group)}
        out = _run(call, quiet | numbered, n_tokens, hidden)
        if base is None or out is None or not _stays(out - base, len(group) * (1 + digits)):
            return None
        shown = (out - base)[:, : len(group) * (1 + digits)].unflatten(1, (len(group), 1 + digits))
        for index, rows in enumerate(n_rows[start : start + at_once]):
            factors.append(_decode(shown[:, index], rows))
    return factors


def _decode(shown: Tensor, rows: int) -> Tensor:
    """Sort the factors of one entry's tokens [tokens, 1 + digits] by row number; a row that is not shown has 0."""
    factor = shown[:, 0]
    taken = factor != 0
    bits = shown[taken, 1:].abs() > factor[taken, None].abs() / 2
    number = (bits * (2 ** torch.arange(bits.shape[1], device=bits.device))).sum(-1)
    by_row = torch.zeros(rows, device=shown.device)
    fits = number < rows
    return by_row.index_put_((number[fits],), factor[taken][fits])


def _stays(change: Tensor, channels: int) -> bool:
    """Whether only the first `channels` of the output changed, and something did."""
    inside, outside = change[:, :channels].norm(), change[:, channels:].norm()
    return bool(torch.isfinite(inside + outside)) and float(inside) > 0 and float(outside) <= _LEAK * float(inside)


def _one_hot(channel: int) -> Stub:
    def stub(rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        out[:, channel] = 1
        return out

    return stub


def _numbered(channel: int, digits: int) -> Stub:
    def stub(rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        number = torch.arange(len(rows), device=rows.device)[:, None]
        out[:, channel] = 1
        out[:, channel + 1 : channel + 1 + digits] = (number >> torch.arange(digits, device=rows.device) & 1).to(out)
        return out

    return stub


def _run(call: Callable[[], object], stubs: Mapping[nn.Module, Stub], n_tokens: int, hidden: int) -> Tensor | None:
    with _stubbed(stubs):
        out = first_tensor(call())
    if out is None or out.numel() != n_tokens * hidden:
        return None
    return out.reshape(-1, hidden).float()


@contextmanager
def _stubbed(stubs: Mapping[nn.Module, Stub]) -> Generator[None]:
    """Let every module give what its stub gives for its first argument, and nothing be computed in it."""
    held = {module: module.__dict__.get("forward") for module in stubs}

    def forward_of(stub: Stub) -> Callable[..., Tensor]:
        def forward(*args: Any, **named: Any) -> Tensor:  # noqa: ANN401  # the module's own arguments, whatever they are
            rows = args[0] if args else next(iter(named.values()))
            return stub(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)

        return forward

    try:
        for module, stub in stubs.items():
            module.__dict__["forward"] = forward_of(stub)
        yield
    finally:
        for module, forward in held.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
