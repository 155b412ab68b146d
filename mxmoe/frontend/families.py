"""
The irregular families of models: one row each. Whatever is not here is read off its structure.

A row is needed where a class has a gate of its own (an overridden `_apply_gate`, or clamps inside `forward`): structure
shows the weights, only a row says what is computed between them. Rows are found by class name, along the bases of the
class. What a row claims is compared with the module when it is lifted, so a wrong row raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

from torch import nn


@dataclass(frozen=True)
class Family:
    """One row: what the nonlinearity of a class is, and where its numbers are found."""

    name: str
    """Class name of the experts module, or of an MLP."""
    act: str | None
    """Kind in `mxmoe.quant.acts.ACTS`; None: the pointwise `act_fn`, overridden only in its rounding."""
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of a param -> dotted attribute of the module that holds its number."""
    unlimited: str | None = None
    """Kind to use when every param is infinite."""

    def read(self, module: nn.Module) -> tuple[str | None, dict[str, float]]:
        """Give the kind and its numbers for one module of this family."""
        numbers = {name: float(_attribute(module, path)) for name, path in self.params.items()}
        if self.unlimited and all(math.isinf(number) for number in numbers.values()):
            return self.unlimited, {}
        return self.act, numbers


def _attribute(module: nn.Module, path: str) -> float:
    return reduce(getattr, path.split("."), module)  # pyright: ignore[reportReturnType, reportArgumentType]  # a dotted path


_ALPHA_LIMIT = {"alpha": "alpha", "limit": "limit"}
_SWIGLU_ALPHA_LIMIT = {"alpha": "swiglu_alpha", "limit": "swiglu_limit"}
_SWIGLU_LIMIT = {"limit": "swiglu_limit"}
_LIMIT = {"limit": "limit"}
_SOFTCAPS = {"gate_cap": "act_fn.gate_softcap.softcap", "up_cap": "act_fn.up_softcap.softcap"}

FAMILIES: Mapping[str, Family] = {
    row.name: row
    for row in (
        Family("BeamExperts", None),
        Family("DeepseekV4Experts", "silu_clamped", _LIMIT),
        Family("DeepseekV4MLP", "silu_clamped", _LIMIT),
        Family("Glm5NextTextExperts", "silu_clamped", _SWIGLU_LIMIT),
        Family("Glm5NextTextMLP", "silu_clamped", _SWIGLU_LIMIT),
        Family("GptOssExperts", "swiglu_oai", _ALPHA_LIMIT),
        Family("HYV4Experts", "silu_clamped", _SWIGLU_LIMIT),
        Family("HYV4VLExperts", "silu_clamped", _SWIGLU_LIMIT),
        Family("Inkling2Experts", "swiglu_softcap", _SOFTCAPS),
        Family("Inkling2LoopExperts", "swiglu_softcap", _SOFTCAPS),
        Family("MiniMaxM3VLExperts", "swiglu_oai", _SWIGLU_ALPHA_LIMIT),
        Family("MiniMaxM3VLDenseMLP", "swiglu_oai", _SWIGLU_ALPHA_LIMIT),
        Family("OpenAIPrivacyFilterExperts", "swiglu_oai", _ALPHA_LIMIT),
        Family("Step3p7Experts", "silu_capped", _LIMIT, unlimited="silu"),
        Family("Step3p7MLP", "silu_capped", _LIMIT, unlimited="silu"),
    )
}
"""Class name -> row."""

REFUSED: Mapping[str, str] = {
    "DbrxExperts": "its experts are stacked along the rows of 2-D parameters that a nested module owns",
    "JetMoeParallelExperts": "up and down are separate modules that take rows sorted by expert and counts per expert",
    "Llama4TextExperts": "every expert takes every token, scaled by its routing weight beforehand; there is no index",
    "LongcatFlashExperts": "an index beyond its experts is an expert that returns the token itself; here it is padding",
    "VitPoseNaiveMoe": "an expert is one linear on the hidden layer of a shared MLP, not an MLP of its own",
}
"""Class name -> why it cannot be lifted."""


def family_of(module: nn.Module) -> Family | None:
    """Give the row of a module's class or of its nearest base that has one; None if it is regular."""
    return next((FAMILIES[base.__name__] for base in type(module).__mro__ if base.__name__ in FAMILIES), None)


def refusal_of(module: nn.Module) -> str | None:
    """Give the reason why a module's class is refused; None if it is not."""
    return next((REFUSED[base.__name__] for base in type(module).__mro__ if base.__name__ in REFUSED), None)
