"""`random`: bits to experts by lot."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.errors import BadOption
from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity, distortion, largest_of


@dataclass(frozen=True)
class Random(Sensitivity):
    """
    Every linear of every expert scores a number drawn from 0 to 1: a control that any method has to beat.

    What is drawn depends on the seed and on the name of the linear, not on what else is in the model.
    """

    name = "random"
    seed: int = 0
    """Not negative."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadOption(name=self.name, option=f"seed={self.seed}", reason="it is not negative")

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Draw scores, and weigh the schemes' distortion by them as `ByScore` does."""
        curve, largest = distortion(banks), largest_of(banks)
        return [
            {role: np.outer(self._draw(bank, role), curve) * (bank.numel(role) / largest) for role in bank.roles}
            for bank in banks
        ]

    def _draw(self, bank: SeenBank, role: str) -> Floats:
        name = zlib.crc32(f"{bank.block}/{bank.name}/{role}".encode())
        return np.random.default_rng((self.seed, name)).random(bank.experts)
