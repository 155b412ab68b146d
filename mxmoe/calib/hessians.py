"""What quantizers learn of a linear's inputs: for every expert the sum of x x^T over the tokens that reach it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mxmoe.errors import BadOption, BrokenHessians, NoSuchExpert, UnknownName
from mxmoe.files import write_whole
from mxmoe.registry import near_names

FORMAT = "mxmoe-hessians-1"

Transform = Callable[[str], Callable[[Tensor], Tensor] | None]
"""Name of a weight -> what is done to the rows [rows, k] that it reads, e.g. a rotation; None: nothing."""


@dataclass(frozen=True, eq=False)
class BankHessians:
    """The sums of one bank over the inputs of one of its linears, or of gate and up, which read the same."""

    total: Tensor
    """float32 [experts, k, k], sum of c x x^T, c the token's router weight or one."""
    tokens: Tensor
    """int64 [experts], tokens that were summed."""
    is_common: bool
    """Channel j is the same for all experts: for gate and up, and not for down, which reads its expert's own."""

    @cached_property
    def mean(self) -> Tensor:
        """float32 [k, k], x x^T of a mean token of the bank."""
        return self.total.sum(0) / self.tokens.sum().clamp(min=1)

    def of(self, expert: int, prior: float, min_tokens: int | None) -> Tensor | None:
        """Return one expert's Hessian [k, k]; see `Hessians`."""
        k = self.total.shape[-1]
        own, tokens = self.total[expert], int(self.tokens[expert])
        missing = prior * max((k if min_tokens is None else min_tokens) - tokens, 0)
        if self.is_common and missing and bool(self.tokens.any()):
            return own + missing * self.mean
        if not tokens:
            return None
        if not missing:
            return own
        return own + torch.eye(k, device=own.device) * (missing / tokens * own.diagonal().mean())


@dataclass(frozen=True, eq=False)
class Hessians:
    """
    Hessians by weight and expert: `hessians(name, expert) -> [k, k]`, float32, or None if nothing is known.

    An expert that saw fewer than `min_tokens` tokens has a Hessian that says little, or is singular. Each missing token
    counts as `prior` mean tokens: for gate and up of the bank, so that an expert without tokens has the bank's Hessian;
    for down, whose channels are its expert's own, in all directions alike. `prior` 0 leaves the sums as they are.

    Raises:
        BadOption: a negative `prior` or `min_tokens`.
    """

    banks: Mapping[str, BankHessians]
    """Name of a weight -> its sums; gate and up have the same."""
    prior: float = 0.1
    """Mean tokens that stand for one missing token."""
    min_tokens: int | None = None
    """Tokens from which on an expert's own sum is enough; None: as many as it has channels."""

    def __post_init__(self) -> None:
        for option, value in (("prior", self.prior), ("min_tokens", self.min_tokens)):
            if value is not None and not value >= 0:
                raise BadOption(name="Hessians", option=f"{option}={value}", reason="it is at least 0")

    def __call__(self, name: str, expert: int) -> Tensor | None:
        """
        Return one Hessian, not a copy where nothing is blended in.

        Raises:
            UnknownName: nothing was collected for the weight.
            NoSuchExpert: its bank has fewer experts.
        """
        bank = self._bank(name)
        if not 0 <= expert < len(bank.tokens):
            raise NoSuchExpert(name=name, last=len(bank.tokens) - 1, expert=expert)
        return bank.of(expert, self.prior, self.min_tokens)

    def stack(self, name: str, experts: Sequence[int] | None = None) -> Tensor:
        """Return the Hessians of some experts, or of all: [experts, k, k], zeros where nothing is known; as a call."""
        bank = self._bank(name)
        known = [self(name, expert) for expert in (range(len(bank.tokens)) if experts is None else experts)]
        zeros = torch.zeros_like(bank.total[0])
        return torch.stack([zeros if one is None else one for one in known]) if known else bank.total[:0]

    def blended(self, *, prior: float, min_tokens: int | None = None) -> Hessians:
        """Return the same sums with another rule for experts with few tokens."""
        return replace(self, prior=prior, min_tokens=min_tokens)

    @property
    def n_bytes(self) -> int:
        """Memory of the sums."""
        return sum(bank.total.nbytes for bank in {id(bank): bank for bank in self.banks.values()}.values())

    def _bank(self, name: str) -> BankHessians:
        if name not in self.banks:
            raise UnknownName(kind="Hessian", name=name, near=near_names(name, self.banks))
        return self.banks[name]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; the sums are in it as they are, without the blend."""
        unique = list({id(bank): bank for bank in self.banks.values()}.values())
        places = {id(bank): index for index, bank in enumerate(unique)}
        header = {
            "format": FORMAT,
            "names": {name: places[id(bank)] for name, bank in self.banks.items()},
            "common": [bank.is_common for bank in unique],
            "prior": self.prior,
            "min_tokens": self.min_tokens,
        }
        tensors = {f"{index}.total": bank.total.contiguous() for index, bank in enumerate(unique)}
        # the banks of one block share their counts, which the format does not know
        tensors |= {f"{index}.tokens": bank.tokens.clone() for index, bank in enumerate(unique)}
        write_whole(path, safetensors.torch.save(tensors, {"header": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Hessians:
        """
        Read what `save` wrote.

        Raises:
            BrokenHessians: the file is missing, cut short or of another kind.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
                header = json.loads(file.metadata()["header"])
                if header["format"] != FORMAT:
                    raise ValueError(f"its format is {header['format']!r}, not {FORMAT}")
                banks = [
                    BankHessians(file.get_tensor(f"{index}.total"), file.get_tensor(f"{index}.tokens"), is_common)
                    for index, is_common in enumerate(header["common"])
                ]
            named = {name: banks[index] for name, index in header["names"].items()}
            return cls(named, header["prior"], header["min_tokens"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise BrokenHessians(path=path, reason=f"{type(error).__name__}: {error}") from error
