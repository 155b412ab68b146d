"""The table of sensitivities, and how one is read from text."""

from __future__ import annotations

from mxmoe.errors import BadPipeline, NotASensitivity
from mxmoe.passes.options import build_step, read_specs
from mxmoe.passes.sensitivities.base import Sensitivity
from mxmoe.registry import Registry

SENSITIVITIES = Registry(
    kind="sensitivity",
    group="mxmoe.sensitivities",
    table={
        "squared": "mxmoe.passes.sensitivities.squared:Squared",
        "mxmoe": "mxmoe.passes.sensitivities.mxmoe:Mxmoe",
        "fisher": "mxmoe.passes.sensitivities.fisher:Fisher",
        "pmq": "mxmoe.passes.sensitivities.pmq:Pmq",
        "mopeq": "mxmoe.passes.sensitivities.mopeq:Mopeq",
        "alphaq": "mxmoe.passes.sensitivities.alphaq:Alphaq",
        "router-norm": "mxmoe.passes.sensitivities.router_norm:RouterNorm",
        "frequency": "mxmoe.passes.sensitivities.frequency:Frequency",
        "uniform": "mxmoe.passes.sensitivities.uniform:Uniform",
        "random": "mxmoe.passes.sensitivities.random:Random",
    },
)
"""name -> class of `Sensitivity`; its fields are its options."""


def parse_sensitivity(text: str) -> Sensitivity:
    """
    Read one sensitivity: `pmq`, or `pmq{gamma=1 beta=2}`; the inverse of its `str`.

    Raises:
        BadPipeline: the text does not parse, or names several.
        UnknownName: no such sensitivity.
        NotASensitivity: something else is registered under the name.
        BadOption: an option that it does not have, or a value that the option cannot take.
    """
    specs = read_specs(text)
    if len(specs) != 1:
        raise BadPipeline(text=text, reason="one sensitivity is wanted")
    (spec,) = specs
    kind = SENSITIVITIES[spec.name]
    if not (isinstance(kind, type) and issubclass(kind, Sensitivity)):
        raise NotASensitivity(name=spec.name, reason=f"{kind!r} is no subclass of mxmoe.passes.Sensitivity")
    if kind.__dict__.get("name") != spec.name:
        raise NotASensitivity(name=spec.name, reason=f"write `name = {spec.name!r}` in {kind.__qualname__}")
    if "__dataclass_params__" not in kind.__dict__ or kind.required_fields():
        reason = f"decorate {kind.__qualname__} with @dataclass(frozen=True), and give its options defaults"
        raise NotASensitivity(name=spec.name, reason=reason)
    return build_step(kind, spec, {})
