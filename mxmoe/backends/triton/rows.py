"""Kinds of rows: how activations are held for the experts of a scheme."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxmoe.ir import Scheme


@dataclass(frozen=True, order=True)
class RowKind:
    """How rows are held for some of the experts: element type, largest code, channels that share a scale."""

    format: str
    """bf16, fp16, int or e4m3."""
    bits: int
    group: int = 0
    """0: one scale per row."""

    @classmethod
    def of(cls, scheme: Scheme) -> RowKind:
        """Rows that a linear in `scheme` multiplies."""
        return cls(scheme.act_format, scheme.act_bits, scheme.act_group_size or 0)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the codes."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "int": torch.int8, "e4m3": torch.float8_e4m3fn}[
            self.format
        ]

    @property
    def steps(self) -> float:
        """Largest code."""
        return 448.0 if self.format == "e4m3" else float(2 ** (self.bits - 1) - 1)

    @property
    def spec(self) -> tuple[int, float, int]:
        """What the kernel is compiled for: way, largest code, group."""
        way = {"bf16": 0, "fp16": 0, "int": 1, "e4m3": 2}[self.format]
        return way, self.steps, self.group
