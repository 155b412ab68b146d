"""The executable as a torch operator, so that `torch.compile(fullgraph=True)` sees one node with a known shape."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Runs(Protocol):
    """What the operator calls."""

    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `mxmoe.target.Executable`."""
        ...


_HELD: WeakValueDictionary[int, Runs] = WeakValueDictionary()


def hold(executable: Runs) -> int:
    """Give an executable a number that a graph can hold; it lives as long as its module does."""
    number = id(executable)
    _HELD[number] = executable
    return number


@torch.library.custom_op("mxmoe::run_bank", mutates_args=())
def run_bank(held: int, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a bank of the executable that `hold` gave this number."""
    return _HELD[held](bank, hidden, top_k_index, top_k_weights)


@run_bank.register_fake
def _(held: int, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    del held, bank, top_k_index, top_k_weights
    return torch.empty_like(hidden)
