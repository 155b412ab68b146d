"""The compiler as a list: the tables of passes and pipelines, their string form, and the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xdsl.utils.arg_spec import ArgSpec
from xdsl.utils.exceptions import VerifyException

from mxmoe.errors import BadOption, NotAPass, PassFailed, UnknownName
from mxmoe.ir import ModuleOp
from mxmoe.passes.base import Environment, Pass
from mxmoe.passes.options import build_step, read_specs
from mxmoe.registry import Registry, near_names

PASSES = Registry(
    kind="pass",
    group="mxmoe.passes",
    table={
        "rotate-down": "mxmoe.passes.rotate_down:RotateDown",
        "annotate-routing": "mxmoe.passes.annotate_routing:AnnotateRouting",
        "annotate-sensitivity": "mxmoe.passes.annotate_sensitivity:AnnotateSensitivity",
        "annotate-cost": "mxmoe.passes.annotate_cost:AnnotateCost",
        "allocate-bits": "mxmoe.passes.allocate_bits:AllocateBits",
        "apply-plan": "mxmoe.passes.apply_plan:ApplyPlan",
        "lower-to-group-gemm": "mxmoe.passes.lower_to_group_gemm:LowerToGroupGemm",
        "choose-tiles": "mxmoe.passes.choose_tiles:ChooseTiles",
    },
)

PIPELINES: Mapping[str, tuple[str, ...]] = {
    "default": (
        "annotate-routing",  # costs are per expert, and an expert's rows come from its frequency
        "annotate-sensitivity",  # what each choice loses
        "annotate-cost",  # what each choice takes
        "allocate-bits",  # weighs the two; needs both
        "lower-to-group-gemm",  # fuses gate and up, now that their choices are known
        "choose-tiles",  # a tile depends on the scheme chosen and on the rows expected
    ),
    "plan": (
        "annotate-routing",  # choose-tiles wants the rows expected
        "apply-plan",  # the decision was made before
        "lower-to-group-gemm",
        "choose-tiles",
    ),
}


class Observer(Protocol):
    """Sees every pass go by: printing, timing and verifying are observers, the driver knows none of them."""

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Called before a pass runs."""
        ...

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Called after a pass ran."""
        ...


def parse_passes(text: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Pass, ...]:
    """
    Read passes from `pass{option=value},...`, where the name of a pipeline stands for its passes.

    The inverse of `spell_passes`: `parse_passes("default,mine{k=2}")` is the default pipeline and one pass more.
    `options`, pass -> field -> value, holds for what the text does not spell out itself.

    Raises:
        BadPipeline: the text does not parse.
        UnknownName: a pass that is not registered.
        NotAPass: something else is registered under the name.
        BadOption: an option that the pass does not have, or a value of another type.
    """
    specs = [one for spec in read_specs(text) for one in _expand(spec)]
    return tuple(build_step(_find(spec.name), spec, (options or {}).get(spec.name, {})) for spec in specs)


def spell_passes(passes: Sequence[Pass]) -> str:
    """Write passes as a pipeline string."""
    return ",".join(map(str, passes))


def run_passes(
    module: ModuleOp, passes: Sequence[Pass], environment: Environment, observers: Sequence[Observer] = ()
) -> ModuleOp:
    """
    Run passes over a module, in place, and verify it at the end; `VerifyEach` among the observers verifies in between.

    Raises:
        PassFailed: the module does not verify.
    """
    for step in passes:
        for observer in observers:
            observer.before(step, module)
        try:
            step.run(module, environment)
        except Exception as error:  # passes may raise anything; we add the pass and pass it on
            error.add_note(f"in the pass {step}")
            raise
        for observer in observers:
            observer.after(step, module)
    try:
        module.verify()
    except VerifyException as error:
        raise PassFailed(name=spell_passes(passes) or "no pass", reason=error) from error
    return module


def _expand(spec: ArgSpec) -> list[ArgSpec]:
    """Put its passes in place of a pipeline."""
    if spec.name not in PIPELINES:
        return [spec]
    if spec.parameters:
        reason = f"options belong to passes; it runs {', '.join(PIPELINES[spec.name])}"
        raise BadOption(name=f"the pipeline {spec.name}", option=next(iter(spec.parameters)), reason=reason)
    return [one for step in PIPELINES[spec.name] for one in read_specs(step)]


def _find(name: str) -> type[Pass]:
    """Look a pass up and check that it is one: third parties register what they like."""
    if name not in PASSES:
        raise UnknownName(kind="pass", name=name, near=near_names(name, (*PASSES, *PIPELINES)))
    kind = PASSES[name]
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise NotAPass(name=name, reason=f"{kind!r} is no subclass of mxmoe.passes.Pass")
    if kind.__dict__.get("name") != name:
        raise NotAPass(name=name, reason=f"write `name = {name!r}` in {kind.__qualname__}")
    if "__dataclass_params__" not in kind.__dict__:
        raise NotAPass(name=name, reason=f"decorate {kind.__qualname__} with @dataclass(frozen=True)")
    if required := kind.required_fields():
        raise NotAPass(name=name, reason=f"give its options {', '.join(sorted(required))} defaults")
    return kind
